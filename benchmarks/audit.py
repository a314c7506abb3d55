"""Measure how well `saflex-audit` finds wrong labels, beside cleanlab on the same outputs.

    python benchmarks/audit.py --save docs/results/audit_cpu.md

Labels of a pool (blood cells that ship with the package, scikit-learn's digits) are made wrong,
each other class as likely; 20 to 25 rows of each class are trusted. Two kinds of outputs are
judged:

*patches*: features that no label was used for. cleanlab gets the probabilities of a logistic
regression on them, fitted on the trusted rows, its penalty chosen by cross-validation.

*network*: logits of small CNNs, cross-validated in five folds on the pool with its wrong labels,
for 30 epochs; every trusted row is scored by one of them. cleanlab gets their probabilities, as it
advises; it uses no trusted rows.

AUROC is that of telling wrong labels from right ones. Precision and recall are those of the rows
that `saflex-audit` does not keep, and of cleanlab's `find_label_issues` with its defaults; "new
label" is the share of right ones among suggested labels of relabelled rows.
"""

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning.audit.encoders import PatchEncoder
from saflex_lightning.evidence.labels import DECISIONS, LabelJudge
from saflex_lightning.recipes import SmallCNN
from saflex_lightning.recipes.label_noise import plant_wrong_labels
from saflex_lightning.recipes.medmnist import read_medmnist

FOLDS, EPOCHS, BATCH = 5, 30, 64
METHODS = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


def read_rows(source, seed):
    """Return images in [-1, 1] and right labels of trusted rows and of a pool."""
    draws = torch.Generator().manual_seed(seed)
    if source == "blood":
        splits = read_medmnist()
        rows = [
            (part.images.float() / 127.5 - 1, part.target)
            for part in (splits["val"], splits["train"])
        ]
        images, target = (torch.cat(parts) for parts in zip(*rows, strict=True))
        room, each = len(rows[0][1]), 25
    else:
        found = load_digits()
        images, target = (
            torch.tensor(found.images).float().unsqueeze(1) / 8 - 1,
            torch.tensor(found.target),
        )
        room, each = len(target), 20
    order = torch.randperm(room, generator=draws)
    trusted = torch.cat([order[target[order] == label][:each] for label in target.unique()])
    is_pool = torch.ones(len(target), dtype=torch.bool)
    is_pool[trusted] = False
    if source == "blood":
        is_pool[:room] = False  # its validation rows are no part of the pool
    return (images[trusted], target[trusted]), (images[is_pool], target[is_pool])


def patch_outputs(trusted, pool, labels, given, seed):
    """Return features of trusted rows and of the pool, and probabilities for cleanlab."""
    sized = [F.interpolate(images, (32, 32), mode="bilinear") for images in (trusted, pool)]
    encoder = PatchEncoder(sized[0])
    scores = [torch.cat([encoder(part) for part in images.split(256)]) for images in sized]
    fitted = make_pipeline(
        StandardScaler(), LogisticRegressionCV(Cs=[1e-3, 1e-2, 0.1, 1.0], max_iter=1000)
    )
    fitted.fit(scores[0].numpy(), labels.numpy())
    return *scores, fitted.predict_proba(scores[1].numpy())


def network_outputs(trusted, pool, labels, given, seed):
    """Return logits that no row's own label was used for, and their probabilities."""
    classes = int(labels.max()) + 1
    scores = [torch.zeros(len(images), classes) for images in (trusted, pool)]
    folds = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)) % FOLDS
    for fold in range(FOLDS):
        torch.manual_seed(100 * seed + fold)
        network = SmallCNN(classes, pool.shape[1])
        images, target = pool[folds != fold], given[folds != fold]
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        steps = EPOCHS * (len(target) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(target)).split(BATCH)[: len(target) // BATCH]:
                optimizer.zero_grad()
                F.cross_entropy(network(images[batch]), target[batch]).backward()
                optimizer.step()
                schedule.step()
        network.eval()
        with torch.no_grad():
            scores[1][folds == fold] = network(pool[folds == fold])
            scores[0][fold::FOLDS] = network(trusted[fold::FOLDS])
    return *scores, scores[1].softmax(1).numpy()


OUTPUTS = {"patches": patch_outputs, "network": network_outputs}


def measure(source, noise, outputs, seed):
    """Return every number of one draw, by its name."""
    (images, labels), (pool, truth) = read_rows(source, seed)
    classes = int(labels.max()) + 1
    given = plant_wrong_labels(truth, classes, noise, torch.Generator().manual_seed(seed))
    wrong = given != truth
    trusted_scores, scores, probabilities = OUTPUTS[outputs](images, pool, labels, given, seed)
    judge = LabelJudge(trusted_scores, labels, classes)
    share, _ = judge.watch(scores, given)
    judged = judge.judge(scores, given)
    found = {"saflex-audit": auroc(judged.score, wrong)}
    for method in METHODS:
        quality = get_label_quality_scores(given.numpy(), probabilities, method=method)
        found[method] = auroc(torch.tensor(quality), wrong)
    issues = torch.tensor(find_label_issues(given.numpy(), probabilities))
    flagged = judged.decision != DECISIONS.index("keep")
    relabelled = judged.decision == DECISIONS.index("relabel")
    for name, rows in (("saflex-audit", flagged), ("cleanlab", issues)):
        found[f"{name} precision"] = 100 * wrong[rows].float().mean().item()
        found[f"{name} recall"] = 100 * rows[wrong].float().mean().item()
    found["relabelled"] = 100 * relabelled.float().mean().item()
    found["new label"] = 100 * (judged.suggested == truth)[relabelled].float().mean().item()
    found["share"], found["true share"] = 100 * share, 100 * wrong.float().mean().item()
    return found


def auroc(quality, wrong):
    """Return how well quality tells right labels from wrong ones."""
    return binary_auroc(quality.double(), (~wrong).long()).item()


def table(found, names, digits):
    """Yield the lines of a table: means over seeds, with standard deviations of AUROCs."""
    yield "| pool, share wrong, outputs | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for case, runs in found.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if digits == 3 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        yield f"| {case} | " + " | ".join(cells) + " |"


def main():
    """Measure all, and print or save the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for source in ("blood", "digits"):
        for noise in (0.2, 0.4):
            for outputs in OUTPUTS:
                case = f"{source}, {noise:.0%}, {outputs}".replace("%", " %")
                found[case] = [measure(source, noise, outputs, seed) for seed in options.seeds]
                print(case, found[case], flush=True)
    decisions = ["saflex-audit precision", "saflex-audit recall", "cleanlab precision"]
    decisions += ["cleanlab recall", "relabelled", "new label", "share", "true share"]
    lines = [
        "# What `saflex-audit` finds, beside cleanlab",
        f"\nMade by `python benchmarks/audit.py`; see its first lines. Seeds {options.seeds}.",
        "\nAUROC of telling wrong labels from right ones, mean and standard deviation over seeds; "
        "the last three columns are cleanlab's.\n",
        *table(found, ["saflex-audit", *METHODS], 3),
        "\nDecisions, percent, mean over seeds; `share` is the estimated share of wrong labels.\n",
        *table(found, decisions, 0),
    ]
    print("\n".join(lines))
    if options.save:
        options.save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
