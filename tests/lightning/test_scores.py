"""Scores that are no logits of one label space: refused in words that name the hook or the cure."""

from types import SimpleNamespace

import pytest
import torch
from helpers.training import (
    NUM_CLASSES,
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_loader,
    make_rows,
    seeded,
    state_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexCallback

ENGINES = ("auto", "forward_mode", "finite_difference")


def refused(module, match, *, error, saflex=None, **settings):
    before = state_of(module)
    with pytest.raises(error, match=match):
        fit(module, saflex or callback(), **settings)
    assert_same_state(before, state_of(module))


class OneLogit(Classifier):
    """A binary head.

    Args:
        flat: Whether the logits have one dimension.
    """

    def __init__(self, *, flat):
        super().__init__(plain=True)
        self.net[-1] = nn.Linear(16, 1)
        self.flat = flat

    def forward(self, inputs):
        logits = self.net(inputs)
        return logits.squeeze(1) if self.flat else logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("with_callback", [False, True])
def test_one_logit(flat, column, dtype, with_callback):
    inputs, target = make_rows(64)
    target = (target % 2).to(dtype)
    loader = DataLoader(TensorDataset(inputs, target.unsqueeze(1) if column else target), 16)
    module = seeded(lambda: OneLogit(flat=flat))
    saflex = [SAflexCallback(loader)] if with_callback else []
    with pytest.raises(ValueError, match=r"a binary head with one logit\. Give the model two log"):
        fit(module, *saflex, train=loader)


class Several(Classifier):
    """Returns something beside the logits.

    Args:
        what: What it is.
    """

    def __init__(self, what):
        super().__init__(plain=True)
        self.second, self.what = nn.Linear(16, 3), what

    def forward(self, inputs):
        features = self.net[:-1](inputs)
        logits = self.net[-1](features)
        return {
            "two heads": lambda: (logits, self.second(features)),
            "features": lambda: (logits, features),
            "nothing": lambda: (logits, None),
            "dictionary": lambda: {"logits": logits},
        }[self.what]()

    def training_step(self, batch, batch_idx):
        return self.saflex_loss(self.saflex_forward(batch[0]), batch[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ("two heads", ValueError, r"got shapes \[\(8, 4\), \(8, 3\)\], as of heads with label"),
        ("features", ValueError, r"got shapes \[\(8, 4\), \(8, 16\)\].* or of logits beside feat"),
        ("nothing", TypeError, r"got tuple of \['Tensor', 'NoneType'\]"),
        ("dictionary", TypeError, r"but got dict\. Override `saflex_scores` to return the logits"),
    ],
)
def test_more_than_logits(what, error, match, engine):
    inputs, target = make_rows(64)
    train = DataLoader(TensorDataset(inputs, target % 3), 16)
    saflex = SAflexCallback(
        DataLoader(TensorDataset(inputs, target % 3), 8), preset="gradient", engine=engine
    )
    module = seeded(lambda: Several(what))
    refused(module, match, error=error, saflex=saflex, train=train)


@pytest.mark.parametrize("what", ["two heads", "features", "dictionary"])
def test_more_than_logits_in_a_plain_loss(what):
    module = seeded(lambda: Several(what))
    with pytest.raises((ValueError, TypeError), match="Override `saflex_scores` to return"):
        fit(module)


def test_two_heads_in_training_alone():
    class Both(Several):
        def saflex_scores(self, inputs):
            return self(inputs) if self.training else self.net(inputs)

    module = seeded(lambda: Both("two heads"))
    match = r"got shapes \[\(16, 4\), \(16, 3\)\].*Override `saflex_scores`"
    refused(
        module, match, error=ValueError, saflex=callback(preset="gradient", engine="forward_mode")
    )


def test_a_module_without_a_forward():
    class Formless(Classifier):
        forward = nn.Module.forward

    match = r"Formless to have a `forward` that returns the logits, .* or override `saflex_scores`"
    refused(seeded(Formless), match, error=MisconfigurationException)


def test_a_module_without_a_forward_that_says_its_scores():
    class Formless(Classifier):
        forward = nn.Module.forward

        def saflex_scores(self, inputs):
            return self.net(inputs)

    formless, plain = seeded(Formless), seeded(Classifier)
    for module in (formless, plain):
        fit(module, callback())
    assert_same_state(*map(state_of, (formless, plain)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_callback", [False, True])
def test_labels_of_any_integer_type_give_one_run(dtype, weighted, with_callback):
    class Weighted(Classifier):
        def training_step(self, batch, batch_idx):
            weight = torch.tensor([0.2, 1.0, 3.0, 0.5]) if weighted else None
            logits = self.saflex_forward(batch[0])
            return self.saflex_loss(logits, batch[1], class_weight=weight)

    inputs, target = make_rows(64)
    states = []
    for kind in (torch.int64, dtype):
        labels = (target % 2 if dtype == torch.bool else target).to(kind)
        loader = DataLoader(TensorDataset(inputs, labels), 16)
        module = seeded(Weighted)
        fit(module, *([SAflexCallback(loader)] if with_callback else []), train=loader)
        states.append(state_of(module))
    assert_same_state(*states)
    assert NUM_CLASSES == 4


def test_steering_batches_follow_the_labels_of_a_batch_of_graphs():
    """Not its nodes, of which the first tensor has a row each."""
    module = seeded(Graphs)
    fit(module, SAflexCallback(), train=graphs(64), val_dataloaders=graphs(60))
    assert module.notes.drawn == {4}  # a quarter of 16


class Graph:
    """A batch of graphs as torch_geometric has it: mapping-like, with a row of `x` per node."""

    def __init__(self, rows):
        self.store = {
            "x": torch.cat([torch.stack([row[0]] * 5) for row in rows]),
            "y": torch.stack([row[1] for row in rows]),
            "batch": torch.arange(len(rows)).repeat_interleave(5),
        }
        self.num_graphs = len(rows)

    def __iter__(self):
        return iter(self.store.items())

    def to(self, *_, **__):
        return self


def graphs(num_rows):
    return DataLoader(TensorDataset(*make_rows(num_rows)), 16, collate_fn=Graph)


class Graphs(Classifier):
    """Averages the nodes of each graph."""

    def __init__(self):
        super().__init__(plain=True)
        self.notes = SimpleNamespace(drawn=set())  # a list of its own would be put back

    def forward(self, graph):
        store = graph.store
        sums = torch.zeros(graph.num_graphs, store["x"].shape[1])
        return self.net(sums.index_add(0, store["batch"], store["x"]) / 5)

    def saflex_val_batch(self, batch):
        return batch, batch.store["y"]

    def training_step(self, batch, batch_idx):
        return self.saflex_loss(self.saflex_forward(batch), batch.store["y"])

    def saflex_scores(self, graph):
        if not self.training:
            self.notes.drawn.add(graph.num_graphs)
        return self(graph)

    def validation_step(self, batch, batch_idx):
        pass


def test_graphs_of_torch_geometric():
    data = pytest.importorskip("torch_geometric.data")
    loaders = pytest.importorskip("torch_geometric.loader")
    rows = [
        data.Data(x=torch.stack([x] * 5), edge_index=torch.zeros(2, 0).long(), y=y)
        for x, y in zip(*make_rows(64), strict=True)
    ]

    class Real(Graphs):
        def forward(self, graph):
            sums = torch.zeros(graph.num_graphs, graph.x.shape[1])
            return self.net(sums.index_add(0, graph.batch, graph.x) / 5)

        def saflex_val_batch(self, batch):
            return batch, batch.y

        def training_step(self, batch, batch_idx):
            return self.saflex_loss(self.saflex_forward(batch), batch.y)

    module = seeded(Real)
    train, val = (loaders.DataLoader(rows, batch_size=16) for _ in range(2))
    fit(module, SAflexCallback(), train=train, val_dataloaders=val)
    assert module.notes.drawn == {4}


def test_steering_batches_follow_the_first_tensor_where_no_label_is_found():
    class Parts(Classifier):
        def training_step(self, batch, batch_idx):
            inputs, target = batch["labelled"]
            return self.saflex_loss(self.saflex_forward(inputs), target)

        def saflex_scores(self, inputs):
            if not self.training:
                drawn.add(len(inputs))
            return self(inputs)

        def validation_step(self, batch, batch_idx):
            pass

    drawn = set()

    train = {"labelled": make_loader(64, 16), "more": make_loader(64, 8)}
    val = make_loader(60, 8, seed=7)
    fit(seeded(Parts), SAflexCallback(), train=train, val_dataloaders=val)
    assert drawn == {4}  # and no warning of two sizes
