"""Every argument of everything public, given what it cannot be: refused in words, or it works."""

import inspect
import math
import re
import shutil
from dataclasses import asdict
from functools import cache
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from helpers.clip import TINY
from helpers.folders import make_image_folders, make_pool
from helpers.standins import write_iwildcam, write_medmnist
from helpers.tables import make_table, write_csv
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.transforms import v2

import saflex_lightning
from saflex_lightning import AugmentedBatch, SAflexCallback, data, recipes
from saflex_lightning.data.resumable import EpochSampler
from saflex_lightning.functional import Settings
from saflex_lightning.recipes import contrastive, diffusion, tabular
from saflex_lightning.recipes.augment import _TRANSFORMS, AugmentationName
from saflex_lightning.recipes.diffusion import fill_pool_by_diffusion
from saflex_lightning.recipes.medmnist_folders import write_medmnist_folders
from saflex_lightning.recipes.soft_crop import SoftCrop
from saflex_lightning.recipes.tabular.batches import CutMix
from saflex_lightning.recipes.vae import ConditionalVAE, fill_pool_by_vae

WRONG = [None, True, -1, 0, 1.5, math.nan, math.inf, -math.inf, "abc", "", b"x", [], {}, [None]]
NOTHING = object()  # what no argument takes
WRONG += [NOTHING, len, torch.ones(2)]
ROWS = [(torch.ones(3, 8, 8, dtype=torch.uint8), row % 2) for row in range(4)]


def paint(prompt, **settings):
    """What stands in for a pipeline of diffusion models."""
    return SimpleNamespace(images=[Image.new("RGB", (8, 8)) for _ in prompt])


@cache
def encoders():  # whose vocabulary takes a while to read
    return contrastive.OpenClipEncoders(config=TINY)


def read_batches(module):
    """Read files and make a batch of each loader, as a fit would; by then nothing may be wrong."""
    module.setup("fit")
    loaders = [module.train_dataloader(), module.saflex_dataloader(), module.test_dataloader()]
    try:
        for loader in loaders:
            next(iter(loader if not isinstance(loader, list) else loader[0]))
    except Exception as error:
        raise AssertionError(f"a worker would find out: {error}") from error


def score_images(network):
    return network.eval()(torch.zeros(2, 3, 28, 28))


def train_epoch(module):
    module.build({"num_classes": 2, "in_channels": 3})
    module.setup("test")
    module.network(torch.zeros(2, 3, 28, 28))


# Name -> what makes it, arguments that do, and what it is for.
CASES = {
    "SAflexCallback": (
        SAflexCallback,
        {"val_dataloader": [(torch.ones(2, 3), torch.tensor([0, 1]))], **asdict(Settings())},
        None,
    ),
    "read_row_weights": (
        data.read_row_weights,
        {"file": "rows.csv", "num_rows": 4, "first_index": 0, "labels": torch.zeros(4).long()},
        None,
    ),
    "SAflexInsight": (
        saflex_lightning.SAflexInsight,
        {"folder": "here", "class_names": ["cat", "dog"]},
        None,
    ),
    "with_index": (data.with_index, {"dataset": [(torch.ones(3), 0)]}, None),
    "AugmentedBatch": (
        AugmentedBatch,
        {
            "inputs": torch.ones(2, 3),
            "target": torch.tensor([0, 1]),
            "augmented": torch.tensor([False, True]),
            "group": torch.tensor([0, 1]),
            "index": torch.tensor([0, 1]),
        },
        None,
    ),
    "MedMNISTDataModule": (
        recipes.MedMNISTDataModule,
        {"path": "bloodmnist.npz", "batch_size": 4, "augmentation": "none"},
        read_batches,
    ),
    "GeneratedDataModule": (
        recipes.GeneratedDataModule,
        {"root": "real", "generated": "pool", "image_size": 8, "batch_size": 4},
        read_batches,
    ),
    "TabularDataModule": (
        recipes.TabularDataModule,
        {
            "dataset": None,
            "path": "table.csv",
            "target": "answer",
            "categorical": ["colour", "size"],
            "deduplicate": False,
            "batch_size": 4,
        },
        read_batches,
    ),
    "IWildCamDataModule": (
        contrastive.IWildCamDataModule,
        {"root": "iwildcam", "image_size": 28, "batch_size": 4, "augmentation": "none"},
        read_batches,
    ),
    "Classifier": (recipes.Classifier, {"network": recipes.SmallCNN}, train_epoch),
    "ResNet18": (recipes.ResNet18, {"num_classes": 2, "in_channels": 3}, score_images),
    "ResNet50": (recipes.ResNet50, {"num_classes": 2}, None),
    "SmallCNN": (recipes.SmallCNN, {"num_classes": 2, "in_channels": 3}, score_images),
    "SAINT": (
        recipes.SAINT,
        {"num_numeric": 2, "num_classes": 2, "cardinalities": [3]},
        None,
    ),
    "TabularMLP": (
        recipes.TabularMLP,
        {"num_numeric": 2, "num_classes": 2, "cardinalities": [3]},
        None,
    ),
    "ContrastiveTuner": (
        contrastive.ContrastiveTuner,
        {"encoders": encoders, "class_names": ["cat", "dog"]},
        None,
    ),
    "TowerClassifier": (
        contrastive.TowerClassifier,
        {"encoders": encoders, "num_classes": 2},
        None,
    ),
    "ImageTower": (contrastive.ImageTower, {"encoders": encoders, "num_classes": 2}, score_images),
    "OpenClipEncoders": (
        contrastive.OpenClipEncoders,
        {"architecture": "none", "config": TINY},
        None,
    ),
    "FitHeadFirst": (contrastive.FitHeadFirst, {}, None),
    "MacroF1": (contrastive.MacroF1, {"num_classes": 2}, None),
    "WeightEnsembling": (contrastive.WeightEnsembling, {}, None),
    "fit_linear_probe": (
        contrastive.fit_linear_probe,
        {"features": torch.rand(4, 2), "target": torch.tensor([0, 1, 0, 1]), "num_classes": 2},
        None,
    ),
    "SoftCrop": (SoftCrop, {"num_classes": 2}, lambda crop: crop(*ROWS[0])),
    "CutMix": (CutMix, {}, None),
    "ConditionalVAE": (ConditionalVAE, {"num_classes": 2, "size": 8}, None),
    "UnionDataset": (
        data.UnionDataset,
        {"dataset": ROWS, "augment": torch.fliplr},
        lambda rows: rows.collate([rows[0], rows[1]]),
    ),
    "union_loader": (
        data.union_loader,
        {"dataset": ROWS, "augment": torch.fliplr, "num_workers": 0},
        lambda loader: next(iter(loader)),
    ),
    "union_batch": (
        data.union_batch,
        {"inputs": torch.ones(2, 3), "target": torch.tensor([0, 1]), "augment": torch.neg},
        None,
    ),
    "group_names_of": (data.group_names_of, {"augment": torch.fliplr}, None),
    "ResumableLoader": (
        data.ResumableLoader,
        {"dataset": ROWS, "batch_size": 2, "sampler": EpochSampler(ROWS)},
        None,
    ),
    "TagOperations": (data.TagOperations, {"transform": v2.RandAugment()}, None),
    "fill_pool_by_vae": (fill_pool_by_vae, {"train": "real/train", "output": "out"}, None),
    "fill_pool_by_diffusion": (
        fill_pool_by_diffusion,
        {
            "kind": "img2img",
            "model": "nowhere",
            "train": "real/train",
            "output": "out",
            "prompts": ["rain"],
        },
        None,
    ),
    "write_medmnist_folders": (
        write_medmnist_folders,
        {"output": "out", "path": "bloodmnist.npz"},
        None,
    ),
}
TAKEN_AS_IT_IS = {("AugmentedBatch", "inputs")}
KINDS = (TypeError, ValueError, OSError, MisconfigurationException)
# Public names that are no constructors of a user's.
OTHERS = {
    "ImageTextEncoders",  # a protocol
    "SAflexMixin",
    "SAflexSolution",
    "SAflexWarning",
    "UnsupportedModelError",
    "gather_rows",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("arguments")
    make_image_folders(root / "real", splits=("val", "test", "extra"))
    make_pool(root / "pool")
    write_csv(root / "table.csv", make_table(120))
    (root / "rows.csv").write_text("index,mean_weight\n2,0.5\n")
    write_medmnist(root, "blood")
    (root / "iwildcam").mkdir()
    write_iwildcam(root / "iwildcam")
    return root


def arguments_of(make):
    """Names of all arguments; those that a class hands on to the one above it too."""
    found = dict(inspect.signature(make).parameters)
    above = inspect.getmro(make)[1:] if isinstance(make, type) else ()
    for kind in [each for each in above if each.__module__.startswith("saflex_lightning")]:
        if not any(each.kind is each.VAR_KEYWORD for each in found.values()):
            break
        found = {name: each for name, each in found.items() if each.kind is not each.VAR_KEYWORD}
        found |= inspect.signature(kind).parameters
    return [name for name, each in found.items() if each.kind is not each.VAR_KEYWORD]


def is_ours(error, argument):
    """Say whether it tells what was expected, of which argument, and what to do."""
    text = str(error)
    is_named = re.search(rf"`(\w+\.)?{argument}[`.\[]|'{argument}'", text)
    in_words = text.startswith("Expected ") and is_named and text.endswith(".")
    return in_words and isinstance(error, KINDS)


def test_everything_public_is_among_the_cases():
    for module in (saflex_lightning, data, recipes, contrastive, tabular):
        assert set(module.__all__) <= CASES.keys() | OTHERS, module
    for make in (CASES[name][0] for name in CASES if name.endswith("DataModule")):
        assert {"num_workers", "steering_fraction", "augmentation_settings"} < {*arguments_of(make)}


@pytest.mark.filterwarnings("ignore:Expected as many generated images")
@pytest.mark.parametrize("name", CASES)
def test_what_an_argument_cannot_be_is_refused_in_words(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(diffusion, "_load", lambda *settings: paint)
    make, right, use = CASES[name]
    odd, taken = [], []

    def attempt(**given):
        shutil.rmtree("abc", ignore_errors=True)  # what `output`="abc" has made
        made = make(**{k: v() if v is encoders else v for k, v in given.items()})
        if use is not None:
            use(made)

    attempt(**right)
    for argument in sorted({*arguments_of(make), *right}):
        for value in WRONG:
            try:
                attempt(**right | {argument: value})
                if value is NOTHING and (name, argument) not in TAKEN_AS_IT_IS:
                    taken.append(argument)
            except Exception as error:  # whatever it is, it must be ours
                if not is_ours(error, argument):
                    odd.append(f"{argument}={value!r}: {type(error).__name__}: {error}")
    assert not odd, "\n".join(odd)
    assert not taken


@pytest.mark.parametrize("augmentation", get_args(AugmentationName))
def test_what_a_setting_of_an_augmentation_cannot_be_is_refused(folder, monkeypatch, augmentation):
    monkeypatch.chdir(folder)
    right = {"size": 28} if augmentation == "crop" else {}
    transform = _TRANSFORMS.get(augmentation, lambda strength: None)
    odd = []
    for setting in sorted({*inspect.signature(transform).parameters, "strength"}):
        for value in WRONG:
            settings = right | {setting: value}
            try:
                read_batches(
                    recipes.MedMNISTDataModule(
                        path="bloodmnist.npz",
                        batch_size=4,
                        augmentation=augmentation,
                        augmentation_settings=settings,
                    )
                )
            except Exception as error:  # whatever it is, it must be ours
                if not is_ours(error, setting):
                    odd.append(f"{setting}={value!r}: {type(error).__name__}: {error}")
    assert not odd, "\n".join(odd)
