"""Each wrong set-up gives one error that says what was expected, what was found, what to do."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from helpers.grouped import Grouped, grouped_loader, steering, union_batch
from helpers.training import (
    EVERY_WAY,
    GRADIENT,
    NUM_FEATURES,
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
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from saflex_lightning import SAflexCallback, SAflexWarning, UnsupportedModelError
from saflex_lightning.functional.losses import check_target


class Counting(Classifier):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


class WithoutValidation(Counting):
    validation_step = pl.LightningModule.validation_step


def refused(module, callback, match, *, error=MisconfigurationException, **kwargs):
    """The fit is refused with the message before a parameter changes."""
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(error, match=match):
        fit(module, callback, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    return module


class WithoutMixin(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(NUM_FEATURES, 4)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_module_without_a_cross_entropy():
    match = r"`training_step` of WithoutMixin to compute its loss by .*Derive the module from `SAfl"
    refused(WithoutMixin(), SAflexCallback(make_loader()), match)


def test_no_validation_rows_anywhere():
    module = refused(seeded(Counting), SAflexCallback(), r"no `saflex_dataloader\(\)` hook")
    assert module.steps == 0


def test_empty_validation_rows():
    rows = TensorDataset(torch.zeros(0, NUM_FEATURES), torch.zeros(0, dtype=torch.long))
    module = seeded(Counting)
    refused(module, SAflexCallback(DataLoader(rows, 4)), "to have rows, but it is empty")
    assert module.steps == 0


@pytest.mark.parametrize("collect", [lambda loader: {"clean": loader}, lambda loader: [loader]])
def test_several_loaders_of_validation_rows(collect):
    loaders = collect(make_loader())
    match = f"one dataloader of validation rows for SAFLEX, but got a {type(loaders).__name__} of 1"
    with pytest.raises(TypeError, match=match):
        SAflexCallback(loaders)


@pytest.mark.parametrize("row_evidence", [True, False])
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("augmented", lambda mask: mask.float()),
        ("augmented", lambda mask: mask[:-1]),
        ("group", lambda group: group.float()),
        ("index", lambda index: index.int()),
        ("index", lambda index: index.unsqueeze(1)),
    ],
)
def test_fields_of_a_batch_that_do_not_fit(field, change, row_evidence):
    def batch(*rows):
        made = union_batch(*rows)
        return replace(made, **{field: change(getattr(made, field))})

    module = seeded(Grouped)
    callback = SAflexCallback(steering(), row_evidence=row_evidence)
    with pytest.raises(ValueError, match=rf"Expected `AugmentedBatch\.{field}` to be an? "):
        fit(module, callback, train=grouped_loader(make_batch=batch))
    assert not module.steps


@pytest.mark.parametrize("settings", [{}, {**GRADIENT, "row_evidence": True}], ids=str)
@pytest.mark.parametrize("field", ["group", "index"])
def test_evidence_needs_no_groups_or_indices(field, settings):
    def batch(*rows):
        return replace(union_batch(*rows), **{field: None})

    class Union(Classifier):
        saflex_group_names = Grouped.saflex_group_names
        names = Grouped.names

        def training_step(self, batch, batch_idx):
            return self.saflex_loss(self.saflex_forward(batch.inputs), batch.target)

    callback = SAflexCallback(steering(), **settings)
    fit(seeded(Union), callback, train=grouped_loader(96, make_batch=batch), max_epochs=2)
    seen = callback.state_dict()["evidence"]["seen"].tolist()
    assert seen == [2 * 96, *((2 * 96, 0) if field == "group" else (96, 96))]


def test_fewer_validation_rows_than_asked():
    class Hooked(Counting):
        def saflex_dataloader(self):
            return make_loader(10)

    match = r"at least 11 validation rows per process, but found 10 \(10 rows over 1"
    module = refused(seeded(Hooked), SAflexCallback(val_batch_size=11), match)
    assert module.steps == 0


def test_loader_larger_than_its_rows_is_told_to_shrink():
    match = "Expected at least 16 validation rows per process, but found 10"
    refused(seeded(Counting), SAflexCallback(make_loader(10, 16, drop_last=True)), match)


class Nothing:
    def __iter__(self):
        return iter(())


def test_iterable_without_batches():
    refused(seeded(Counting), SAflexCallback(Nothing()), "yielded none")


@pytest.mark.parametrize(
    ("given", "found"),
    [("paper", "str"), (make_loader().dataset, "TensorDataset"), (iter([1]), "list_iterator")],
    ids=["preset", "dataset", "iterator"],
)
def test_what_is_no_loader(given, found):
    match = f"dataloader of validation rows .* but got {found}.*passed by its name, `preset=`"
    with pytest.raises(TypeError, match=match):
        SAflexCallback(given)


def test_a_batch_size_that_a_loader_with_its_own_sampling_cannot_follow():
    loader = make_loader(40, 8, sampler=SubsetRandomSampler(range(10)))

    class Hooked(Counting):
        def saflex_dataloader(self):
            return loader

    match = "without sampling of its own for `val_batch_size`, but got D"
    assert refused(seeded(Hooked), SAflexCallback(val_batch_size=4), match).steps == 0


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")
@pytest.mark.parametrize(("make", "limit"), [(Counting, 0), (WithoutValidation, 1.0)])
def test_validation_that_is_off(make, limit):
    rows = {"val_dataloaders": make_loader(), "limit_val_batches": limit}
    refused(seeded(make), SAflexCallback(), "that is in use: `limit_val_batches`", **rows)


class InPlace(Counting):
    def forward(self, inputs):
        return self.net(inputs.sub_(0.5))


class OutOfPlace(Counting):
    def forward(self, inputs):
        return self.net(inputs - 0.5)


class InPlaceInTraining(Counting):
    """Writes in its inputs where validation rows do not show it."""

    def forward(self, inputs):
        return self.net(inputs.sub_(0.5) if self.training else inputs - 0.5)


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
@pytest.mark.parametrize("make", [InPlace, InPlaceInTraining])
def test_forward_that_writes_in_its_inputs(make, way):
    saflex = SAflexCallback(make_loader(seed=7), **way)
    if way.get("engine", "head") == "head":  # nothing runs twice on the same tensors
        models = [seeded(make), seeded(OutOfPlace)]
        for model in models:
            fit(model, saflex)
        assert_same_state(*map(state_of, models))
    else:
        match = "leaves its inputs as they are.*wrote in them in place"
        refused(seeded(make), saflex, match, error=UnsupportedModelError)


@pytest.mark.parametrize("nest", [lambda batch: {"labeled": batch}, lambda batch: [batch, 1]])
def test_augmented_batch_inside_another_batch(nest):
    class Nested(Grouped):
        def training_step(self, batch, batch_idx):
            batch = batch["labeled"] if isinstance(batch, dict) else batch[0]
            return self.saflex_loss(self.saflex_forward(batch.inputs), batch.target)

    train = grouped_loader(make_batch=lambda *rows: nest(union_batch(*rows)))
    module, callback = seeded(Nested), SAflexCallback(steering())
    match = r"`saflex_loss\(\.\.\., augmented=\)` where an `AugmentedBatch` is a part"
    with pytest.raises(ValueError, match=match):
        fit(module, callback, train=train)


def test_batch_whose_rows_cannot_be_counted():
    class Rows:
        def __init__(self, inputs, target):
            self.pixels, self.classes = inputs, target

    class Objects(Classifier):
        def training_step(self, batch, batch_idx):
            return self.saflex_loss(self.saflex_forward(batch.pixels), batch.classes)

        def saflex_dataloader(self):
            return make_loader(40, 8)

    train = DataLoader(
        TensorDataset(*make_rows(64)),
        16,
        collate_fn=lambda rows: Rows(
            torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        ),
    )
    with pytest.raises(MisconfigurationException, match=r"rows can be counted.*val_batch_size="):
        fit(seeded(Objects), SAflexCallback(), train=train)
    fit(seeded(Objects), SAflexCallback(val_batch_size=8), train=train)


def test_saflex_loss_never_called_in_an_epoch():
    class Forgetful(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    match = r"`training_step` of Forgetful to call `self\.saflex_loss\(.*not called in 4 steps"
    said = "it returned a loss without it, which is trained as it is"
    with (
        pytest.warns(SAflexWarning, match=said) as caught,
        pytest.raises(MisconfigurationException, match=match),
    ):
        fit(seeded(Forgetful), SAflexCallback(make_loader()))
    assert len([w for w in caught if w.category is SAflexWarning]) == 1


def test_saflex_loss_without_saflex_forward():
    class Forgetful(Classifier):
        def training_step(self, batch, batch_idx):
            return self.saflex_loss(self(batch[0]), batch[1])

    refused(
        seeded(Forgetful), SAflexCallback(make_loader()), r"`self\.saflex_forward\(\.\.\.\)` to"
    )


def test_logits_changed_in_between():
    class Slicing(Classifier):
        def training_step(self, batch, batch_idx):
            return self.saflex_loss(self.saflex_forward(batch[0])[:4], batch[1][:4])

    match = r"of shape \[\(16, 4\)\], but got others, of shape \[\(4, 4\)\]\. Pass them on unch"
    refused(seeded(Slicing), SAflexCallback(make_loader()), match, error=ValueError)


@pytest.mark.parametrize("place", ["train", "validation"])
@pytest.mark.parametrize(
    ("label", "match"),
    [
        (4, r"labels in \[0, 3\], but got values from . to 4"),
        (-100, "`ignore_index` is not supported"),
    ],
)
def test_labels_out_of_range(place, label, match):
    inputs, target = make_rows(64)
    bad = DataLoader(
        TensorDataset(inputs, torch.where(torch.arange(64) % 5 == 0, label, target)), 64
    )
    good = make_loader(64, 64)
    val, train = (bad, good) if place == "validation" else (good, bad)
    refused(seeded(Classifier), SAflexCallback(val), match, error=ValueError, train=train)


def test_validation_data_with_more_classes_than_the_model():
    inputs, target = make_rows(64)
    soft = nn.functional.one_hot(target, 6).float()
    val = DataLoader(TensorDataset(inputs, soft), 16)
    match = r"Expected `target` of shape \(16,\) or \(16, 4\).*same classes"
    refused(seeded(Classifier), SAflexCallback(val), match, error=ValueError)


def test_training_scored_over_other_classes_than_validation():
    class TwoHeads(Classifier):
        def saflex_scores(self, inputs):
            scores = self(inputs)
            return scores[:, :3] if self.training else scores

    match = "over 4 classes like the validation batch, but got 3"
    inputs, target = make_rows(64)
    train = DataLoader(TensorDataset(inputs, target.clamp(max=2)), 16)
    for way in ({}, {**GRADIENT, "engine": "forward_mode"}):
        callback = SAflexCallback(make_loader(), **way)
        refused(seeded(TwoHeads), callback, match, error=ValueError, train=train)
    match = r"output of submodule `net\.4` to be the scores"
    error = UnsupportedModelError
    callback = SAflexCallback(make_loader(), **GRADIENT)
    refused(seeded(TwoHeads), callback, match, error=error, train=train)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"ignore_index": 0}, "`ignore_index`. Drop the ignored rows before the loss"),
        ({"reduction": "sum"}, "`reduction`. The loss is always the weighted mean"),
        ({"weight": None}, "`weight`. Pass class weights as `class_weight`"),
        ({"nonsense": 1}, "`nonsense`. Remove them"),
    ],
)
def test_unsupported_loss_options(option, match):
    with pytest.raises(TypeError, match=match):
        Classifier().saflex_loss(torch.zeros(2, 4), torch.zeros(2).long(), **option)


@pytest.mark.parametrize(
    ("shape", "target", "match"),
    [
        ((64, 1), torch.rand(64), "a binary head with one logit. Give the model two logits"),
        ((64, 4), (torch.rand(64, 4) > 0.5).float(), "Multi-label"),
        ((64, 4, 2), torch.zeros(64, 2).long(), "dense targets"),
        ((64, 4), torch.zeros(63).long(), r"shape \(64,\) or \(64, 4\).*got \(63,\)"),
    ],
    ids=["binary", "multi-label", "dense", "rows"],
)
def test_other_kinds_of_targets_are_refused_by_name(shape, target, match):
    with pytest.raises((ValueError, TypeError), match=match):
        check_target(target, torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"preset": "robst"}, "`preset` to be one of gradient, paper, robust, but got 'robst'"),
        ({"engine": "fast"}, "`engine` to be one of auto, finite_difference, forward_mode, head"),
        ({"temperature": 0.0}, "`temperature` to be a positive float, but got 0.0"),
        ({"label_penalty": -1.0}, "`label_penalty` to be a non-negative float, but got -1.0"),
        ({"gradient_decay": 1.0}, r"`gradient_decay` to be a float in \[0, 1\)"),
        ({"every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1, but got 0"),
        ({"refresh_every_n_steps": 1.5}, "`refresh_every_n_steps` to be an integer of at least 1"),
        ({"params": []}, "`params` to be a list of one or more name patterns, or None"),
        ({"params": "net.*"}, "`params` to be a list of one or more name patterns, or None"),
        ({"normalize": 1}, "`normalize` to be True or False, but got 1"),
        ({"seed": True}, "`seed` to be an integer of at least 0 or None, but got True"),
        ({"val_dataloader": [1], "val_batch_size": 4}, "A loader keeps its own batch size"),
    ],
    ids=str,
)
def test_settings_are_checked_in_the_constructor(settings, match):
    with pytest.raises(ValueError, match=match):
        SAflexCallback(**settings)


def test_an_engine_that_nothing_asks_is_said_and_changes_nothing():
    plain = seeded(Classifier)
    fit(plain, callback(), max_epochs=1)
    for settings in ({"engine": "finite_difference"}, {"params": ["net.4.*"]}):
        module = seeded(Classifier)
        with pytest.warns(SAflexWarning, match=f"beside `{next(iter(settings))}`, but weight_rule"):
            fit(module, callback(**settings), max_epochs=1)
        assert_same_state(state_of(module), state_of(plain))


def test_an_unknown_setting_is_refused_by_name():
    with pytest.raises(TypeError, match=r"but got cache_on_device\. Correct the name, or remove"):
        SAflexCallback(cache_on_device=True)


def test_all_problems_are_raised_at_once():
    class Bad(Classifier):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)

    callback = SAflexCallback(make_loader(), preset="gradient", params=["nothing.*"])
    with pytest.raises(MisconfigurationException, match=r"'nothing\.\*' matches none"):
        fit(Bad(), callback)
    with pytest.raises(MisconfigurationException, match="matches none of"):
        fit(seeded(Classifier), SAflexCallback(make_loader(), preset="gradient", params=["nope"]))


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class CustomLayer(nn.Module):
    def forward(self, x):
        return Custom.apply(x)


def test_model_an_engine_cannot_serve_is_refused_before_the_first_step():
    def make():
        module = Classifier(plain=True)
        module.net.insert(1, CustomLayer())
        return module

    match = r"submodule `net\.1` \(CustomLayer\).*engine='finite_difference'"
    callback = SAflexCallback(make_loader(), preset="gradient", engine="forward_mode")
    refused(seeded(make), callback, match, error=UnsupportedModelError)
    fit(seeded(make), SAflexCallback(make_loader(), preset="gradient", engine="finite_difference"))


def test_head_engine_without_a_linear_layer():
    class Convolutional(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv1d(NUM_FEATURES, 4, 1)

        def forward(self, inputs):
            return self.net(inputs.unsqueeze(-1)).squeeze(-1)

    callback = SAflexCallback(make_loader(), preset="gradient", engine="head")
    refused(
        seeded(Convolutional),
        callback,
        r"see an `nn\.Linear` called.*engine='forward_mode'",
        error=UnsupportedModelError,
    )


def test_under_parameterised_regime_warns_once():
    val = make_loader(64, 64)
    with pytest.warns(SAflexWarning, match="212 against 256") as caught:
        fit(
            seeded(lambda: Classifier(plain=True)),
            SAflexCallback(val, preset="gradient", engine="forward_mode"),
            train=make_loader(128, 64),
        )
    assert len([w for w in caught if w.category is SAflexWarning]) == 1


@pytest.mark.parametrize(("engine", "batch_size"), [("forward_mode", 16), ("head", 64)])
def test_enough_parameters_and_a_single_layer_do_not_warn(engine, batch_size):
    callback = SAflexCallback(make_loader(), preset="gradient", engine=engine)
    fit(seeded(Classifier), callback, train=make_loader(128, batch_size))
