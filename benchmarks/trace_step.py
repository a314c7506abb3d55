"""Count the files of the package that one warm training step enters, and its changes of file.

    python benchmarks/trace_step.py
    python benchmarks/trace_step.py '{"preset": "gradient"}' --list

The step is the ninth, a refresh of the validation gradient, on a union batch in the Trainer.
"""

import argparse
import json
import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

import saflex_lightning
from saflex_lightning import AugmentedBatch, SAflexCallback, SAflexMixin

STEP = 8
PACKAGE = str(Path(saflex_lightning.__file__).parent) + "/"


class Classifier(SAflexMixin, L.LightningModule):
    """A perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)
        )

    def forward(self, inputs):
        """Return logits."""
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        """Return the refined loss."""
        return self.saflex_loss(self.saflex_forward(batch.inputs), batch.target)

    def saflex_group_names(self):
        """Name the groups."""
        return ("clean", "augmented")

    def configure_optimizers(self):
        """Return Adam."""
        return torch.optim.Adam(self.parameters())


class Trace(L.Callback):
    """Note, line by line, which file of the package is executed."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Begin; this callback is the first."""
        if batch_idx == STEP:
            sys.settrace(self._enter)

    def _enter(self, frame, event, _arg):
        return self._note if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _note(self, frame, event, _arg):
        self.files.append(frame.f_code.co_filename.removeprefix(PACKAGE))
        return self._note


class Stop(L.Callback):
    """End the trace; the last callback."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """End it."""
        sys.settrace(None)


def union(rows):
    """Return a union batch of the rows and a noisy copy of them."""
    inputs, target = (torch.stack(column) for column in zip(*rows, strict=True))
    n = len(target)
    augmented = torch.arange(2 * n) >= n
    return AugmentedBatch(
        torch.cat([inputs, inputs + 0.1]),
        target.repeat(2),
        augmented,
        augmented.long(),
        torch.arange(2 * n),
    )


def main() -> None:
    """Train some steps and print the counts of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="?", default="{}", help="keywords of the callback, JSON")
    parser.add_argument("--list", action="store_true", help="print every change of file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = list(zip(torch.randn(320, 8), torch.randint(4, (320,)), strict=True))
    trace = Trace()
    settings = json.loads(arguments.settings)
    trainer = L.Trainer(
        max_steps=STEP + 4,  # what is logged at the end is not counted
        accelerator="cpu",
        callbacks=[trace, SAflexCallback(DataLoader(rows, 16), **settings), Stop()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(rows, 16, collate_fn=union))
    changes = [a for a, b in zip(trace.files, [None, *trace.files], strict=False) if a != b]
    if arguments.list:
        print("\n".join(changes))
    print(f"{len(set(changes))} files, {len(changes) - 1} changes")


if __name__ == "__main__":
    main()
