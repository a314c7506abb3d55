"""Where validation rows come from, and that drawing them is endless, fair, and side-effect free."""

import multiprocessing
import time
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from helpers.training import (
    Classifier,
    assert_same_state,
    fit,
    make_loader,
    make_rows,
    make_trainer,
    seeded,
    state_of,
)
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from saflex_lightning import SAflexCallback, SAflexWarning
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.validation.source import count_rows, same_rows
from saflex_lightning.validation.stream import EndlessBatchSampler, ValidationStream


def numbered(num_rows=20, batch_size=4, **kwargs):
    return DataLoader(TensorDataset(torch.arange(num_rows)), batch_size, **kwargs)


def draw(stream, times):
    return [stream.draw()[0].tolist() for _ in range(times)]


def flat(batches):
    return [row for batch in batches for row in batch]


def make_stream(loader, **kwargs):
    return ValidationStream(loader, ranks=Ranks(), **kwargs)


def test_every_pass_holds_every_row_once_in_a_new_order():
    rows = flat(draw(make_stream(numbered()), 10))
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20))
    assert rows[:20] != rows[20:] != list(range(20))


def test_rows_left_over_open_the_next_batch():
    rows = flat(draw(make_stream(numbered(7, 4)), 7))
    assert all(rows.count(row) == 4 for row in range(7))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_cut_slices_of_the_one_process_batch(world_size):
    whole = EndlessBatchSampler(23, 8, seed=5, ranks=Ranks())
    parts = [
        EndlessBatchSampler(23, 8 // world_size, seed=5, ranks=Ranks(rank, world_size))
        for rank in range(world_size)
    ]
    for number in range(12):
        assert whole.rows(number) == [row for part in parts for row in part.rows(number)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_goes_on_where_another_stopped(num_workers):
    loader = numbered(num_workers=num_workers)
    whole, first = make_stream(loader, seed=3), make_stream(loader, seed=3)
    through, start = draw(whole, 9), draw(first, 4)
    second = make_stream(loader, start=first.draws, seed=3)
    assert start + draw(second, 5) == through
    for stream in (whole, first, second):
        stream.close()


class Noisy(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, row):
        return torch.rand(2)


def test_drawing_leaves_the_global_random_state_alone_and_is_reproducible():
    state = torch.get_rng_state()
    loader = DataLoader(Noisy(), 3)
    first = [make_stream(loader).draw() for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(first[0], make_stream(loader).draw())
    assert torch.equal(first[0], first[1])


def test_a_loader_with_its_own_sampler_is_repeated_as_it_is():
    weights = [0.0] * 19 + [1.0]
    loader = numbered(sampler=WeightedRandomSampler(weights, 8))
    assert draw(make_stream(loader), 6) == [[19] * 4] * 6
    assert draw(make_stream([[torch.tensor([1])], [torch.tensor([2])]]), 3) == [[1], [2], [1]]


class Prepared(DataLoader):
    """One whose batches are others than those of its rows."""

    def __iter__(self):
        return ([rows + 100] for (rows,) in super().__iter__())


class EvenRows(DistributedSampler):
    """A sampler of the user's own, on top of one that the stream knows."""

    def __iter__(self):
        return iter(range(0, 20, 2))


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (Prepared(TensorDataset(torch.arange(20)), 4), range(100, 120)),
        (numbered(sampler=EvenRows(range(20), 1, 0)), range(0, 20, 2)),
        (
            numbered(sampler=DistributedSamplerWrapper(SubsetRandomSampler(range(16, 20)), 1, 0)),
            range(16, 20),
        ),
    ],
    ids=["own batches", "own sampler", "a sampler that Lightning wrapped"],
)
def test_rows_are_those_that_a_loader_chooses(loader, expected):
    assert set(flat(draw(make_stream(loader), 5))) == set(expected)


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(20))


def test_workers_shared_with_another_iterator_start_nothing_anew():
    loader = DataLoader(Numbers(), 4, num_workers=1, persistent_workers=True)
    stream, rows = make_stream(loader), []
    for _ in range(5):
        rows += stream.draw().tolist()
        assert next(iter(loader)).tolist() == [0, 1, 2, 3]  # as each validation does
    assert rows == list(range(20))
    stream.close()
    assert len(multiprocessing.active_children()) == 1  # the other's
    del loader


def test_batches_in_a_list_are_not_taken_for_rows():
    assert count_rows([make_rows(8)] * 5) is None
    assert count_rows(DataLoader([make_rows(8)] * 5, batch_size=None)) is None
    assert count_rows([]) == 0
    assert count_rows(make_loader(40, 8)) == 40


class Data(pl.LightningDataModule):
    def __init__(self, hook=True):
        super().__init__()
        self.rows = TensorDataset(*make_rows(40, seed=11))
        if hook:
            self.saflex_dataloader = lambda: DataLoader(self.rows, 8)

    def train_dataloader(self):
        return make_loader(shuffle=True)

    def val_dataloader(self):
        return make_loader(24, seed=4)


def steering_rows(callback):
    return callback._loader.dataset


def test_order_of_sources():
    given = make_loader(seed=7)
    data = Data()
    for argument, expected in [(given, given.dataset), (None, data.rows)]:
        callback = SAflexCallback(argument)
        pl.seed_everything(1, verbose=False)
        make_trainer(callback).fit(seeded(Classifier), data)
        assert steering_rows(callback) is expected

    class Hooked(Classifier):
        def saflex_dataloader(self):
            return given

    callback = SAflexCallback()
    make_trainer(callback).fit(seeded(Hooked), Data(hook=False))
    assert steering_rows(callback) is given.dataset


def test_a_batch_of_all_rows_is_the_whole_set_once_per_refresh():
    """The gradient that steers is then that of the mean loss over the whole validation set."""
    seen, norms, expected = [], [], []

    class Watched(Classifier):
        def saflex_val_batch(self, batch):
            seen.append(batch[0][:, 0].sort().values)
            return batch

        def training_step(self, batch, batch_idx):
            loss = cross_entropy(self.net(rows[0]), rows[1])
            gradient = torch.autograd.grad(loss, list(self.net.parameters()))
            expected.append(torch.cat([part.flatten() for part in gradient]).norm())
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            norms.append(callback.read_metrics()["val_gradient_norm"])

    data = Data()
    data.rows = TensorDataset(*make_rows(40, seed=11, dtype=torch.float64))
    data.train_dataloader = lambda: make_loader(shuffle=True, dtype=torch.float64)
    rows = data.rows.tensors
    callback = SAflexCallback(preset="paper", val_batch_size=40, refresh_every_n_steps=2)
    module = seeded(lambda: Watched(plain=True, dtype=torch.float64))
    make_trainer(callback, limit_val_batches=0).fit(module, data)
    assert len(seen) == 4  # of 8 steps
    assert all(values.equal(rows[0][:, 0].sort().values) for values in seen)
    torch.testing.assert_close(torch.stack(norms[::2]), torch.stack(expected[::2]))


def test_falling_back_on_the_trainers_rows_warns_once_where_they_select(tmp_path):
    callback = SAflexCallback()
    make_trainer(callback).fit(seeded(Classifier), Data(hook=False))  # nothing is selected: silent
    assert len(steering_rows(callback)) == 24
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.warns(SAflexWarning, match="same rows also select checkpoints") as caught:
        make_trainer(callback, checkpoint, enable_checkpointing=True).fit(
            seeded(Classifier), Data(hook=False)
        )
    assert len([w for w in caught if w.category is SAflexWarning]) == 1


class Plateau(Classifier):
    """Lowers its rate by a metric.

    Args:
        monitor: Which.
    """

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": self.monitor},
        }


@pytest.mark.parametrize(
    ("watcher", "says"),
    [
        (EarlyStopping("val/loss"), True),
        (EarlyStopping("train/loss"), False),
        ("val/loss", True),
        ("train/loss", False),
    ],
)
def test_rows_select_where_something_monitors_a_metric_of_validation(watcher, says):
    """Warnings are errors here."""
    rows = make_loader(24, seed=4)
    by_schedule = isinstance(watcher, str)
    module = seeded(lambda: Plateau(watcher) if by_schedule else Classifier())
    callbacks = [SAflexCallback(rows), *([] if by_schedule else [watcher])]
    expected = pytest.warns(SAflexWarning, match="also select checkpoints")
    with expected if says else nullcontext():
        fit(module, *callbacks, val_dataloaders=rows)


def test_steering_rows_that_select_or_test_warn(tmp_path):
    val = make_loader(24, seed=4)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.warns(SAflexWarning, match="select checkpoints"):
        fit(
            seeded(Classifier),
            SAflexCallback(DataLoader(Subset(val.dataset, range(16)), 8)),
            checkpoint,
            val_dataloaders=val,
            enable_checkpointing=True,
        )
    module, steering = seeded(Classifier), make_loader(24, seed=4)
    trainer = fit(module, SAflexCallback(steering))
    with pytest.warns(SAflexWarning, match="the same rows also test"):
        trainer.test(module, DataLoader(steering.dataset, 8), verbose=False)
    trainer.test(module, make_loader(24, seed=4), verbose=False)  # equal values, other rows


def test_each_role_of_the_steering_rows_is_said_once(tmp_path):
    rows, module = make_loader(24, seed=4), seeded(Classifier)

    def fit_and_test_twice():
        trainer = fit(
            module,
            SAflexCallback(rows),
            ModelCheckpoint(tmp_path, monitor="val/loss"),
            val_dataloaders=rows,
            enable_checkpointing=True,
        )
        for _ in range(2):
            trainer.test(module, rows, verbose=False)

    with pytest.warns(SAflexWarning) as caught:
        fit_and_test_twice()
    said = [str(w.message).split(", but ")[1] for w in caught if w.category is SAflexWarning]
    assert [message.split(". ")[0] for message in said] == [
        "the same rows also select checkpoints",
        "the same rows also test",
    ]


def test_rows_that_steer_and_test_are_told_without_a_fit():
    steering = make_loader(24, seed=4)
    trainer = make_trainer(SAflexCallback(steering))
    with pytest.warns(SAflexWarning, match="the same rows also test"):
        trainer.test(seeded(Classifier), DataLoader(steering.dataset, 8), verbose=False)


def test_same_rows_looks_through_subsets():
    rows = TensorDataset(torch.arange(6))
    assert same_rows(rows, rows)
    assert same_rows(Subset(rows, [0, 1]), rows)
    assert same_rows(Subset(rows, [0, 1]), Subset(rows, [1, 2]))
    assert not same_rows(Subset(rows, [0, 1]), Subset(rows, [2, 3]))
    assert not same_rows(rows, TensorDataset(torch.arange(6)))


@pytest.mark.parametrize(("preset", "expected"), [("robust", 4), ("paper", 16)])
def test_default_batch_size_is_a_share_of_the_training_batch(preset, expected):
    sizes = []

    class Observing(Classifier):
        def saflex_val_batch(self, batch):
            sizes.append(len(batch[1]))
            return super().saflex_val_batch(batch)

    make_trainer(SAflexCallback(preset=preset)).fit(seeded(Observing), Data())
    assert set(sizes) == {expected}


def test_default_batch_size_is_clamped_to_the_rows():
    class Few(Data):
        def __init__(self):
            super().__init__()
            self.rows = TensorDataset(*make_rows(3))

    make_trainer(callback := SAflexCallback(preset="paper")).fit(seeded(Classifier), Few())
    assert callback.state_dict()["batch_size"] == 3


def test_batch_is_moved_as_in_validation():
    stages = []

    class Observing(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            stages.append((self.trainer.state.stage.value, len(batch[1])))
            return batch

    fit(
        seeded(Observing),
        SAflexCallback(make_loader(12, 6), refresh_every_n_steps=1),
        max_epochs=1,
    )
    assert stages == [("train", 16), ("validate", 6)] * 4


class Failing(Classifier):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("planted")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("fails", [True, False])
def test_workers_persist_through_the_fit_and_end_with_it(fails):
    workers = []

    class Watching(Failing if fails else Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            workers.append({process.pid for process in multiprocessing.active_children()})

    callback = SAflexCallback(make_loader(seed=7, num_workers=1))
    module = seeded(Watching)
    if fails:
        with pytest.raises(RuntimeError, match="planted"):
            fit(module, callback)
    else:
        fit(module, callback)
    assert workers
    assert all(pids == workers[0] and len(pids) == 1 for pids in workers)
    deadline = time.monotonic() + 60  # nothing else would end them
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
    assert module._saflex_step is None


def test_the_trainer_s_rows_are_loaded_where_it_would_only_later():
    models = []
    for sanity in (0, 1):
        module = seeded(lambda: Classifier(plain=True))
        rows = {"val_dataloaders": make_loader(40, 8, seed=9), "num_sanity_val_steps": sanity}
        fit(module, SAflexCallback(), check_val_every_n_epoch=2, max_epochs=4, **rows)
        models.append({k: v for k, v in state_of(module).items() if k.startswith("net")})
    assert_same_state(*models)
