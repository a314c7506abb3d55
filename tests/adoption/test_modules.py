"""Modules of other libraries, and faithful copies of public ones, are refined as they are."""

import importlib
import logging
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.training import assert_same_state, make_trainer, seeded, state_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import Accuracy
from torchvision import models

from saflex_lightning import SAflexCallback, SAflexMixin

CLASSES, ROWS, BATCH = 3, 24, 8
pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries, about themselves


def make_images(size, channels=3, num_rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_rows, channels, size, size, generator=generator)
    return images, torch.arange(num_rows) % CLASSES


def image_loader(size, channels=3):
    return DataLoader(TensorDataset(*make_images(size, channels)), BATCH)


def train(make, loader, *, trainer_of=make_trainer, refine=True, **settings):
    """Fit the module as it is, steered by the Trainer's own rows, and return it and the Trainer."""
    pl.seed_everything(1, verbose=False)
    module = seeded(make)
    callbacks = [SAflexCallback(seed=5)] if refine else []
    trainer = trainer_of(*callbacks, **settings)
    trainer.fit(module, loader, loader)
    return module, trainer


def assert_refined(make, loader, caplog, layer, **settings):
    """It trains other parameters than without the callback, by the layer that makes the logits."""
    with caplog.at_level(logging.INFO):
        module, trainer = train(make, loader, **settings)
    lines = [record.message for record in caplog.records if "SAFLEX learns" in record.message]
    assert "weights of rows" in lines[0]
    assert 0 < trainer.callback_metrics["saflex/effective_fraction"] < 1
    assert trainer.callback_metrics["saflex/skipped_steps"] == 0
    plain, other = train(make, loader, refine=False, **settings)
    found, before = state_of(module), state_of(plain)
    assert found.keys() == before.keys()
    moved = [name for name, _ in module.named_parameters() if not found[name].equal(before[name])]
    assert f"{layer}.weight" in moved
    assert set(other.callback_metrics) == {
        name for name in trainer.callback_metrics if not name.startswith("saflex/")
    }
    return module, trainer


# Libraries


class Samples(Dataset):
    """Image and label by name, as torchgeo has them."""

    images, labels = make_images(32)

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return {"image": self.images[row], "label": self.labels[row]}


def make_torchgeo(base=None, **kwargs):
    trainers = pytest.importorskip("torchgeo.trainers")
    settings = {"model": "resnet18", "in_channels": 3, "num_classes": CLASSES, "lr": 1e-2}
    if kwargs.get("num_classes") == 1:
        settings["task"] = "binary"
    return (base or trainers.ClassificationTask)(**{**settings, **kwargs})


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 3.0]], ids=["", "class weights"])
def test_torchgeo_classification_task(caplog, class_weights):
    pytest.importorskip("torchgeo")
    weights = None if class_weights is None else torch.tensor(class_weights)
    loader = DataLoader(Samples(), BATCH)

    def make(base=None):
        return make_torchgeo(base, class_weights=weights)

    module, _ = assert_refined(make, loader, caplog, "model.fc")

    class Edited(SAflexMixin, type(module)):
        """What its user had to write."""

        def training_step(self, batch, batch_idx):
            logits = self.saflex_forward(batch["image"]).squeeze(1)
            loss = self.saflex_loss(logits, batch["label"], class_weight=weights)
            self.log("train_loss", loss, batch_size=len(logits))
            return loss

    edited, _ = train(lambda: make(Edited), loader)
    assert_same_state(state_of(module), state_of(edited))


def test_torchgeo_with_one_logit_is_refused():
    pytest.importorskip("torchgeo")
    rows = [
        {"image": image, "label": label % 2} for image, label in zip(*make_images(32), strict=True)
    ]
    with pytest.raises(MisconfigurationException, match="give the model two logits"):
        train(lambda: make_torchgeo(num_classes=1, loss="bce"), DataLoader(rows, BATCH))


def test_torch_uncertainty_classification_routine(caplog):
    """Its validation step computes no loss, and its training step takes the batch alone."""
    routines = pytest.importorskip("torch_uncertainty.routines")

    def make():
        network = models.resnet18(num_classes=CLASSES)
        return routines.ClassificationRoutine(
            network,
            CLASSES,
            nn.CrossEntropyLoss(),
            optim_recipe=torch.optim.Adam(network.parameters(), 1e-3),
        )

    assert_refined(make, image_loader(32), caplog, "model.fc")


def test_lightly_linear_classifier_under_the_twin_package(caplog):
    benchmarking = pytest.importorskip("lightly.utils.benchmarking")
    twin = importlib.import_module("pytorch_lightning")

    def make():
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.BatchNorm1d(16))
        return benchmarking.LinearClassifier(
            backbone, BATCH, feature_dim=16, num_classes=CLASSES, topk=(1, 2)
        )

    def trainer_of(*callbacks):
        return twin.Trainer(
            callbacks=list(callbacks),
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    assert_refined(make, image_loader(8), caplog, "classification_head", trainer_of=trainer_of)


def test_pytorch_tabular_under_the_twin_package(tmp_path, monkeypatch):
    tabular = pytest.importorskip("pytorch_tabular")
    config = importlib.import_module("pytorch_tabular.config")
    categories = importlib.import_module("pytorch_tabular.models").CategoryEmbeddingModelConfig
    pandas = importlib.import_module("pandas")
    monkeypatch.chdir(tmp_path)
    values = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    table = pandas.DataFrame(values.numpy(), columns=list("abcd"))
    table["y"] = (values[:, 0] > 0).long().numpy()

    weights = []
    for callbacks in ([], [SAflexCallback(seed=5)]):
        model = tabular.TabularModel(
            data_config=config.DataConfig(["y"], continuous_cols=list("abcd")),
            model_config=categories(task="classification", layers="16", seed=3),
            optimizer_config=config.OptimizerConfig(),
            trainer_config=config.TrainerConfig(
                batch_size=16,
                max_epochs=2,
                accelerator="cpu",
                progress_bar="none",
                checkpoints=None,
                load_best=False,
                early_stopping=None,
                trainer_kwargs={"enable_model_summary": False},
            ),
            verbose=False,
        )
        trainer = model.fit(train=table[:64], validation=table[64:], callbacks=callbacks, seed=3)
        weights.append(model.model.head.layers[-1].weight.detach().clone())
        refined = "saflex/effective_fraction" in trainer.callback_metrics
        assert refined == bool(callbacks)
    assert not weights[0].equal(weights[1])


# Models of libraries in a module of twenty lines


class Timm(pl.LightningModule):
    """A timm model, as its users write it."""

    def __init__(self):
        super().__init__()
        self.model = importlib.import_module("timm").create_model(
            "resnet10t", num_classes=CLASSES, drop_rate=0.1
        )
        self.accuracy = Accuracy("multiclass", num_classes=CLASSES)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels, label_smoothing=0.1)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.accuracy(self.model(images), labels)
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_timm_model(caplog):
    pytest.importorskip("timm")
    assert_refined(Timm, image_loader(32), caplog, "model.fc")


class TextClassifier(pl.LightningModule):
    """A Hugging Face classifier whose forward computes the loss."""

    def __init__(self, kind="Bert"):
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
            num_labels=CLASSES,
        )
        self.model = getattr(transformers, f"{kind}ForSequenceClassification")(config)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        outputs = self.model(**batch)
        self.log("val_loss", outputs.loss)
        self.log("val_mean", outputs.logits.mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize(
    ("kind", "layer"), [("Bert", "model.classifier"), ("Roberta", "model.classifier.out_proj")]
)
def test_hugging_face_text_classifier(caplog, kind, layer):
    pytest.importorskip("transformers")
    tokens = torch.randint(3, 50, (ROWS, 12), generator=torch.Generator().manual_seed(0))
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": place % CLASSES}
        for place, row in enumerate(tokens)
    ]
    module, _ = assert_refined(lambda: TextClassifier(kind), DataLoader(rows, BATCH), caplog, layer)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_graph_classifier(caplog):
    """Rows are graphs, though a batch holds as many rows as there are nodes."""
    geometric = pytest.importorskip("torch_geometric")
    layers = importlib.import_module("torch_geometric.nn")
    loaders = importlib.import_module("torch_geometric.loader")

    class GCN(pl.LightningModule):
        """Two convolutions, a mean over the nodes of a graph, and a linear layer."""

        def __init__(self):
            super().__init__()
            self.first, self.second = layers.GCNConv(4, 16), layers.GCNConv(16, 16)
            self.lin = nn.Linear(16, CLASSES)

        def forward(self, data):
            hidden = self.first(data.x, data.edge_index).relu()
            hidden = self.second(hidden, data.edge_index)
            pooled = layers.global_mean_pool(hidden, data.batch)
            return self.lin(F.dropout(pooled, p=0.5, training=self.training))

        def training_step(self, data, batch_idx):
            loss = F.cross_entropy(self(data), data.y)
            self.log("train_loss", loss, batch_size=data.num_graphs)
            return loss

        def validation_step(self, data, batch_idx):
            loss = F.cross_entropy(self(data), data.y)
            self.log("val_loss", loss, batch_size=data.num_graphs)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    generator = torch.Generator().manual_seed(0)
    graphs = [
        geometric.data.Data(
            x=torch.randn(10, 4, generator=generator),
            edge_index=torch.randint(0, 10, (2, 30), generator=generator),
            y=torch.tensor([place % CLASSES]),
        )
        for place in range(ROWS)
    ]
    assert_refined(GCN, loaders.DataLoader(graphs, BATCH), caplog, "lin")
    saflex = SAflexCallback()
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(saflex)
    trainer.fit(GCN(), loaders.DataLoader(graphs, BATCH), loaders.DataLoader(graphs, BATCH))
    share = saflex.settings.val_batch_ratio
    assert saflex.state_dict()["batch_size"] == min(ROWS, round(share * BATCH))


# Public modules, written again


class DenseNet(nn.Module):
    """The network of the template."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(64, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Linear(32, CLASSES),
        )

    def forward(self, images):
        return self.model(images.view(images.size(0), -1))


class MNISTLitModule(pl.LightningModule):
    """The module of a well-known template for Lightning and Hydra, line by line in its structure.

    The criterion is an attribute, one method serves all steps, metrics are objects, an accuracy is
    kept at its best, and optimizer and scheduler are partial functions among the hyperparameters.
    """

    def __init__(self, net, optimizer, scheduler, compile=False):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = Accuracy(task="multiclass", num_classes=CLASSES)
        self.val_acc = Accuracy(task="multiclass", num_classes=CLASSES)
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, images):
        return self.net(images)

    def on_train_start(self):
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch):
        images, labels = batch
        logits = self.forward(images)
        loss = self.criterion(logits, labels)
        return loss, torch.argmax(logits, dim=1), labels

    def training_step(self, batch, batch_idx):
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self):
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def setup(self, stage):
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "monitor": "val/loss",
                "interval": "epoch",
                "frequency": 1,
            },
        }


def make_mnist():
    return MNISTLitModule(
        DenseNet(),
        partial(torch.optim.Adam, lr=1e-2),
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.1),
    )


def test_module_of_the_hydra_template(caplog):
    _, trainer = assert_refined(make_mnist, image_loader(8, 1), caplog, "net.model.3")
    assert "val/acc_best" in trainer.callback_metrics


class TransferLearningModel(pl.LightningModule):
    """Lightning's own example of fine-tuning, with three classes: a frozen backbone and a head."""

    def __init__(self):
        super().__init__()
        backbone = models.resnet18()
        self.feature_extractor = nn.Sequential(*list(backbone.children())[:-1])
        self.fc = nn.Sequential(
            nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, CLASSES)
        )
        self.train_acc = Accuracy(task="multiclass", num_classes=CLASSES)
        self.valid_acc = Accuracy(task="multiclass", num_classes=CLASSES)

    def forward(self, images):
        return self.fc(self.feature_extractor(images).squeeze(-1).squeeze(-1))

    def loss(self, logits, labels):
        return F.cross_entropy(input=logits, target=labels)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        loss = self.loss(logits, labels)
        self.log("train_acc", self.train_acc(logits, labels), prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.log("val_loss", self.loss(logits, labels), prog_bar=True)
        self.log("val_acc", self.valid_acc(logits, labels), prog_bar=True)

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2], gamma=0.1)
        return [optimizer], [scheduler]


class MilestonesFinetuning(BackboneFinetuning):
    """Unfreezes the extractor of features after the first epoch."""

    def __init__(self):
        super().__init__(unfreeze_backbone_at_epoch=1, verbose=False)

    def on_fit_start(self, trainer, pl_module):
        pass

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.feature_extractor)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.feature_extractor, optimizer, lr=1e-4)


def test_fine_tuning_example_of_lightning(caplog):
    def trainer_of(*callbacks):
        return make_trainer(*callbacks, MilestonesFinetuning())

    module, _ = assert_refined(
        TransferLearningModel, image_loader(32), caplog, "fc.3", trainer_of=trainer_of
    )
    assert all(p.requires_grad for p in module.feature_extractor.parameters())
