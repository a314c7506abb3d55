"""Benches and methods of `accuracy.py`, named before anything is measured.

A setting of the library may be chosen on *selection* benches; a claim is made on *confirmation*
benches alone, and no bench changes sides. In overrides, ``{data}`` stands for the folder of data
files, ``{seed}`` for the seed of the run and ``{val_rows}`` for the number of validation rows.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["BENCHES", "DEFAULT", "METHODS", "Bench", "Method"]

Role = Literal["selection", "confirmation"]
Metric = Literal["test_accuracy", "test_auroc"]
Kind = Literal["images", "table", "pool"]

FEW_SHOT = "python benchmarks/make_few_shot.py {source} {data}/few_shot/{name} --seeds {seed}"
TABLE = "put the .npz of this set there, or run it by hand with data.path=FILE"
POOL = (
    "saflex-generate medmnist --output {data}/blood/real && "
    "saflex-generate vae --train {data}/blood/real/train --output {data}/blood/pool"
)


FULL = "{data}/bloodmnist.npz"
FULL_RECIPE = "download bloodmnist.npz of MedMNIST (Zenodo record 10519652)"
S: Role = "selection"
C: Role = "confirmation"


@dataclass(frozen=True)
class Bench:
    """One data set with its upstream augmentation, model and budget.

    Attributes:
        overrides: Hydra overrides, as for ``saflex-train``.
        metric: Key of ``result.json`` that is compared; a fraction.
        role: Whether settings may be chosen here, or claims confirmed.
        minutes: Budget of one run of one method, on one core or (tier gpu) one GPU.
        tier: ``"cpu"``: every method on two cores; ``"gpu"``: the paper's scale.
        kind: What is augmented; a method may serve some kinds only.
        strength: Further overrides, for methods that augment.
        needs: File or folder that must be there; None for data that ships with the package.
        recipe: How to get it.
        val_rows: Validation rows, for what steers by all of them; selection benches tell.
    """

    overrides: tuple[str, ...]
    metric: Metric
    role: Role
    minutes: float
    tier: Literal["cpu", "gpu"] = "cpu"
    kind: Kind = "images"
    strength: tuple[str, ...] = ()
    needs: str | None = None
    recipe: str = ""
    val_rows: int | None = None


@dataclass(frozen=True)
class Method:
    """What is done about the augmented rows.

    Attributes:
        overrides: Hydra overrides, after those of the bench.
        kinds: Kinds of benches it serves.
        augments: Whether the bench's strength applies.
        is_ablation: Whether it only helps to choose the default; it runs on the selection benches
            that tell their `Bench.val_rows`.
        at_scale: Whether it runs at the paper's scale alone.
    """

    overrides: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("images", "table", "pool")
    augments: bool = True
    is_ablation: bool = False
    at_scale: bool = False

    def serves(self, bench: Bench) -> bool:
        """Return whether the method runs on a bench.

        Args:
            bench: The bench.
        """
        chooses = bench.role == "selection" and bench.val_rows is not None
        wanted = chooses if self.is_ablation else bench.tier == "gpu" or not self.at_scale
        return bench.kind in self.kinds and wanted


def ablation(*overrides: str) -> Method:
    """Return the default with something changed.

    Args:
        overrides: What is changed.
    """
    return Method(("method=saflex_robust", *overrides), kinds=("images", "table"), is_ablation=True)


def paper_variants() -> dict[str, Method]:
    """Return Algorithm 1 as the paper can be read, but for its preset: space, beta and batch."""
    return {
        f"paper, {space}, beta {beta}{batch}": Method(
            (
                "method=saflex_paper",
                f"callbacks.saflex.score_space={space}",
                f"callbacks.saflex.label_penalty={beta}",
                *(("batch=replace",) if batch else ()),
            ),
            at_scale=True,
        )
        for space in ("log_probs", "probs")
        for beta in (0, 1)
        for batch in ("", ", replaced")
        if (space, beta) != ("log_probs", 0)  # the preset's
    }


def blood(augmentation: str, role: Role) -> Bench:
    """Return a bench on the shipped BloodMNIST subset: ResNet-18, 1,200 images, 10 epochs.

    Args:
        augmentation: A choice of the Hydra group of this name.
        role: See `Bench`.
    """
    return Bench(("~experiment", f"augmentation={augmentation}"), "test_accuracy", role, 2.5)


def few_shot(name: Literal["blood", "fashion"], augmentation: str, role: Role) -> Bench:
    """Return a bench of 50 training and 25 validation images per class: small CNN, 40 epochs.

    Args:
        name: BloodMNIST or Fashion-MNIST.
        augmentation: A choice of the Hydra group of this name.
        role: See `Bench`.
    """
    file = f"{{data}}/few_shot/{name}_{{seed}}.npz"
    overrides = (
        "~experiment",
        f"data.path={file}",
        "model=small_cnn",
        "model.network.width=16",
        f"augmentation={augmentation}",
        "trainer.max_epochs=40",
        "+trainer.check_val_every_n_epoch=10",
    )
    source = FULL if name == "blood" else "FOLDER_OF_FASHION_MNIST"
    recipe = FEW_SHOT.replace("{source}", source).replace("{name}", name)
    rows = 25 * (8 if name == "blood" else 10)
    return Bench(overrides, "test_accuracy", role, 0.7, needs=file, recipe=recipe, val_rows=rows)


def tabular(
    model: Literal["mlp", "saint"],
    data: str,
    role: Role,
    *,
    probability: float = 0.1,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    dim: int | None = None,
    file: str | None = None,
    minutes: float = 0.5,
    val_rows: int | None = None,
) -> Bench:
    """Return a tabular bench under SAINT's CutMix; the last epoch is tested.

    Args:
        model: Network: a perceptron of 2 x 256, or SAINT.
        data: A choice of the Hydra group of this name.
        role: See `Bench`.
        probability: Of a cell to be replaced.
        epochs: Instead of the paper's 200, where the set is large.
        lr: Instead of 1e-4, with fewer epochs.
        batch_size: Clean rows per step, instead of 256.
        dim: Width of SAINT's embeddings, instead of 32.
        file: Name in the folder of data files; None for sets that ship with the package.
        minutes: See `Bench`.
        val_rows: See `Bench`.
    """
    overrides = [f"experiment=tabular_{model}", f"data={data}"]
    if epochs:  # validation rows are looked at after the last epoch, whatever their number
        overrides += [f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={epochs}"]
    overrides += [f"model.lr={lr}"] if lr else []
    overrides += [f"data.batch_size={batch_size}"] if batch_size else []
    overrides += [f"model.network.dim={dim}"] if dim else []
    needs = f"{{data}}/{file}" if file else None
    overrides += [f"data.path={needs}"] if needs else []
    strength = (f"data.augmentation_settings.probability={probability}",)
    metric: Metric = "test_accuracy" if data == "letter" else "test_auroc"
    return Bench(
        tuple(overrides),
        metric,
        role,
        minutes,
        kind="table",
        strength=strength,
        needs=needs,
        recipe=TABLE,
        val_rows=val_rows,
    )


def pool(role: Role, *overrides: str) -> Bench:
    """Return a bench on BloodMNIST and a pool made by a small VAE: small CNN, 20 epochs.

    Args:
        role: See `Bench`.
        overrides: What else is done to the pool.
    """
    settings = (
        "experiment=blood_generated",
        "data.root={data}/blood/real",
        "data.generated={data}/blood/pool",
        "model=small_cnn",
        "model.network.width=16",
        "trainer.max_epochs=20",
        *overrides,
    )
    return Bench(
        settings, "test_accuracy", role, 1.0, kind="pool", needs="{data}/blood/pool", recipe=POOL
    )


def full(augmentation: str) -> Bench:
    """Return a bench of the paper's data and epochs: full BloodMNIST, 100 epochs, small CNN.

    Args:
        augmentation: ``"crop"``, ``"mixup"`` or ``"randaugment"``.
    """
    overrides = (
        f"experiment=medmnist_{augmentation}",
        "data=bloodmnist",
        "data.root={data}",
        "model=small_cnn",
        "model.network.width=16",
    )
    return Bench(overrides, "test_accuracy", C, 15.0, needs=FULL, recipe=FULL_RECIPE)


def paper_scale(augmentation: str) -> Bench:
    """Return a bench of Table 1: full BloodMNIST, ResNet-18 with the 3x3 stem, 100 epochs.

    Args:
        augmentation: ``"randaugment"`` or ``"mixup"``.
    """
    overrides = (
        f"experiment=medmnist_{augmentation}",
        "data=bloodmnist",
        "data.root={data}",
        "data.num_workers=3",
        "trainer.accelerator=gpu",
        "trainer.log_every_n_steps=50",
        "+trainer.benchmark=true",
    )
    return Bench(overrides, "test_accuracy", C, 20.0, tier="gpu", needs=FULL, recipe=FULL_RECIPE)


LETTER, CHURN, KDD = "standin_letter.npz", "shrutime.npz", "appetency_kdd99_10pct.npz"
BENCHES = {
    # Few images, small CNN.
    "blood_few_randaugment": few_shot("blood", "randaugment", S),
    "blood_few_trivialaugment": few_shot("blood", "trivialaugment", C),
    "blood_few_mixup": few_shot("blood", "mixup", C),
    "blood_few_crop": few_shot("blood", "crop", C),
    "fashion_few_randaugment": few_shot("fashion", "randaugment", C),
    "fashion_few_mixup": few_shot("fashion", "mixup", S),
    "fashion_few_crop": few_shot("fashion", "crop", C),
    # Tables, perceptron.
    "qsar_mlp": tabular("mlp", "qsar", S, val_rows=158),
    "qsar_mlp_strong": tabular("mlp", "qsar", C, probability=0.3),
    "arrhythmia_mlp": tabular("mlp", "arrhythmia", C),
    "arrhythmia_mlp_strong": tabular("mlp", "arrhythmia", C, probability=0.3),
    "shrutime_mlp": tabular("mlp", "shrutime", C, epochs=30, lr=0.001, file=CHURN),
    "shrutime_mlp_strong": tabular(
        "mlp", "shrutime", C, probability=0.3, epochs=30, lr=0.001, file=CHURN
    ),
    "kdd_mlp": tabular("mlp", "appetency", C, epochs=3, lr=0.001, file=KDD),
    "kdd_mlp_strong": tabular("mlp", "appetency", C, probability=0.3, epochs=3, lr=0.001, file=KDD),
    "letter_mlp": tabular("mlp", "letter", S, epochs=25, lr=0.001, file=LETTER, val_rows=2800),
    "letter_mlp_strong": tabular(
        "mlp", "letter", C, probability=0.3, epochs=25, lr=0.001, file=LETTER
    ),
    # 24 rows in a union batch, 26 classes.
    "letter_more_classes_than_rows": tabular(
        "mlp", "letter", C, epochs=2, lr=0.001, batch_size=12, file=LETTER
    ),
    # Tables, SAINT.
    "qsar_saint": tabular("saint", "qsar", C, minutes=25.0),
    "qsar_saint_strong": tabular("saint", "qsar", C, probability=0.3, minutes=25.0),
    # As SAINT's authors do above 100 columns; four steps an epoch.
    "arrhythmia_saint": tabular(
        "saint", "arrhythmia", C, epochs=100, batch_size=64, dim=8, minutes=25.0
    ),
    "arrhythmia_saint_strong": tabular(
        *("saint", "arrhythmia", C),
        probability=0.3,
        epochs=100,
        batch_size=64,
        dim=8,
        minutes=25.0,
    ),
    "shrutime_saint": tabular("saint", "shrutime", C, epochs=30, file=CHURN, minutes=15.0),
    "shrutime_saint_strong": tabular(
        "saint", "shrutime", C, probability=0.3, epochs=30, file=CHURN, minutes=15.0
    ),
    "kdd_saint": tabular("saint", "appetency", C, epochs=3, file=KDD, minutes=25.0),
    "kdd_saint_strong": tabular(
        "saint", "appetency", C, probability=0.3, epochs=3, file=KDD, minutes=25.0
    ),
    "letter_saint": tabular("saint", "letter", C, epochs=25, file=LETTER, minutes=25.0),
    "letter_saint_strong": tabular(
        "saint", "letter", C, probability=0.3, epochs=25, file=LETTER, minutes=25.0
    ),
    # Pools of generated images, small CNN.
    "blood_pool": pool(C),
    "blood_pool_noise_20": pool(C, "data.label_noise=0.2"),
    "blood_pool_noise_40": pool(C, "data.label_noise=0.4"),
    # ResNet-18.
    "blood_randaugment": blood("randaugment", S),
    "blood_trivialaugment": blood("trivialaugment", C),
    "blood_mixup": blood("mixup", C),
    "blood_crop": blood("crop", C),
    # All of BloodMNIST for 100 epochs, small CNN.
    "full_crop": full("crop"),
    "full_mixup": full("mixup"),
    "full_randaugment": full("randaugment"),
    # The paper's scale.
    "bloodmnist_randaugment": paper_scale("randaugment"),
    "bloodmnist_mixup": paper_scale("mixup"),
}

NO_SELECTION = ("callbacks=none", "+trainer.limit_val_batches=0")
NOTHING_HELD_OUT = ("data.merge_val=true", "data.steering=train", *NO_SELECTION)
DEFAULT = "robust"
METHODS = {
    "no_aug": Method(("method=no_aug",), augments=False),
    "upstream": Method(("method=upstream",)),
    "uniform": Method(("method=uniform",)),
    "robust": Method(("method=saflex_robust",)),
    "gradient": Method(("method=saflex_gradient",)),
    "paper": Method(("method=saflex_paper",)),
    "uniform, train + val": Method(("method=train_plus_val",)),
    "robust, nothing held out": Method(("method=saflex_robust", *NOTHING_HELD_OUT)),
    "upstream, train + val": Method(("method=train_plus_val", "batch=replace")),
    "no_aug, train + val": Method(
        ("method=no_aug", "data.merge_val=true", "+trainer.limit_val_batches=0"), augments=False
    ),
    "robust, alone": Method(("method=saflex_robust", "batch=replace")),
    "paper, replaced": Method(("method=saflex_paper", "batch=replace")),
    "label smoothing": Method(("method=label_smoothing",)),
    "small loss": Method(("method=small_loss",)),
    "learning to reweight": Method(("method=learning_to_reweight",)),
    "soft augmentation": Method(("method=soft_augmentation",), kinds=("images",)),
    "oracle filter": Method(("method=uniform", "data.drop_wrong=true"), kinds=("pool",)),
    **paper_variants(),
    "robust, looks every step": ablation("callbacks.saflex.refresh_every_n_steps=1"),
    "robust, whole validation": ablation("callbacks.saflex.val_batch_size={val_rows}"),
}
