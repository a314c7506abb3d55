"""The tabular sets of the paper by name: where a file is looked for, and how it is checked."""

from importlib import resources
from pathlib import Path

import numpy as np

from saflex_lightning.recipes.tabular.csv_file import Roles, read_csv
from saflex_lightning.recipes.tabular.facts import SETS, Facts, SetName
from saflex_lightning.recipes.tabular.npz_file import read_npz
from saflex_lightning.recipes.tabular.table import Table, drop_duplicates

__all__ = ["check_set_name", "make_rare", "read_table"]

# Credit's share of positives (492 of 284,807), for its stand-in.
RARE_SHARE = 492 / 284_807


def read_table(
    dataset: SetName | None, path: str | None = None, *, roles: Roles | None = None
) -> Table:
    """Return a set by name, checked against what is known about it, or any file.

    Args:
        dataset: A key of `SETS`; None reads ``path`` without such a check.
        path: The file (``.npz`` or ``.csv``), or a folder to look for it; None reads what ships
            with the package.
        roles: Roles of the columns of a CSV file; None takes the set's own.

    Raises:
        ValueError: If the name is unknown, no file is named, a CSV file has no roles, or the table
            is not the one of that name.

    Example:
        >>> read_table("qsar").class_counts
        (699, 356)
    """
    check_set_name(dataset, path)
    if dataset is None:
        return _read_file(_existing(Path(str(path)).expanduser()), roles)
    facts = SETS[dataset]
    file = _find_file(dataset, facts, path)
    table = _read_file(file, roles or facts.roles)
    if dataset == "kdd99_rare":
        table = make_rare(table)
    _check_facts(dataset, facts, table, file)
    return table


def check_set_name(dataset: object, path: object) -> None:
    """Refuse a set that is none of the paper's, and a set of one's own without a file."""
    if dataset is None and path is None:
        raise ValueError(
            "Expected `path` to name a .npz or .csv file where `dataset` is None, but got None. "
            f"Pass a file, or one of the names {sorted(SETS)}."
        )
    if dataset is not None and (not isinstance(dataset, str) or dataset not in SETS):
        raise ValueError(
            f"Expected `dataset` to be one of {sorted(SETS)} or None, but got {dataset!r}. Pass "
            "None with `path` to read a set of your own."
        )


def make_rare(table: Table) -> Table:
    """Return all distinct normal rows of KDD Cup 1999 and so few attacks as Credit has frauds.

    Args:
        table: The 10 % file; class ``attack`` is thinned out and becomes label 1.

    Raises:
        ValueError: If the classes are not ``attack`` and ``normal``.
    """
    if set(table.classes) != {"attack", "normal"}:
        raise ValueError(
            f"Expected the classes ['attack', 'normal'] of KDD Cup 1999, but got "
            f"{sorted(table.classes)}. Label every kind of attack as 'attack'."
        )
    table = drop_duplicates(table)
    is_attack = table.target == table.classes.index("attack")
    wanted = round(RARE_SHARE / (1 - RARE_SHARE) * int((~is_attack).sum()))
    attacks = np.flatnonzero(is_attack)
    attacks = np.random.default_rng(0).choice(attacks, min(wanted, len(attacks)), replace=False)
    rare = table.take(np.sort(np.concatenate([np.flatnonzero(~is_attack), attacks])))
    target = (rare.target == table.classes.index("attack")).astype(np.int64)
    return rare._replace(target=target, classes=("normal", "attack"))


def _find_file(name: str, facts: Facts, path: str | None) -> Path:
    if path is None:
        # A wheel is unpacked when it is installed, so the folder is a real one.
        place = Path(str(resources.files("saflex_lightning.recipes") / "assets"))
    else:
        place = Path(path).expanduser()
        if place.is_file():
            return place
    names = [f"{stem}{ending}" for stem in facts.stems for ending in (".npz", ".csv")]
    for candidate in names:
        if (place / candidate).is_file():
            return place / candidate
    raise FileNotFoundError(
        f"Expected a file of the set '{name}', but there is none of {names} in {place}. Set `path` "
        f"to the file or to its folder; the paper got the set from {facts.source}."
    )


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected `path` to name a .npz or .csv file, but there is no file at {file}. "
            "Correct `path`."
        )
    return file


def _read_file(file: Path, roles: Roles | None) -> Table:
    if file.suffix.lower() == ".npz":
        return read_npz(file)
    if file.suffix.lower() != ".csv":
        raise ValueError(
            f"Expected a file that ends in .npz or .csv, but got {file}. Convert it to one of them."
        )
    if roles is None:
        raise ValueError(
            f"Expected the roles of the columns of {file}, but `target` is None. Pass the name of "
            "the label's column as `target`, and those of the columns of levels as `categorical`."
        )
    return read_csv(file, roles)


def _check_facts(name: str, facts: Facts, table: Table, file: Path) -> None:
    found = {
        "rows": len(table.target),
        "numeric columns": table.numeric.shape[1],
        "categorical columns": table.categorical.shape[1],
        "classes": len(table.classes),
        "rows per class": tuple(sorted(table.class_counts)),
    }
    expected = {
        "rows": facts.rows,
        "numeric columns": facts.numeric,
        "categorical columns": facts.categorical,
        "classes": facts.classes,
        "rows per class": facts.class_counts or found["rows per class"],
    }
    if differing := [what for what in found if found[what] != expected[what]]:
        listed = ", ".join(f"{expected[what]} {what}" for what in differing)
        instead = ", ".join(str(found[what]) for what in differing)
        raise ValueError(
            f"Expected the set '{name}' to have {listed}, but {file} has {instead}. "
            f"{facts.note or 'These are the numbers of the Table 5 of the paper.'} Read another "
            "file, correct the roles of its columns, or pass `dataset`=None to read it as it is."
        )
