"""The tabular sets of the paper by name: where a file is looked for, and what must be in it."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from saflex_lightning.recipes.tabular.csv_file import Roles, read_csv
from saflex_lightning.recipes.tabular.npz_file import read_npz
from saflex_lightning.recipes.tabular.table import Table, drop_duplicates, take_rows

__all__ = ["SETS", "Facts", "SetName", "read_table"]

SetName = Literal[
    "appetency",
    "arrhythmia",
    "click",
    "credit",
    "kdd99_rare",
    "letter",
    "qsar",
    "shrutime",
    "volkert",
]

# Credit's share of positives (492 of 284,807), for its stand-in.
RARE_SHARE = 492 / 284_807


@dataclass(frozen=True)
class Facts:
    """What is known about a set before its file is read.

    Attributes:
        rows: Number of rows.
        numeric: Number of numeric columns.
        categorical: Number of categorical columns.
        classes: Number of classes.
        class_counts: Rows of each class, in ascending order; None where the paper has none.
        source: Where the paper got it (Ding et al. 2024, Table 6), or where it comes from.
        stems: File names to look for, without ``.npz`` or ``.csv``.
        roles: Roles of the columns of the usual CSV file; None where they must be given.
        note: How the set differs from the paper's Table 5; empty where it does not.
    """

    rows: int
    numeric: int
    categorical: int
    classes: int
    class_counts: tuple[int, ...] | None
    source: str
    stems: tuple[str, ...]
    roles: Roles | None = None
    note: str = ""


_KDD99 = "http://kdd.ics.uci.edu/databases/kddcup99 (the 10 % file of KDD Cup 1999)"
_CREDIT_COLUMNS = (*(f"V{number}" for number in range(1, 29)), "Amount")
_CHURN_NUMBERS = (
    "CreditScore",
    "Age",
    "Tenure",
    "Balance",
    "NumOfProducts",
    "HasCrCard",
    "IsActiveMember",
    "EstimatedSalary",
)

SETS: dict[str, Facts] = {
    "appetency": Facts(
        rows=494_021,
        numeric=36,
        categorical=3,
        classes=2,
        class_counts=(97_278, 396_743),
        source=_KDD99,
        stems=("appetency", "appetency_kdd99_10pct"),
        note="Named Appetency in the paper; its link and its counts are those of KDD Cup 1999.",
    ),
    "arrhythmia": Facts(
        rows=452,
        numeric=274,
        categorical=0,
        classes=2,
        class_counts=(66, 386),
        source="http://odds.cs.stonybrook.edu/arrhythmia-dataset/",
        stems=("arrhythmia",),
        note="274 columns, the complete ones of the UCI file; Table 5 says 226.",
    ),
    "click": Facts(
        rows=39_948,
        numeric=5,
        categorical=7,
        classes=2,
        class_counts=(6_728, 33_220),
        source="https://kdd.org/kdd-cup/view/kdd-cup-2012-track-2",
        stems=("click",),
    ),
    "credit": Facts(
        rows=284_807,
        numeric=29,
        categorical=0,
        classes=2,
        class_counts=(492, 284_315),
        source="https://www.kaggle.com/jacklizhi/creditcard",
        stems=("credit", "creditcard"),
        roles=Roles("Class", numeric=_CREDIT_COLUMNS),
    ),
    "kdd99_rare": Facts(
        rows=87_984,
        numeric=36,
        categorical=3,
        classes=2,
        class_counts=(152, 87_832),
        source=_KDD99,
        stems=("appetency", "appetency_kdd99_10pct"),
        note="Stands in for credit: every distinct normal row of KDD Cup 1999 and 0.17 % attacks.",
    ),
    "letter": Facts(
        rows=20_000,
        numeric=16,
        categorical=0,
        classes=26,
        class_counts=None,
        source="https://archive.ics.uci.edu/dataset/59/letter+recognition",
        stems=("letter", "standin_letter"),
        note="Stands in for volkert: 26 letters.",
    ),
    "qsar": Facts(
        rows=1_055,
        numeric=41,
        categorical=0,
        classes=2,
        class_counts=(356, 699),
        source="https://archive.ics.uci.edu/ml/datasets/QSAR+biodegradation",
        stems=("qsar",),
    ),
    "shrutime": Facts(
        rows=10_000,
        numeric=8,
        categorical=3,
        classes=2,
        class_counts=(2_037, 7_963),
        source="https://www.kaggle.com/shrutimechlearn/churn-modelling",
        stems=("shrutime", "Churn_Modelling"),
        roles=Roles("Exited", ("Surname", "Geography", "Gender"), _CHURN_NUMBERS),
    ),
    "volkert": Facts(
        rows=58_310,
        numeric=147,
        categorical=0,
        classes=10,
        class_counts=None,
        source="http://automl.chalearn.org/data",
        stems=("volkert",),
    ),
}


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
    if dataset is None:
        if path is None:
            raise ValueError(
                "Expected `path` to name a .npz or .csv file where `dataset` is None, but got "
                f"None. Pass a file, or one of the names {sorted(SETS)}."
            )
        return _read_file(_existing(Path(path).expanduser()), roles)
    if dataset not in SETS:
        raise ValueError(
            f"Expected `dataset` to be one of {sorted(SETS)} or None, but got "
            f"{dataset!r}. Pass None with `path` to read a set of your own."
        )
    facts = SETS[dataset]
    file = _find_file(dataset, facts, path)
    table = _read_file(file, roles or facts.roles)
    if dataset == "kdd99_rare":
        table = make_rare(table)
    _check_facts(dataset, facts, table, file)
    return table


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
    rare = take_rows(table, np.sort(np.concatenate([np.flatnonzero(~is_attack), attacks])))
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
