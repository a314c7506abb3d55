"""Union batches of a pipeline of one's own, from the loader to the loss."""

import copy

import pytest
import torch
from helpers.training import (
    NUM_CLASSES,
    NUM_FEATURES,
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_loader,
    make_rows,
    make_trainer,
    seeded,
    state_of,
)
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import v2

from saflex_lightning import SAflexCallback, SAflexMixin
from saflex_lightning.data import UnionDataset, group_names_of, union_batch, union_loader

ROWS = TensorDataset(*make_rows(64))
IMAGES = TensorDataset(ROWS.tensors[0].reshape(-1, 1, 2, 4), ROWS.tensors[1])  # for mixing


def weaken(rows):
    return 0.8 * rows


def loader(**settings):
    return union_loader(ROWS, weaken, batch_size=8, **settings)


class Short(Classifier):
    """Leaves the target to the loss, where it is told to."""

    leaves_target = True

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        logits = self.saflex_forward(inputs.flatten(1))
        loss = self.saflex_loss(logits, None if self.leaves_target else target)
        self.log("loss", loss)
        self.seen = (batch, logits.detach(), loss.detach(), self.saflex_solution)
        return loss


class Long(Short):
    leaves_target = False


@pytest.mark.parametrize(
    "settings",
    [None, {}, {"start_epoch": 1}, {"every_n_steps": 2}],
    ids=["no callback", "plain", "later", "every other"],
)
def test_the_loss_knows_the_target_of_the_batch(settings):
    models = [seeded(lambda kind=kind: kind(plain=True)) for kind in (Short, Long)]
    for model in models:
        saflex = [] if settings is None else [callback(**settings)]
        fit(model, *saflex, train=loader())
    assert_same_state(*map(state_of, models))


def test_a_step_by_hand_knows_its_batch_too():
    module, batch = seeded(lambda: Short(plain=True)), next(iter(loader()))
    module.log = lambda *_: None
    expected = cross_entropy(module(batch.inputs), batch.target)
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    torch.testing.assert_close(module.training_step(batch=batch, batch_idx=0), expected)
    assert module._saflex_batch is None


def test_a_failing_step_forgets_its_batch():
    module = seeded(lambda: Short(plain=True))
    with pytest.raises(TypeError):
        module.training_step(3, 0)
    assert module._saflex_batch is None
    with pytest.raises(ValueError, match="square similarity matrix"):
        module.saflex_loss(torch.zeros(3, 2))


def test_a_step_inside_a_step_has_a_batch_of_its_own():
    class Outer(Short):
        def training_step(self, batch, batch_idx):
            first, second = batch
            inner = super().training_step(first, batch_idx)
            self.second = second
            with pytest.raises(ValueError, match="square similarity matrix"):
                self.saflex_loss(torch.zeros(3, 2))  # a pair is no `AugmentedBatch`
            return inner

    module = seeded(lambda: Outer(plain=True))
    module.log = lambda *_: None
    batch = next(iter(loader()))
    expected = cross_entropy(module(batch.inputs), batch.target)
    torch.testing.assert_close(module.training_step((batch, batch), 0), expected)


class Steps:
    """A step that is written elsewhere, and not for us alone."""

    def training_step(self, batch, batch_idx):
        return self.saflex_loss(self.saflex_forward(batch.inputs))


def test_an_armed_step_of_another_base_knows_the_target():
    class Foreign(Classifier):
        pass

    Foreign.training_step = Steps.training_step
    foreign, own = seeded(lambda: Foreign(plain=True)), seeded(lambda: Long(plain=True))
    for module in (foreign, own):
        fit(module, callback(), train=loader())
    assert_same_state(*map(state_of, (foreign, own)))


def test_pairs_keep_the_diagonal_where_the_batch_has_no_target():
    class Pairs(Short):
        def training_step(self, batch, batch_idx):
            scores = self.saflex_forward(batch.inputs)
            return self.saflex_loss(scores @ scores.T)

    batch = next(iter(loader()))
    batch.target = None
    module = seeded(lambda: Pairs(plain=True))
    scores = module(batch.inputs)
    expected = cross_entropy(scores @ scores.T, torch.arange(16))
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_a_tuple_of_scores_keeps_the_diagonal_beside_labels():
    class Pairs(Short):
        def training_step(self, batch, batch_idx):
            scores = self.saflex_forward(batch.inputs)
            return self.saflex_loss((scores @ scores.T, scores @ scores.T))

    batch, module = next(iter(loader())), seeded(lambda: Pairs(plain=True))
    scores = module(batch.inputs)
    expected = cross_entropy(scores @ scores.T, torch.arange(16))
    torch.testing.assert_close(module.training_step(batch, 0), expected)


@pytest.mark.filterwarnings(
    "ignore:.*to_torchscript. has been deprecated", "ignore:This property will be removed"
)
@pytest.mark.parametrize("with_callback", [True, False])
def test_torchscript_after_a_fit(with_callback):
    module = seeded(lambda: Short(plain=True))
    fit(module, *([callback()] if with_callback else []), train=loader(), max_epochs=1)
    inputs = ROWS.tensors[0]
    torch.testing.assert_close(module.to_torchscript()(inputs), module(inputs))


def test_a_module_is_copied_within_a_step_without_its_batch():
    class Copying(Short):
        def training_step(self, batch, batch_idx):
            kept = copy.deepcopy(self)
            assert kept._saflex_batch is None
            assert_same_state(state_of(kept), state_of(self))
            assert self._saflex_batch is batch
            return super().training_step(batch, batch_idx)

    fit(seeded(lambda: Copying(plain=True)), callback(), train=loader(), max_epochs=1)


def test_the_signature_and_the_words_of_a_step_stay():
    class Documented(SAflexMixin):
        def training_step(self, batch):
            """My own words."""

    assert Documented.training_step.__doc__ == "My own words."
    fit(seeded(WithoutIndex), callback(), max_epochs=1)


class WithoutIndex(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


def shared_loader():
    rows = UnionDataset(ROWS, weaken)
    return DataLoader(rows, 8, collate_fn=rows.collate)


@pytest.mark.parametrize(
    ("make", "pick"),
    [
        (loader, lambda batch: batch),
        (shared_loader, lambda batch: batch),
        (lambda: {"union": loader(), "more": make_loader()}, lambda batch: batch["union"]),
        (lambda: [make_loader(), shared_loader()], lambda batch: batch[1]),
    ],
    ids=["union_loader", "own loader of its dataset", "in a dictionary", "in a list"],
)
def test_the_names_of_groups_are_found(make, pick):
    class Picking(Short):
        def training_step(self, batch, batch_idx):
            part = pick(batch)
            more = {} if part is batch else {"augmented": part.augmented, "group": part.group}
            return self.saflex_loss(self.saflex_forward(part.inputs), part.target, **more)

    trainer = fit(seeded(lambda: Picking(plain=True)), callback(), train=make())
    assert "saflex/wrong_labels/weaken" in trainer.callback_metrics


class OnDevice(Short):
    """Makes union batches of plain ones after their transfer."""

    augment = staticmethod(weaken)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            return union_batch(*batch, self.augment)
        self.__dict__.setdefault("steering", []).append(len(batch[1]))
        return batch

    def saflex_group_names(self):
        return group_names_of(self.augment)


class OnDeviceKornia(OnDevice):
    def __init__(self, **settings):
        super().__init__(**settings)
        kornia = pytest.importorskip("kornia.augmentation")
        self.augment = kornia.RandomHorizontalFlip(p=1.0)


class OnDeviceMixing(OnDevice):
    augment = v2.MixUp(num_classes=NUM_CLASSES)


@pytest.mark.parametrize("kind", [OnDevice, OnDeviceMixing, OnDeviceKornia])
def test_union_batches_made_after_the_transfer(kind):
    module = seeded(lambda: kind(plain=True))
    train = DataLoader(IMAGES, 8, shuffle=True)
    val = DataLoader(TensorDataset(*IMAGES[:40]), 8)

    class Flat(kind):
        def saflex_val_batch(self, batch):
            return batch[0].flatten(1), batch[1]

    module = seeded(lambda: Flat(plain=True))
    trainer = fit(module, SAflexCallback(val), train=train)
    batch, _, _, solution = module.seen
    assert batch.augmented.tolist() == [False] * 8 + [True] * 8
    assert solution.weights[:8].eq(1).all()
    assert solution.weights[8:].std() > 0
    assert set(module.steering) == {8}
    name = group_names_of(module.augment)[1]
    assert f"saflex/wrong_labels/{name}" in trainer.callback_metrics


def timm_mixup(**settings):
    return pytest.importorskip("timm.data").Mixup(
        num_classes=NUM_CLASSES, label_smoothing=0.0, **settings
    )


@pytest.mark.parametrize("where", ["loader", "collate", "step"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: v2.MixUp(num_classes=NUM_CLASSES),
        lambda: v2.CutMix(num_classes=NUM_CLASSES),
        timm_mixup,
    ],
    ids=["MixUp", "CutMix", "timm"],
)
def test_mixing_inside_and_outside_of_the_loader(make, where):
    """Outside, of plain batches, there are no clean rows: every row is refined."""
    mix = make()

    class Mixing(Short):
        def training_step(self, batch, batch_idx):
            images, target = mix(*batch) if where == "step" else batch
            loss = self.saflex_loss(self.saflex_forward(images.flatten(1)), target)
            self.solution = self.saflex_solution
            return loss

        def saflex_val_batch(self, batch):
            return batch[0].flatten(1), batch[1]

    def collate(rows):
        return mix(*default_collate(rows)) if where == "collate" else default_collate(rows)

    train = DataLoader(IMAGES, 8, collate_fn=collate)
    if where == "loader":
        train = union_loader(IMAGES, mix, batch_size=8)
    module = seeded(lambda: Mixing(plain=True))
    val = DataLoader(TensorDataset(*IMAGES[:40]), 8)
    trainer = fit(module, SAflexCallback(val), train=train)
    clean = 8 if where == "loader" else 0
    assert module.solution.weights.shape == (8 + clean,)
    assert module.solution.weights[:clean].eq(1).all()
    assert module.solution.weights[clean:].std() > 0
    assert trainer.global_step == 16


def test_no_argument_is_needed_to_test_a_module_without_a_callback():
    module = seeded(lambda: Short(plain=True))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    batch, logits, loss, solution = module.seen
    torch.testing.assert_close(loss, cross_entropy(logits, batch.target))
    assert solution is None
    assert batch.inputs.shape == (16, NUM_FEATURES)
