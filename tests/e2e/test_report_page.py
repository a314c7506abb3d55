"""``saflex-report``: the page of a real short run, and what is said where there is none."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from helpers.configs import compose_config

from saflex_lightning.cli.report_page import main, make_page
from saflex_lightning.cli.train import train

SHORT = (
    "model=small_cnn",
    "data.batch_size=16",
    "data.eval_batch_size=128",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "++trainer.limit_train_batches=12",
    "++trainer.limit_val_batches=1",
    "++trainer.limit_test_batches=1",
)
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run with one rival."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # undoes what `seed_everything` writes
        patch.setenv("PL_SEED_WORKERS", "0")
        rival = folder / "rivals" / "upstream"
        train(compose_config(rival, *SHORT, "method=upstream"), table=False)
        train(compose_config(folder, *SHORT, "method=saflex_robust"), table=False)
    return folder


class Reader(HTMLParser):
    """Checks that tags close in order, and keeps headings, texts and addresses."""

    def __init__(self, page):
        super().__init__()
        self.open, self.headings, self.texts, self.addresses, self.tags = [], [], [], [], set()
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [v for k, v in attributes if k in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [v for k, v in attributes if k in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def cells(folder, name):
    with (folder / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_page_shows_the_run_in_order_and_needs_nothing_else(run):
    page = make_page(run)
    read = Reader(page)
    assert read.headings == [
        "What helped and what harmed",
        "Rows whose label is doubted most",
        "Classes",
        "Curves",
        "Settings",
        "Cost",
        "Beside other runs",
    ]
    for group in cells(run, "saflex_groups.csv"):
        assert group["name"] in read.texts
        assert group["verdict"] in read.texts
    first = next(
        row for row in cells(run, "saflex_rows.csv") if row["suggested"] not in {"", row["given"]}
    )
    assert first["index"] in read.texts
    result = json.loads((run / "result.json").read_text())
    assert f"{100 * result['test_accuracy']:.2f}" in read.texts
    assert {"upstream", "saflex_robust", "preset", "robust"} <= set(read.texts)
    assert all(address.startswith(("#", "data:")) for address in read.addresses)
    assert not re.search(r"url\((?!#)", page)
    assert "script" not in read.tags
    assert page.count("<svg") >= 4


def test_the_command_writes_the_page_beside_the_run(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["saflex-report", str(run)])
    main()
    assert capsys.readouterr().out.strip() == str(run / "saflex_report.html")
    assert (run / "saflex_report.html").read_text() == make_page(run)


def test_names_and_texts_are_escaped(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    evil = "<script>alert(1)</script> $x^$ {{ 1 }}"
    for name in ("saflex_groups.csv", "saflex_rows.csv", "saflex_history.csv"):
        path = folder / name
        rows = cells(folder, name)
        column = "name" if "name" in rows[0] else "group"
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows({**row, column: evil} for row in rows)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "name": evil}))
    page = make_page(folder)
    assert "script" not in Reader(page).tags
    assert evil in Reader(page).texts


def test_other_runs_stand_beside_it_and_seeds_are_averaged(run, tmp_path):
    result = {"test_accuracy": 0.5, "steps": 24, "name": "other"}
    for seed, accuracy in ((1, 0.98), (2, 1.0)):
        other = tmp_path / str(seed)
        other.mkdir()
        known = {**result, "seed": seed, "test_accuracy": accuracy}
        (other / "result.json").write_text(json.dumps(known))
    texts = Reader(make_page(run, [tmp_path, run])).texts
    assert "99.00 ± 1.41" in texts
    assert texts.count("saflex_robust") == 2  # heading and one row of the table
    assert any("less test accuracy than other" in text for text in texts)


def test_a_run_without_saflex_says_so(run):
    page = make_page(run / "rivals" / "upstream")
    assert "This run has no tables of SAFLEX" in page
    assert "Beside other runs" not in page


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere", "but there is nothing. Give the folder"),
        (lambda path: path, "but found neither. Train with `saflex-train`"),
        (lambda path: path.parent, "It holds 1 runs; give one"),
        (lambda path: path / "broken", "it cannot be read"),
        (lambda path: path / "cut", "a line is cut short or too long"),
    ],
)
def test_what_is_no_run_is_refused_in_words(make, message, tmp_path, monkeypatch):
    home = tmp_path / "home"
    given = make(home)
    home.mkdir()
    if message.startswith("It holds"):
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "result.json").write_text("{}")
    if given.name in {"broken", "cut"}:
        given.mkdir()
        (given / "result.json").write_text("{" if given.name == "broken" else "{}")
        (given / "saflex_groups.csv").write_text("group,name\n1\n")
    monkeypatch.setattr(sys, "argv", ["saflex-report", str(given)])
    with pytest.raises(SystemExit, match=re.escape(message)):
        main()
    assert not list(tmp_path.rglob("*.html"))


def test_another_run_without_result_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"another run in .* Give the folder"):
        make_page(run, [tmp_path])


def test_without_jinja2_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2.*saflex-lightning\[report\]"):
        make_page(run)


def test_a_browser_shows_it(run, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    (tmp_path / "page.html").write_text(make_page(run))
    shot = tmp_path / "page.png"
    options = ("--headless", "--no-sandbox", "--window-size=400,3000", f"--screenshot={shot}")
    subprocess.run([browser, *options, f"file://{tmp_path}/page.html"], check=True, timeout=120)
    assert shot.stat().st_size > 10_000
