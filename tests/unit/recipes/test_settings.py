"""Settings of wrong type or range are refused by every datamodule, in words, before it reads."""

import pytest

from saflex_lightning.recipes import GeneratedDataModule, MedMNISTDataModule, TabularDataModule
from saflex_lightning.recipes.contrastive import IWildCamDataModule

NAN, INFINITE = float("nan"), float("inf")
MODULES = {
    "medmnist": lambda **settings: MedMNISTDataModule(**{"path": "nowhere.npz", **settings}),
    "generated": lambda **settings: GeneratedDataModule(
        **{"root": "nowhere", "generated": "nowhere", **settings}
    ),
    "tabular": lambda **settings: TabularDataModule(
        **{"dataset": None, "path": "nowhere.csv", **settings}
    ),
    "iwildcam": lambda **settings: IWildCamDataModule(**{"root": "nowhere", **settings}),
}
SHARED = [
    ("batch_size", "a positive integer", [True, 0, -1, 2.0, "4", NAN, None, [4]]),
    ("eval_batch_size", "a positive integer", [False, -1, "256"]),
    ("seed", "a non-negative integer", [True, -1, 0.5, "1", None]),
    ("num_workers", "a non-negative integer", [True, -1, "2", NAN]),
    ("steering_fraction", "a number between 0 and 1", [True, 0.0, 1, -0.2, NAN, "0.2", None]),
    ("merge_val", "True or False", [1, "yes", None]),
    ("row_weights", "a path", [3, True]),
    ("batch", "one of", ["both", 3, None, ["union"]]),
    ("steering", "one of", ["late", True, ["val"]]),
    ("augmentation", "one of", ["blur", None, 1, ["none"]]),
    ("augmentation_settings", "a mapping", ["strength", [1], {3: 4}]),
]
OWN = {
    "medmnist": [
        ("dataset", "one of", ["chest", None, 3]),
        ("path", "a path", [3]),
        ("download", "True or False", ["no"]),
        ("check_md5", "True or False", [0]),
        ("num_classes", "a positive integer or None", [0, True, "8", 8.0]),
        ("in_channels", "a positive integer or None", [-3, "3"]),
    ],
    "generated": [
        ("root", "a path", [3]),
        ("image_size", "a positive integer or None", [0, "224", 224.0, True]),
        ("has_sources", "True or False", ["false"]),
        ("group_by", "one of", ["folder"]),
        ("per_class", "one of", ["few", 3]),
        ("generated_per_real", "a positive number", [0, NAN, INFINITE, "1", True]),
        ("redraw", "True or False", [1]),
        ("label_noise", r"a number in \[0, 1\)", [1.0, -0.1, NAN, "0.4", True]),
        ("drop_wrong", "True or False", [None]),
    ],
    "tabular": [
        ("dataset", "one of", ["adult", 3, ["qsar"]]),
        ("target", "a name", [True, 1.5, ""]),
        ("categorical", "a list of names", ["colour", [1.5], [True]]),
        ("numeric", "a list of names", ["height"]),
        ("num_numeric", "a non-negative integer or None", [-1, "2", True]),
        ("cardinalities", "a list of positive integers", ["5", 5, [5, True], [5, 0]]),
        ("deduplicate", "True or False", [1]),
        ("stratified", "True or False", ["yes"]),
    ],
    "iwildcam": [("image_size", "a positive integer", [0, None, "224"])],
}


@pytest.mark.parametrize(
    ("kind", "setting", "wanted", "value"),
    [
        (kind, setting, wanted, value)
        for kind in MODULES
        for setting, wanted, values in (*SHARED, *OWN[kind])
        for value in values
    ],
)
def test_a_wrong_setting_is_refused(kind, setting, wanted, value):
    with pytest.raises((TypeError, ValueError), match=f"^Expected `{setting}.*{wanted}.*, but got"):
        MODULES[kind](**{setting: value})
