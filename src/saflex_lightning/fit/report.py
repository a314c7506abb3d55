"""What a fit says: one line at its start, what each step learned, and each warning once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from saflex_lightning.functional.losses import is_probabilities
from saflex_lightning.functional.settings import PRESETS, Settings
from saflex_lightning.functional.solve import SAflexSolution
from saflex_lightning.step import Step

__all__ = [
    "Report",
    "SAflexWarning",
    "describe_fit",
    "log_metrics",
    "log_settings",
    "read_step",
    "solution_metrics",
    "varying_metrics",
]


class SAflexWarning(UserWarning):
    """Something about the data or the model makes SAFLEX's result weaker than it looks."""


def describe_fit(settings: Settings, engine: str) -> str:
    """Return what a fit will learn and how, in one line."""
    learned = [
        what
        for what, is_learned in (
            ("sample weights", settings.weight_rule != "ones"),
            ("soft labels", settings.label_rule != "keep"),
            ("weights of rows from evidence", settings.row_evidence),
        )
        if is_learned
    ]
    letter = (
        "This is Algorithm 1 of the paper."
        if settings == PRESETS["paper"]
        else "Algorithm 1 to the letter: SAflexCallback(preset='paper')."
    )
    interval = settings.refresh_every_n_steps
    return (
        f"SAFLEX learns {' and '.join(learned) or 'nothing'}{engine and f' with {engine}'} from a "
        f"validation batch every {'' if interval == 1 else f'{interval} '}training "
        f"batch{'' if interval == 1 else 'es'}. {letter}"
    )


def read_step(step: Step, val_gradient_norm: Tensor | None, skipped: Tensor) -> dict[str, Tensor]:
    """Return what a step learned, as scalars that vary, averaged over its tasks."""
    overhead = None if step.fit.meter is None else step.fit.meter.ratio
    names = varying_metrics(step.fit.settings)
    tasks = [
        solution_metrics(task.solution, task.target, task.augmented, names) for task in step.tasks
    ]
    return {
        **{name: torch.stack([task[name].float() for task in tasks]).mean() for name in names},
        **({} if step.fit.evidence is None else step.fit.evidence.metrics()),
        **({} if val_gradient_norm is None else {"val_gradient_norm": val_gradient_norm}),
        **({} if overhead is None else {"overhead_ratio": torch.tensor(overhead)}),
        "solve_seconds": torch.tensor(step.seconds),
        "skipped_steps": skipped.float(),
    }


def solution_metrics(
    solution: SAflexSolution,
    target: Tensor,
    augmented: Tensor | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    r"""Return what the solution did to the augmented rows of this process, as scalars.

    ``kept_fraction`` (weight above 0), ``relabelled_fraction`` (argmax moved away from the upstream
    label's), ``effective_fraction`` :math:`(\sum w)^2 / (n \sum w^2)` (1 for equal weights, 0 when
    all are dropped), ``target_entropy`` (nats), ``inner_product_rms``; of these the ``names``. The
    fractions of a batch without augmented rows are 1, 0 and 1.
    """
    mask = torch.ones_like(solution.weights, dtype=torch.bool) if augmented is None else augmented
    count = mask.sum().clamp(min=1)
    none = ~mask.any()
    weights = torch.where(mask, solution.weights, 0)

    def kept() -> Tensor:
        return ((weights > 0).sum() / count).masked_fill(none, 1.0)

    def relabelled() -> Tensor:
        upstream = target if target.ndim == 1 else target.argmax(-1)
        return ((solution.soft_labels.argmax(-1) != upstream) & mask).sum() / count

    def effective() -> Tensor:
        squares = weights.square().sum()
        fraction = weights.sum().square() / (count * squares).clamp(min=1e-12)
        return torch.where(squares > 0, fraction, 0).masked_fill(none, 1.0)

    def entropy() -> Tensor:
        labels = solution.soft_labels
        return torch.where(mask, -torch.xlogy(labels, labels).sum(-1), 0).sum() / count

    metrics: dict[str, Callable[[], Tensor]] = {
        "kept_fraction": kept,
        "relabelled_fraction": relabelled,
        "effective_fraction": effective,
        "target_entropy": entropy,
        "inner_product_rms": lambda: solution.inner_product_rms,
    }
    return {name: metrics[name]() for name in (metrics if names is None else names)}


def varying_metrics(settings: Settings) -> list[str]:
    """Return the names of `solution_metrics` that the settings do not make constant."""
    learns_labels = settings.label_rule != "keep"
    varies = {
        "kept_fraction": settings.weight_rule in {"expected", "sum", "positive"},
        "relabelled_fraction": learns_labels,
        "effective_fraction": settings.weight_rule != "ones" or settings.row_evidence,
        "target_entropy": learns_labels,
        "inner_product_rms": settings.solves or settings.row_evidence,
    }
    return [name for name, does in varies.items() if does]


def log_metrics(module: pl.LightningModule, step: Step, values: Mapping[str, Tensor]) -> None:
    """Log what a step learned, by names that begin with ``saflex/``; fractions are in the bar."""
    for name, value in values.items():
        module.log(
            f"saflex/{name}",
            value,
            prog_bar=name.endswith("_fraction"),
            on_step=True,
            on_epoch=False,
            batch_size=step.batch_size,
        )


def log_settings(trainer: pl.Trainer, module: Any, settings: Mapping[str, Any]) -> None:
    """Give the settings to the loggers, beside the hyperparameters that Lightning gives them.

    Of several calls a board reads the first, so the others are in it too.
    """
    owners = (trainer.datamodule, module)  # type: ignore[attr-defined]
    known: dict[str, Any] = {}
    for owner in owners:
        if owner is not None and owner._log_hyperparams:
            known.update(owner.hparams_initial)
    known.pop("_instantiator", None)  # as Lightning does
    for logger in trainer.loggers:
        logger.log_hyperparams({**known, "saflex": dict(settings)})


class Report:
    """Warn on rank zero, of each subject once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.skipped_before = 0  # steps of the run that this one resumes

    def say(self, message: str) -> None:
        """Warn, unless a message of the same subject, what comes before the comma, was said."""
        subject = message.split(",")[0]
        if subject not in self._said:
            self._said.add(subject)
            rank_zero_warn(message, category=SAflexWarning)

    def look_at(self, step: Step, trainer: pl.Trainer, batch_idx: int) -> None:
        """Warn of what a solved step shows; waits for the device."""
        fit = step.fit
        if int(fit.skipped) != self.skipped_before:
            self.say(
                "Expected finite gradients and scores, but SAFLEX met a non-finite number in the "
                f"solve at or before batch {batch_idx} of epoch {trainer.current_epoch}. Such "
                "steps are trained with weights 1 and upstream labels; this is said once. Look "
                "at the validation rows, the learning rate and the loss."
            )
        if not fit.settings.solves:
            return
        # One layer tells rows apart by their features; elsewhere it takes as many parameters.
        matched = sum(parameter.numel() for parameter in fit.matching.engine.params)
        unknowns = fit.ranks.size * step.tasks[0].solution.soft_labels.numel()
        if unknowns > matched and not fit.matching.is_partial:
            self.say(
                "Expected more matched parameters than unknowns, but there are "
                f"{matched} against {unknowns} (rows times classes). In this under-parameterised "
                "regime rows are told apart poorly; use smaller batches or match more parameters."
            )

    def say_probabilities(self, training: Sequence[Tensor]) -> None:
        """Warn where evaluation, which returned probabilities, is no evaluation of the logits."""
        if not all(map(is_probabilities, training)):
            self.say(
                "Expected the same scores in evaluation as in training, but evaluation returns "
                "probabilities and training does not. The validation gradient is then that of "
                "another loss; return logits from `saflex_scores` in both modes."
            )

    def say_same_rows(self, roles: Iterable[str]) -> None:
        """Warn that the rows that steer play other roles too."""
        for role in roles:
            self.say(
                f"Expected rows that {role} not to steer SAFLEX, but the same rows also {role}. "
                "Their score is then too good; give SAFLEX other rows with `val_dataloader` or "
                "`saflex_dataloader()`."
            )

    def say_no_loss(self, module: pl.LightningModule) -> None:
        """Warn that a refined step did not ask for the loss."""
        self.say(
            f"Expected `training_step` of {type(module).__name__} to call `self.saflex_loss(...)`, "
            "but it returned a loss without it, which is trained as it is. Return the loss that "
            "`saflex_loss` computes from the logits of `saflex_forward`."
        )

    def say_no_engine(self, settings: Settings) -> None:
        """Warn of settings that only matter where gradients are matched."""
        given = [
            f"`{name}`"
            for name in ("engine", "params")
            if getattr(settings, name) != getattr(Settings(), name)
        ]
        if given and not settings.solves:
            self.say(
                f"Expected a weight or label rule that learns from gradients beside "
                f"{' and '.join(given)}, but weight_rule='ones' and label_rule='keep' need none. "
                "The run goes on without; pass preset='gradient', or leave the setting out."
            )

    def tell_of_unions(self) -> None:
        """Tell, once, what measured better than batches of augmented rows alone."""
        if "unions" not in self._said:
            self._said.add("unions")
            rank_zero_info(
                "SAFLEX refines every row, since no mask tells the augmented ones from clean ones; "
                "union batches of both measured better, and this makes them: "
                "saflex_lightning.data.union_loader(dataset, augment, transform)."
            )

    def say_changed(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Return the settings that differ from those of a checkpoint, and warn of them."""
        missing = object()
        changed = sorted(
            name for name in {*before, *now} if before.get(name, missing) != now.get(name, missing)
        )
        if changed:
            changes = (f"`{n}` was {before.get(n)!r} and is now {now.get(n)!r}" for n in changed)
            self.say(
                "Expected the settings that the checkpoint was written with, but "
                + ", ".join(changes)
                + ". The run goes on with those of now and will not equal an uninterrupted one."
            )
        return changed
