"""Run a function in several real processes that form one process group, and collect results."""

import os
import signal
import socket
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.multiprocessing as mp

HANG_SECONDS = 600  # far above the longest run on a busy machine


def run_in_processes(function, world_size, *args):
    """Return ``[function(rank, *args) for rank]``, each computed in its own process.

    The processes look to Lightning like ones that torchrun started, so a Trainer inside them with
    ``devices=world_size, strategy="ddp"`` joins the group and starts no processes of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes, errors = _run(function, world_size, args, folder)
        assert None not in codes, f"exit codes {codes}, None for hung\n" + "\n".join(errors)
        assert not errors, "\n".join(errors)
        assert not any(codes), "a process died early"
        return [
            torch.load(Path(folder) / f"result{rank}", weights_only=False)
            for rank in range(world_size)
        ]


def exit_codes(function, world_size, *args):
    """Return the exit code of each process, as above; None for one that hung."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(function, world_size, args, folder)[0]


def _run(function, world_size, args, folder):
    context = mp.get_context("forkserver")  # fresh processes that need not import torch again
    context.set_forkserver_preload(["lightning.pytorch", "torchmetrics.classification"])
    with _held_port() as port:
        processes = [
            context.Process(target=_child, args=(function, rank, world_size, port, folder, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(HANG_SECONDS)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    left = [process.pid for process in processes if not _group_ends(process.pid)]
    assert not left, f"processes that {left} started are left"
    return codes, [path.read_text() for path in sorted(Path(folder).glob("error*"))]


def _group_ends(group, seconds=30):
    """Say whether a process group has no process left, soon at least; whatever is left is killed.

    A loader's workers look for their parent every five seconds.
    """
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def _held_port():
    """Yield a port that nothing else is given meanwhile; rank 0's store can still listen on it."""
    with socket.socket() as holder:
        # Two sockets that both say so may be bound to one port as long as only one listens.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _child(function, rank, world_size, port, folder, args):
    os.setpgrp()  # so that what it starts can be told from what others do
    # Under forkserver, which started this process, workers are children of another process than the
    # one that loads, and do not see its end.
    mp.set_start_method("fork", force=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        result = function(rank, *args)
        torch.save(result, Path(folder) / f"result{rank}")
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
