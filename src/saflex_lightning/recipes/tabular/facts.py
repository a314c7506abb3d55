"""What is known about the tabular sets of the paper before a file is read."""

from dataclasses import dataclass
from typing import Literal

from saflex_lightning.recipes.tabular.csv_file import Roles

__all__ = ["SETS", "Facts", "SetName"]

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
