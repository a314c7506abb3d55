"""What a fit gathers over its steps: about groups of augmented rows, and about rows of a pool."""

from dataclasses import dataclass
from typing import Any

from .gating import Gates
from .pool import PoolRows, RowEvidenceName
from .watch import FeatureWatch

__all__ = ["Gathered", "make_gathered"]


@dataclass(frozen=True)
class Gathered:
    """The parts that are switched on.

    Attributes:
        watch: Sees features, for the other two; None where neither needs them.
        gates: Let fewer rows of harmful groups through.
        pool: Weighs the rows of a fixed pool.
    """

    watch: FeatureWatch | None = None
    gates: Gates | None = None
    pool: PoolRows | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, equal on every rank.

        Returns:
            A dictionary for `load_state_dict`, with None for what is off.
        """
        return {
            "bank": self.watch and self.watch.bank.state_dict(),
            "gates": self.gates and self.gates.state_dict(),
            "pool": self.pool and self.pool.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; what was off then starts afresh.

        Args:
            state: The dictionary.
        """
        if self.watch is not None and state["bank"] is not None:
            self.watch.bank.load_state_dict(state["bank"])
        if self.gates is not None and state["gates"] is not None:
            self.gates.load_state_dict(state["gates"])
        if self.pool is not None and state["pool"] is not None:
            self.pool.load_state_dict(state["pool"])


def make_gathered(*, gates: bool, row_evidence: RowEvidenceName | None) -> Gathered:
    """Return the parts that settings of the callback switch on.

    Args:
        gates: Whether to gather evidence by group.
        row_evidence: What to gather about each row of a pool; None gathers nothing.

    Returns:
        The parts.
    """
    wanted_by = "`gates=True`" if gates else "`row_evidence='discriminant'`"
    watch = FeatureWatch(wanted_by) if gates or row_evidence == "discriminant" else None
    return Gathered(
        watch,
        Gates(watch) if gates and watch is not None else None,
        None if row_evidence is None else PoolRows(watch, row_evidence),
    )
