"""What was collected, in numbers and words that people read."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from saflex_lightning.evidence.evidence import GroupEvidence
from saflex_lightning.evidence.groups import FEWEST_STEPS, STANDARD_ERRORS

from .collect import GroupCounts, RowTable

__all__ = [
    "ClassSummary",
    "GroupSummary",
    "Names",
    "RowSummary",
    "make_groups_table",
    "summarize_classes",
    "summarize_groups",
    "summarize_rows",
    "verdict",
]


class Names(NamedTuple):
    """Names of groups and classes; a number stands where there is none."""

    groups: Sequence[str] = ()
    classes: Sequence[str] = ()

    def group(self, number: int) -> str:
        """Return the name of a group."""
        if number < len(self.groups):
            return self.groups[number]
        return "augmented" if number == 1 and not self.groups else f"group {number}"

    def label(self, number: int) -> str:
        """Return the name of a class; nothing where there is no label."""
        if number < 0:
            return ""
        return self.classes[number] if number < len(self.classes) else str(number)


class GroupSummary(NamedTuple):
    """One group of augmented rows over the whole fit; the last three of its newest steps.

    In means and shares an epoch counts twice as much as the one before.
    """

    group: int
    name: str
    rows: int  # that were shown, each visit counting
    mean_weight: float
    mean_belief: float | None  # posterior of the label
    doubted: float | None  # share whose suggested label is another one
    wrong_labels: float | None  # estimated share
    evidence: float | None  # positive where the group lowers the validation loss
    standard_error: float | None
    verdict: str


class ClassSummary(NamedTuple):
    """The rows of one class in one group over the whole fit."""

    group: str
    given: str
    rows: int
    mean_weight: float
    mean_belief: float | None
    doubted: float | None


class RowSummary(NamedTuple):
    """One row, by the index that the data gave it."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  tuple.index is not used
    given: str
    suggested: str
    belief: float | None
    mean_weight: float  # over its visits, the newest counting most
    visits: int
    group: str


def verdict(mean: float, error: float, *, steps: float = 50.0) -> str:
    """Return what a group does, in words, where its evidence is beyond three standard errors.

    Example:
        >>> verdict(0.3, 0.05), verdict(0.1, 0.05), verdict(-0.2, 0.05)
        ('helps', 'no difference within error', 'harms')
    """
    if not steps:
        return "not judged"
    if steps <= FEWEST_STEPS:
        return "too few steps"
    if abs(mean) <= STANDARD_ERRORS * error:
        return "no difference within error"
    return "helps" if mean > 0 else "harms"


def summarize_groups(
    counts: GroupCounts, evidence: GroupEvidence | None, names: Names
) -> list[GroupSummary]:
    """Return every group that was shown, those that did most harm first."""
    found = [
        GroupSummary(
            number,
            names.group(number),
            *_shares(counts, number, slice(None)),
            *_judged(evidence, number),
        )
        for number in range(len(counts.rows))
        if counts.rows[number].any()
    ]
    return sorted(found, key=lambda group: (group.evidence or 0.0, group.group))


def summarize_classes(counts: GroupCounts, names: Names) -> list[ClassSummary]:
    """Return every class in every group that was shown."""
    return [
        ClassSummary(names.group(group), names.label(label), *_shares(counts, group, label))
        for group, label in zip(*(place.tolist() for place in counts.rows.nonzero()), strict=True)
    ]


def summarize_rows(table: RowTable, names: Names) -> Iterator[RowSummary]:
    """Yield every row, the most doubted ones first."""
    label, suggested, group = (table.facts[name] for name in ("label", "suggested", "group"))
    weights = table.weights
    for row in table.beliefs.argsort(kind="stable"):  # NaN comes last
        belief = float(table.beliefs[row])
        yield RowSummary(
            int(table.index[row]),
            names.label(int(label[row])),
            names.label(int(suggested[row])),
            belief if belief == belief else None,
            float(weights[row]),
            int(table.visits[row]),
            names.group(int(group[row])),
        )


def make_groups_table(groups: Sequence[GroupSummary]) -> Table:
    """Return the table that ends a fit."""
    columns = ("group", "rows", "weight", "doubted", "wrong labels", "evidence", "verdict")
    table = Table(*columns, title="What SAFLEX made of the groups", box=box.SIMPLE)
    for group in groups:
        evidence = "-"
        if group.evidence is not None and group.standard_error is not None:
            evidence = f"{group.evidence:+.3f} ± {group.standard_error:.3f}"
        table.add_row(
            Text(group.name),  # `Text` is printed as it is: a name in brackets is no markup
            str(group.rows),
            f"{group.mean_weight:.2f}",
            "-" if group.doubted is None else f"{group.doubted:.0%}",
            "-" if group.wrong_labels is None else f"{group.wrong_labels:.0%}",
            evidence,
            group.verdict.removesuffix(" within error"),
        )
    return table


def _shares(
    counts: GroupCounts, group: int, label: int | slice
) -> tuple[int, float, float | None, float | None]:
    rows, shown, weight, judged, doubted, belief = (
        float(sums[group, label].sum()) for sums in counts.sums
    )
    # Without evidence a label may be suggested, but nothing is believed.
    mean_belief = belief / judged if judged and belief == belief else None
    return int(rows), weight / shown, mean_belief, doubted / judged if judged else None


def _judged(
    evidence: GroupEvidence | None, number: int
) -> tuple[float | None, float | None, float | None, str]:
    if evidence is None:
        return None, None, None, verdict(0.0, 0.0, steps=0)
    _, *parts = evidence
    wrong, mean, error, steps = (float(part[number]) for part in parts)
    if not steps:  # groups are judged beside clean rows
        return wrong, None, None, verdict(0.0, 0.0, steps=0)
    return wrong, mean, error, verdict(mean, error, steps=steps)
