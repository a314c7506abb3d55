"""Models that the data tell their sizes: every way to name a network, and where nobody tells."""

from functools import partial

import lightning as L
import pytest
import torch
from helpers.standins import write_medmnist
from helpers.training import assert_same_state, make_trainer, state_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from saflex_lightning.recipes import (
    Classifier,
    MedMNISTDataModule,
    SmallCNN,
    TabularDataModule,
    TabularMLP,
)

CLASS = "saflex_lightning.recipes.SmallCNN"
NETWORKS = {
    "class": (SmallCNN, 32),
    "partial": (partial(SmallCNN, width=4), 4),
    "import path": (CLASS, 32),
    "mapping": ({"class": CLASS, "width": 4}, 4),
    "ready": (SmallCNN(4, 1, width=4), 4),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """OCT: four classes of grey images."""
    folder = tmp_path_factory.mktemp("oct")
    write_medmnist(folder, "oct")
    made = MedMNISTDataModule("oct", root=str(folder), check_md5=False, batch_size=8)
    made.setup("fit")
    return made


def shortly(**settings):
    limits = dict.fromkeys((f"limit_{stage}_batches" for stage in ("train", "val", "test")), 1)
    return make_trainer(max_epochs=1, num_sanity_val_steps=0, **limits, **settings)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_is_built_for_the_data_trained_and_loaded(data, kind, tmp_path):
    network, width = NETWORKS[kind]
    model = Classifier(network)
    trainer = shortly()
    trainer.fit(model, datamodule=data)
    assert model.built_for == {"num_classes": 4, "in_channels": 1}
    assert model.network[0][0].weight.shape == (width, 1, 3, 3)
    assert model.network[1].weight.shape == (4, 4 * width)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    # Named networks are made again from the file alone; others must be given again.
    given = {} if kind in {"import path", "mapping"} else {"network": network}
    loaded = Classifier.load_from_checkpoint(tmp_path / "model.ckpt", **given)
    assert_same_state(state_of(loaded), state_of(model))
    assert loaded.num_classes == 4
    tested = Classifier(network)
    shortly().test(tested, datamodule=data, ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert_same_state(state_of(tested), state_of(model))


def test_a_checkpoint_holds_nothing_but_what_torch_loads_without_running_code(data, tmp_path):
    trainer = shortly()
    trainer.fit(Classifier({"class": CLASS, "width": 4}), datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    state = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert state["hyper_parameters"]["network"] == {"class": CLASS, "width": 4}


def test_a_state_builds_a_model_that_is_not_built(data):
    model, other = Classifier(SmallCNN), Classifier(SmallCNN)
    model.build(data.sizes())
    other.load_state_dict(model.state_dict())  # as a spawned process sends it back
    assert_same_state(state_of(other), state_of(model))


@pytest.mark.parametrize("extra", [None, torch.zeros(3), torch.tensor([91, 93])])  # "[]"
def test_a_state_without_sizes_is_refused(extra, data):
    model, other = Classifier(SmallCNN), Classifier(SmallCNN)
    model.build(data.sizes())
    with pytest.raises((TypeError, ValueError), match=r"Expected (the sizes that|`sizes`)"):
        other.load_state_dict({**model.state_dict(), "_extra_state": extra})
    assert other.built_for is None


def test_weights_are_drawn_as_by_the_class_itself(data):
    torch.manual_seed(3)
    model = Classifier(SmallCNN)
    model.build(data.sizes())
    torch.manual_seed(3)
    for one, other in zip(model.network.parameters(), SmallCNN(4, 1).parameters(), strict=True):
        assert one.equal(other)


def test_columns_levels_and_classes_of_a_table():
    data = TabularDataModule("qsar", batch_size=64)
    model = Classifier(TabularMLP)
    shortly().fit(model, datamodule=data)
    assert model.built_for == {"num_numeric": 41, "cardinalities": [], "num_classes": 2}


def test_a_function_that_returns_no_network(data):
    with pytest.raises(TypeError, match="Expected <lambda> to return a network, but got list"):
        Classifier(lambda num_classes: [num_classes]).build(data.sizes())


def no_such_class(*_):
    raise AssertionError("was called by its name")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"class": CLASS, "depth": 3}, r"settings of SmallCNN .* but got \['depth'\]"),
        (partial(SmallCNN, depth=3), r"settings of SmallCNN .* but got \['depth'\]"),
        ({"width": 3}, "`class` of `network` to be the import path .* but got None"),
        ("SmallCNN", "import path of a class of networks, but got 'SmallCNN'"),
        ("nowhere.SmallCNN", "import path of a class of networks, but got 'nowhere.SmallCNN'"),
        (f"{__name__}.no_such_class", "import path of a class of networks, but got"),
        ("os.system", "import path of a class of networks, but got 'os.system'"),
        (3, "`network` to be a network, a class or the import path of one, but got 3"),
        (len, "`network` to be a network, a class or the import path of one, but got <built-in"),
        (int, "`network` to be a network, a class or the import path of one, but got <class"),
    ],
)
def test_what_is_no_network(network, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Classifier(network)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classifier(SmallCNN, 5), "`num_classes` to be 4, as the data have, but got 5"),
        (
            lambda: Classifier(partial(SmallCNN, in_channels=3)),
            r"\['in_channels'\] of `network` to be \[1\], as the data have, but got \[3\]",
        ),
        (
            lambda: Classifier(SmallCNN(5, 1), 5),
            r"was built for, {'num_classes': 5}, but got {'num_classes': 4}",
        ),
        (
            lambda: Classifier(TabularMLP),
            r"to tell \['num_numeric'\] of TabularMLP, but the data tell \['in_channels', 'num_cl",
        ),
    ],
)
def test_sizes_that_are_not_those_of_the_data(data, make, message):
    with pytest.raises(ValueError, match=message):
        shortly().fit(make(), datamodule=data)


class Mute(L.LightningDataModule):
    def train_dataloader(self):
        return []


@pytest.mark.parametrize(
    ("datamodule", "found"), [(Mute(), "got Mute"), (None, "there is none")], ids=str
)
@pytest.mark.parametrize("network", [SmallCNN, nn.Linear(2, 2)], ids=["class", "ready"])
def test_where_nobody_tells(datamodule, found, network):
    loader = {"datamodule": datamodule} if datamodule else {"train_dataloaders": []}
    with pytest.raises(MisconfigurationException, match=rf"`sizes\(\)` that tells .* but {found}"):
        shortly().fit(Classifier(network), **loader)


def test_sizes_without_classes():
    with pytest.raises(ValueError, match=r"sizes of the data with `num_classes`, but got {'side'"):
        Classifier(SmallCNN).build({"side": 3})
