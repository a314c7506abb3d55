"""The callback that keeps what a fit has learned of its data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.text import Text

from saflex_lightning.callback import SAflexCallback
from saflex_lightning.data.checks import check
from saflex_lightning.fit.checks import find_group_names
from saflex_lightning.fit.report import SAflexWarning
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.validation.source import ask_hook

from .collect import Collector
from .figures import can_draw, draw_all
from .images import DoubtedImages
from .summary import (
    ClassSummary,
    GroupSummary,
    Names,
    RowSummary,
    make_groups_table,
    summarize_classes,
    summarize_groups,
    summarize_rows,
)
from .write import CLASSES, GROUPS, HISTORY, ROWS, write_parquet, write_table

__all__ = ["SAflexInsight"]


class SAflexInsight(pl.Callback):
    """Keep which rows and groups helped, and write it down at the end of a fit.

    It stands behind `SAflexCallback` and looks at what that one has learned anyway, for which the
    device is waited for once in 64 steps. At the end, and at an interrupt or an error, it writes

    * ``saflex_rows.csv``, the most doubted rows first, where rows have an ``index``
      (``saflex_rows.parquet`` too where pyarrow is installed),
    * ``saflex_groups.csv``, ``saflex_classes.csv`` and ``saflex_history.csv``,
    * figures, where matplotlib is installed; loggers of TensorBoard, MLflow and W&B get them too,

    and prints the table of groups. With several processes an error costs the steps since rows were
    last added up over them, 63 at most.

    Args:
        folder: Where the files go; None is that of the Trainer's logger, else
            ``default_root_dir``.
        class_names: Of the classes in their order; None asks the hook ``saflex_class_names()`` of
            datamodule or module, else they are numbered.
        max_rows: Rows that are remembered, of 64 bytes each; further ones count in their groups
            alone.
        figures: Whether to draw.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``max_rows`` is not positive.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        class_names: Sequence[str] | None = None,
        max_rows: int = 1_000_000,
        figures: bool = True,
    ) -> None:
        check("a path", optional=True, folder=folder)
        check("a list of names", optional=True, class_names=class_names)
        check("a positive integer", max_rows=max_rows)
        check("True or False", figures=figures)
        self.folder = folder
        self.class_names = class_names
        self.max_rows = max_rows
        self.figures = figures
        self._begin()

    def _begin(self) -> None:
        self._collector = Collector(self.max_rows)
        self._images = DoubtedImages()
        self._callback: SAflexCallback | None = None
        self._ranks = Ranks()
        self._group_names: Sequence[str] = ()
        self._class_names: Sequence[str] = ()
        self._into: Path | None = None  # once a fit has begun
        self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the callback to look at.

        Raises:
            MisconfigurationException: If there is none before this one.
        """
        if stage != "fit":
            return
        self._begin()  # a checkpoint's state is loaded after this hook
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        found = [callback for callback in before if isinstance(callback, SAflexCallback)]
        if not found:
            raise MisconfigurationException(
                "Expected a `SAflexCallback` before `SAflexInsight`, which looks at what it "
                f"learns, but got {[type(callback).__name__ for callback in callbacks]}. Pass "
                "`callbacks=[SAflexCallback(), SAflexInsight()]`."
            )
        self._callback = found[0]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the folder, and the names of groups and classes."""
        self._ranks = Ranks(trainer.global_rank, trainer.world_size)
        log_dir = trainer.log_dir  # every rank must ask
        self._into = Path(self.folder or log_dir or trainer.default_root_dir)
        names = self.class_names or ask_hook(trainer, pl_module, "saflex_class_names")
        self._class_names = list(names or ())
        self._group_names = find_group_names(trainer, pl_module)
        if self.figures and not can_draw():
            rank_zero_info(
                "SAflexInsight writes its tables without figures, since matplotlib is not "
                "installed; pip install 'saflex-lightning[plots]'."
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the epochs before count less in what is thought of rows."""
        self._collector.counts.fade()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in what the step has learned."""
        assert self._callback is not None
        rows = self._callback.read_step_rows()
        if rows is None:
            return
        if self._ranks.rank == 0 and self.figures and can_draw():
            self._images.add(batch, rows)
        self._step = trainer.global_step
        if self._collector.add(rows):
            self._flush()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up the epoch."""
        self._flush()

    def _flush(self) -> None:
        self._collector.flush(self._ranks, self._step)
        self._images.flush(self._collector.table)

    # The end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write everything, and print the table of groups."""
        self._flush()
        self._write(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Write what there is; other processes may have stopped elsewhere, so none is waited for.

        An error in writing becomes a warning, so that it does not hide the first one.
        """
        if self._into is None:
            return
        if self._ranks.size == 1:
            self._flush()
        try:
            self._write(trainer)
        except OSError as error:
            rank_zero_warn(
                f"Expected to write what SAFLEX has learned into {self._into}, but got {error!r}. "
                "Pass a folder that can be written as `SAflexInsight(folder=...)`.",
                category=SAflexWarning,
            )

    def _write(self, trainer: pl.Trainer) -> None:
        folder, collector, callback = self._into, self._collector, self._callback
        if self._ranks.rank or folder is None or callback is None or not collector.counts.sums.size:
            return
        evidence = callback.read_group_evidence()
        names = Names(self._group_names, self._class_names)
        groups = summarize_groups(collector.counts, evidence, names)
        write_table(folder / GROUPS, GroupSummary._fields, groups)
        classes = summarize_classes(collector.counts, names)
        write_table(folder / CLASSES, ClassSummary._fields, classes)
        points = [
            (step, names.group(group), weight) for step, group, weight in collector.history.points
        ]
        write_table(folder / HISTORY, ("step", "group", "mean_weight"), points)
        if len(collector.table.index):
            rows = RowSummary._fields
            write_table(folder / ROWS, rows, summarize_rows(collector.table, names))
            parquet = (folder / ROWS).with_suffix(".parquet")
            write_parquet(parquet, rows, summarize_rows(collector.table, names))
        if self.figures and can_draw():
            self._draw(trainer, folder, names)
        if left_out := collector.table.left_out:
            rank_zero_warn(
                f"Expected at most {self.max_rows} rows to remember, but {left_out} visits were of "
                "further ones, which count in their groups alone. Raise `max_rows`.",
                category=SAflexWarning,
            )
        Console().print(make_groups_table(groups))
        Console().print(Text(f"Tables of rows and groups: {folder}"), soft_wrap=True)

    def _draw(self, trainer: pl.Trainer, folder: Path, names: Names) -> None:
        collector = self._collector
        images = self._images.read(collector.table)
        for name, figure in draw_all(collector.table, collector.history, images, names):
            file = folder / f"saflex_{name}.png"
            figure.savefig(file)
            for each in trainer.loggers:
                logger: Any = each
                board: Any = getattr(logger, "experiment", None)
                if hasattr(board, "add_figure"):  # that of TensorBoard
                    board.add_figure(f"saflex/{name}", figure, trainer.global_step)
                elif hasattr(board, "log_figure") and hasattr(logger, "run_id"):  # of MLflow
                    board.log_figure(logger.run_id, figure, f"saflex/{name}.png")
                elif hasattr(logger, "log_image"):  # that of Weights & Biases
                    logger.log_image(f"saflex/{name}", [str(file)])

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; with several processes, what they have added up."""
        if self._ranks.size == 1:
            self._collector.flush(self._ranks, self._step)
        return self._collector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped."""
        self._collector.load_state_dict(state_dict)
