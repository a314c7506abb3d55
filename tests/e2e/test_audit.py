"""``saflex-audit`` on files as users have them: what it finds, going on after a stop, bad input."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.configs import compose_config
from helpers.folders import make_image_folders, make_pool
from helpers.tables import make_table, write_csv, write_npz
from PIL import Image
from sklearn.datasets import load_digits

from saflex_lightning.audit.items import read_images
from saflex_lightning.audit.judging import judge_items
from saflex_lightning.audit.sources import Run, open_run, read_paths, read_run_rows, read_shipped
from saflex_lightning.cli.audit import main
from saflex_lightning.cli.train import train
from saflex_lightning.recipes import GeneratedDataModule, SmallCNN
from saflex_lightning.recipes.label_noise import plant_wrong_labels

TRUSTED, POOL = 110, 90
ROWS = "saflex_audit.csv"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Class folders of digits: trusted ones, and a pool a fifth of whose labels are wrong."""
    root = tmp_path_factory.mktemp("digits")
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))[: TRUSTED + POOL]
    target = torch.as_tensor(found.target[order])
    given = plant_wrong_labels(target, 10, 0.2, torch.Generator().manual_seed(0))
    given[:TRUSTED] = target[:TRUSTED]
    for number, (row, label) in enumerate(zip(order, given.tolist(), strict=True)):
        image = Image.fromarray((found.images[row] * 255 / 16).astype(np.uint8))
        part = "trusted" if number < TRUSTED else "pool"
        file = root / part / f"digit {label}" / f"{number:03d}_{target[number]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return root


@pytest.fixture(scope="module")
def judged(digits, tmp_path_factory):
    """Folder of the audit of these."""
    folder = tmp_path_factory.mktemp("judged")
    judge_items(sources_of(digits), folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command with some arguments, and return what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["saflex-audit", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


def read(folder):
    with (folder / ROWS).open(newline="") as stream:
        return list(csv.DictReader(stream))


def is_wrong(row):
    """Whether the digit's file name, which has the truth, says something else than its folder."""
    return row["given"][-1] != Path(row["item"]).stem[-1]


def sources_of(digits):
    return read_paths(digits / "pool", digits / "trusted")


def test_wrong_labels_of_a_folder_are_found(digits, judged, call):
    printed = call(digits / "pool", "--trusted", digits / "trusted", "-o", judged)
    rows = read(judged)
    files = sorted(path.relative_to(digits / "pool") for path in digits.glob("pool/*/*"))
    assert [row["item"] for row in rows] == list(map(str, files))
    assert all(row["given"] == Path(row["item"]).parent.name for row in rows)
    wrong = sum(map(is_wrong, rows))
    worst = sorted(rows, key=lambda row: float(row["score"]))[:wrong]
    assert sum(map(is_wrong, worst)) > 0.75 * wrong
    doubted = [row for row in rows if row["decision"] != "keep"]
    assert sum(map(is_wrong, doubted)) > 0.8 * len(doubted) > 0
    assert all(row["suggested"] != row["given"] for row in rows if row["decision"] == "relabel")
    assert all(float(row["score"]) < 0.5 for row in doubted)
    assert all(0 <= float(row["standard_error"]) < 1 for row in rows)
    with Image.open(judged / "saflex_audit.png") as grid:
        assert grid.size[0] > 300
    state = json.loads((judged / "saflex_audit.json").read_text())
    assert state["decisions"]["doubt"] + state["decisions"]["relabel"] == len(doubted)
    assert worst[0]["item"] in printed
    assert f"share of wrong labels: {100 * state['wrong_share'][0]:.0f} ±" in printed


def test_an_audit_that_was_stopped_goes_on_to_the_same_file(digits, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    judge_items(sources_of(digits), whole, batch_size=32)

    def stop(rows):
        if rows > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_items(sources_of(digits), parts, batch_size=32, on_rows=stop)
    assert len(read(parts)) == 64
    with (parts / ROWS).open("ab") as stream:  # what a kill in the middle of a batch leaves
        stream.write(b"digit 1/half a li")
    seen = []
    audit = judge_items(sources_of(digits), parts, batch_size=32, on_rows=seen.append)
    assert seen[0] == 64
    assert (parts / ROWS).read_bytes() == (whole / ROWS).read_bytes()
    assert json.loads((parts / "saflex_audit.json").read_text()) == json.loads(
        (whole / "saflex_audit.json").read_text()
    )
    # One that is finished is not computed again.
    changed = (parts / ROWS).stat().st_mtime_ns
    assert judge_items(sources_of(digits), parts, batch_size=32) == audit
    assert (parts / ROWS).stat().st_mtime_ns == changed


def test_a_stop_by_the_user_says_how_to_go_on(digits, call, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("saflex_lightning.cli.audit.judge_items", stop)
    with pytest.raises(SystemExit, match="The same command goes on"):
        call(digits / "pool", "--trusted", digits / "trusted", "-o", tmp_path)


def test_the_file_of_another_audit_is_left_alone(digits, tmp_path):
    root, output = tmp_path / "digits", tmp_path / "out"
    shutil.copytree(digits, root)
    judge_items(sources_of(root), output)
    before = (output / ROWS).read_bytes()

    def refuse(**settings):
        with pytest.raises(FileExistsError, match="to be a part of this audit"):
            judge_items(sources_of(root), output, **settings)
        assert (output / ROWS).read_bytes() == before

    refuse(batch_size=7)
    file = next(root.glob("pool/digit 3/*"))
    other = file.rename(root / "pool" / "digit 4" / file.name)
    refuse()
    times = other.rename(file).stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    refuse()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    judge_items(sources_of(root), output)  # as it was
    trusted = next(root.glob("trusted/digit 3/*"))
    content = trusted.read_bytes()
    trusted.unlink()
    refuse()
    trusted.write_bytes(content)
    (output / "saflex_audit.json").unlink()
    refuse()


@pytest.mark.slow
def test_a_manifest_has_the_scores_of_its_folder(digits, judged, call, tmp_path):
    pool = tmp_path / "pool"
    shutil.copytree(digits / "pool", pool)
    names = [row["item"] for row in read(judged)]
    with (pool / "manifest.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "class", "source", "generator", "prompt"])
        writer.writerows([name, Path(name).parent.name, "", "painter", ""] for name in names)
    call(pool, "--trusted", digits / "trusted", "-o", tmp_path)
    assert read(tmp_path) == read(judged)


def test_images_that_cannot_be_read_are_told_and_change_no_other(digits, judged, call, tmp_path):
    pool = tmp_path / "pool"
    shutil.copytree(digits / "pool", pool)
    files = sorted(pool.glob("*/*"))
    files[0].write_bytes(files[0].read_bytes()[:60])
    files[-1].write_text("no image")
    printed = call(pool, "--trusted", digits / "trusted", "-o", tmp_path)
    good, bad = read(judged), read(tmp_path)
    for row in bad[0], bad[-1]:
        assert (row["score"], row["suggested"], row["decision"]) == ("", "", "unreadable")
    close = [
        abs(float(b["score"]) - float(g["score"]))
        for g, b in zip(good, bad, strict=True)
        if b["score"]
    ]
    assert max(close) < 0.1  # the estimated share of wrong labels moves a little
    assert "unreadable" in printed


@pytest.mark.slow
def test_names_that_spreadsheets_would_run_are_marked(digits, call, tmp_path):
    for part in ("pool", "trusted"):
        shutil.copytree(digits / part, tmp_path / part)
        (tmp_path / part / "digit 0").rename(tmp_path / part / "=0")
    call(tmp_path / "pool", "--trusted", tmp_path / "trusted", "-o", tmp_path)
    rows = read(tmp_path)
    assert rows[0]["item"].startswith("'=0/")
    assert rows[0]["given"] == "'=0"


# Tables


def write_tables(folder):
    """A pool and trusted rows, whose columns stand in another order and which lack a level."""
    pool, trusted = make_table(90, seed=1), make_table(80, seed=2)
    pool.categorical[:5, 0] = -1
    pool.target[:8] = 1 - pool.target[:8]
    trusted.categorical[trusted.categorical == 2] = 0
    turned = trusted._replace(
        numeric=trusted.numeric[:, ::-1], numeric_names=trusted.numeric_names[::-1]
    )
    files = [write_csv(folder / "pool.csv", pool), write_csv(folder / "trusted.csv", turned)]
    return files, [write_npz(folder / "pool.npz", pool), write_npz(folder / "trusted.npz", trusted)]


def test_rows_of_tables(call, tmp_path):
    (pool, trusted), archives = write_tables(tmp_path)
    roles = ["--target", "answer", "--categorical", "colour", "size"]
    printed = call(pool, "--trusted", trusted, *roles, "-o", tmp_path / "csv")
    rows = read(tmp_path / "csv")
    assert [row["item"] for row in rows] == [str(row) for row in range(90)]
    worst = sorted(rows, key=lambda row: float(row["score"]))[:8]
    assert sum(int(row["item"]) < 8 for row in worst) >= 6
    assert not (tmp_path / "csv" / "saflex_audit.png").exists()
    assert f" {worst[0]['item']} " in printed
    call(archives[0], "--trusted", archives[1], "-o", tmp_path / "npz")
    for row, other in zip(rows, read(tmp_path / "npz"), strict=True):
        # The archive tells of one more level, which no trusted row has.
        assert abs(float(row["score"]) - float(other["score"])) < 0.05


def test_parquet_has_the_rows_too(judged):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(judged / "saflex_audit.parquet").to_pylist()
    assert list(rows[0]) == list(read(judged)[0])
    for row, cells in zip(rows, read(judged), strict=True):
        assert row["item"] == cells["item"]
        assert row["score"] == float(cells["score"])


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a short run with a checkpoint, and its settings where Hydra writes them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # undoes what `seed_everything` writes
        patch.setenv("PL_SEED_WORKERS", "0")
        cfg = compose_config(
            folder,
            "experiment=weak_labels",
            "method=upstream",
            "trainer.accelerator=cpu",
            "trainer.max_epochs=2",
            "trainer.enable_progress_bar=false",
            "++trainer.limit_val_batches=1",
            "++trainer.limit_test_batches=1",
        )
        train(cfg, table=False)
    return folder


def test_the_rows_of_a_run_are_judged_by_its_network(run, call, tmp_path):
    printed = call("--run", run, "-o", tmp_path)
    rows = read(tmp_path)
    assert len(rows) == 1200
    assert float(printed.split("AUROC of ")[1].split(".\n")[0]) > 0.8
    network = open_run(run).network
    inputs = read_run_rows(open_run(run)).doubted.inputs
    with torch.no_grad():
        expected = network(torch.stack([inputs[0], inputs[1]]))
    weights = torch.load(next(run.rglob("*.ckpt")), weights_only=True)["state_dict"]
    assert torch.equal(network.state_dict()["network.1.weight"], weights["network.1.weight"])
    assert expected.shape == (2, 8)
    assert {row["given"] for row in rows} >= {"basophil", "eosinophil"}


def test_the_network_of_a_second_run_inside_is_another_ones(run, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(run, home)
    shutil.copytree(run, home / "second")  # newer
    own = home / "checkpoints" / "last.ckpt"
    assert open_run(home).checkpoint == own
    assert open_run(home / "checkpoints").checkpoint == own
    assert open_run(home / "second").checkpoint == home / "second" / "checkpoints" / "last.ckpt"


def test_a_manifest_may_name_files_elsewhere_and_classes_that_begin_with_signs(tmp_path):
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    image.save(tmp_path / "=a.png")
    (tmp_path / "pool").mkdir()
    with (tmp_path / "pool" / "manifest.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file", "class"], [tmp_path / "=a.png", "'+"]])
    items = read_images(tmp_path / "pool", (3, 8, 8))
    assert (items.names, items.classes) == (["../=a.png"], ["+"])
    assert items.inputs[0].shape == (3, 8, 8)


def test_a_file_name_that_is_no_text_is_named(tmp_path):
    folder = tmp_path / "cat"
    folder.mkdir()
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))).write_bytes(b"")
    with pytest.raises(ValueError, match=r"in UTF-8, but got 'cat/caf\\udce9\.png'"):
        read_images(tmp_path, (3, 8, 8))


def test_of_a_run_with_a_pool_the_pool_is_judged(tmp_path):
    data = GeneratedDataModule(
        str(make_image_folders(tmp_path / "real")),
        str(make_pool(tmp_path / "pool")),
        image_size=8,
        label_noise=0.5,
    )
    data.setup("fit")
    file = tmp_path / "a.ckpt"
    file.write_bytes(b"")
    sources = read_run_rows(Run(file, SmallCNN(3, 3), data))
    assert list(sources.doubted.classes) == ["cat", "dog", "eel"]
    truth = [Path(name).parent.name for name in sources.doubted.names]
    given = [sources.doubted.classes[label] for label in sources.doubted.target]
    assert [a != b for a, b in zip(truth, given, strict=True)] == sources.wrong.tolist()
    assert 0 < sources.wrong.sum() < len(truth) == 48
    assert len(sources.trusted.target) == 6


@pytest.mark.slow
def test_a_folder_is_judged_by_the_network_of_a_run(run, digits, call, tmp_path):
    """Its scores are those of other classes, and of images of its own size."""
    command = [digits / "pool", "--trusted", digits / "trusted", "--run"]
    checkpoint = next(run.rglob("*.ckpt"))
    call(*command, run, "-o", tmp_path / "run")
    call(*command, checkpoint, "-o", tmp_path / "file")
    call(*command[:-1], "-o", tmp_path / "patches")
    assert read(tmp_path / "run") == read(tmp_path / "file") != read(tmp_path / "patches")
    assert read_paths(*(digits / n for n in ("pool", "trusted")), run=open_run(run)).doubted.inputs[
        0
    ].shape == (3, 28, 28)


@pytest.mark.slow
def test_rows_of_a_table_by_the_network_of_a_run(call, tmp_path):
    (pool, trusted), (_, archive) = write_tables(tmp_path)
    folder = tmp_path / "run"
    cfg = compose_config(
        folder,
        "data=tabular",
        "data.dataset=null",
        f"data.path={archive}",
        "data.batch_size=16",
        "augmentation=tabular_cutmix",
        "model=tabular_mlp",
        "model.lr=0.01",
        "method=upstream",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=20",
        "trainer.enable_progress_bar=false",
    )
    train(cfg, table=False)
    roles = ["--target", "answer", "--categorical", "colour", "size"]
    call(pool, "--trusted", trusted, *roles, "--run", folder, "-o", tmp_path / "out")
    rows = read(tmp_path / "out")
    worst = sorted(rows, key=lambda row: float(row["score"]))[:8]
    assert sum(int(row["item"]) < 8 for row in worst) >= 5


@pytest.mark.slow
def test_what_ships_with_the_package(call, tmp_path):
    printed = call("-o", tmp_path)
    assert float(printed.split("AUROC of ")[1].split(".\n")[0]) > 0.97
    assert len(read(tmp_path)) == 1200


def test_the_shipped_rows_are_judged_by_right_labels():
    sources = read_shipped()
    assert sources.wrong.float().mean() == pytest.approx(0.2, abs=0.02)
    assert len(sources.trusted.target) == 400


# Bad input


def test_bad_input_is_refused_in_a_sentence_and_leaves_nothing(digits, run, call, tmp_path, capsys):
    pool, trusted, output = digits / "pool", digits / "trusted", tmp_path / "out"
    empty, one = tmp_path / "empty", tmp_path / "one"
    empty.mkdir()
    shutil.copytree(trusted / "digit 0", one / "digit 0")
    shutil.copytree(trusted, tmp_path / "strange")
    (tmp_path / "strange" / "digit 7").rename(tmp_path / "strange" / "seven")
    shutil.copytree(trusted, tmp_path / "broken")
    next(tmp_path.glob("broken/*/*")).write_text("no image")
    (tmp_path / "missing.csv").write_text("file,class\nno.png,digit 1\n")
    (tmp_path / "table.csv").write_text("height,answer\n1,yes\n2,no\n")
    (tmp_path / "other.csv").write_text("weight,answer\n1,yes\n2,no\n")
    alone = shutil.copytree(run, tmp_path / "alone")
    next(alone.rglob("*.ckpt")).unlink()
    odd = shutil.copytree(run, tmp_path / "odd")
    torch.save({"weights": {}}, next(odd.rglob("*.ckpt")))
    torn = shutil.copytree(run, tmp_path / "torn")
    next(torn.rglob("*.ckpt")).write_bytes(b"torn")
    steered = shutil.copytree(run, tmp_path / "steered")
    config = steered / "config.yaml"
    config.write_text(config.read_text().replace("steering: val", "steering: train"))
    garbled = shutil.copytree(run, tmp_path / "garbled")
    (garbled / "config.yaml").write_text("data: [")
    table, other = tmp_path / "table.csv", tmp_path / "other.csv"
    cases = [
        ([tmp_path / "no", "--trusted", trusted], "there is nothing"),
        ([empty, "--trusted", trusted], "there is none"),
        ([pool, "--trusted", empty], "there is none"),
        ([pool, "--trusted", one], "are not. Rename them"),
        ([one, "--trusted", one], "two classes or more"),
        ([tmp_path / "strange", "--trusted", trusted], r"\['seven'\] are not"),
        ([pool, "--trusted", tmp_path / "broken"], "that can be read"),
        ([tmp_path / "missing.csv", "--trusted", trusted], "none of 1 can"),
        ([table, "--trusted", trusted], "columns"),
        ([table, "--trusted", trusted, "--target", "answer"], "of one kind"),
        ([table, "--trusted", other, "--target", "answer"], "numeric columns"),
        ([table, "--trusted", table, "--target", "label"], "columns"),
        (["--run", tmp_path / "no"], "there is nothing"),
        (["--run", empty], r"config\.yaml"),
        (["--run", alone], "there is none. Train with"),
        (["--run", odd], "KeyError"),
        (["--run", torn], "cannot be loaded"),
        (["--run", garbled], "as `saflex-train` writes it"),
        (["--run", steered], "trusted rows beside the training rows"),
        ([table, "--trusted", table, "--target", "answer", "--run", run], "of one kind"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit, match=message) as error:
            call(*arguments, "-o", output)
        assert "Expected" in str(error.value), arguments
        assert not output.exists(), arguments
    with pytest.raises(SystemExit, match="to be a folder"):
        call(pool, "--trusted", trusted, "-o", table)
    for arguments in (
        [pool],
        ["--trusted", trusted],
        ["--batch-size", "0"],
        ["--device", "abacus"],
    ):
        with pytest.raises(SystemExit):
            call(*arguments, "-o", output)
        assert "expected" in capsys.readouterr().err
