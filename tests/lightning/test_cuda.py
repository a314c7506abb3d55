"""On a GPU: NCCL, resuming, and the main job in half precision."""

import pytest
import torch
from helpers.configs import compose_config
from helpers.interrupted import StopAfter, train_loader
from helpers.training import (
    EVERY_WAY,
    Classifier,
    assert_same_state,
    callback,
    fit,
    seeded,
    state_of,
)
from lightning.pytorch.callbacks import ModelCheckpoint

from saflex_lightning.cli.train import train
from saflex_lightning.engines.direction import adam_second_moments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Lightning sets DDP up in a stream of its own.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match"),
]

GPU = {"accelerator": "gpu", "devices": 1}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_one_process_on_nccl_equals_the_plain_run(way, precision):
    states = []
    for strategy in ("auto", "ddp"):
        module = seeded(Classifier)
        trainer = fit(
            module,
            callback(**way),
            train=train_loader(),
            strategy=strategy,
            precision=precision,
            use_distributed_sampler=False,
            **GPU,
        )
        assert trainer.callback_metrics["saflex/skipped_steps"] == 0
        states.append(state_of(module))
    assert torch.distributed.get_backend() == "nccl"
    torch.distributed.destroy_process_group()  # Lightning leaves it to the end of the process
    assert_same_state(*states)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_run_resumed_in_the_middle_of_an_epoch_equals_the_uninterrupted_one(
    way, precision, tmp_path
):
    def run(*keepers, stop_after=None, **options):
        module = seeded(lambda: Classifier(plain=True))  # checkpoints hold no random state
        fit(
            module,
            callback(**way),
            *keepers,
            StopAfter(stop_after),
            train=train_loader(),  # six steps an epoch
            max_epochs=-1,
            max_steps=14,
            precision=precision,
            enable_checkpointing=bool(keepers),
            **GPU,
            **options,
        )
        return state_of(module)

    keeper = ModelCheckpoint(tmp_path, "latest", every_n_train_steps=9)
    run(keeper, stop_after=9)
    resumed = run(keeper, seed=9, ckpt_path=tmp_path / "latest.ckpt")
    assert_same_state(run(), resumed)


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("saflex_robust", "16-mixed"),
        ("saflex_gradient", "16-mixed"),
        ("saflex_paper", "16-mixed"),
        ("saflex_gradient", "bf16-mixed"),
    ],
)
def test_main_job_learns_in_half_precision(method, precision, tmp_path):
    result = train(
        compose_config(
            tmp_path,
            f"method={method}",
            f"trainer.precision={precision}",
            "trainer.accelerator=gpu",
            "trainer.max_epochs=4",
        )
    )
    assert torch.cuda.max_memory_allocated() > 0
    assert result["test_accuracy"] > 0.6


def test_second_moments_of_an_optimizer_that_counts_on_the_device():
    stepped, other = (torch.nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2))
    optimizer = torch.optim.Adam([stepped, other], lr=0.0, fused=True)
    stepped.grad = torch.full_like(stepped, 2.0)
    optimizer.step()
    assert optimizer.state[stepped]["step"].is_cuda
    moments = adam_second_moments([other, stepped], [optimizer])
    assert moments is not None
    assert not moments[0].any()
    torch.testing.assert_close(moments[1], torch.full_like(stepped, 4.0))
