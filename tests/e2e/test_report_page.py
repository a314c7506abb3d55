"""``saflex-report``: the page of a real short run, and what is said where there is none."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
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
        assert group["verdict"].removesuffix(" within error") in read.texts
        assert f"{float(group['wrong_labels']):.0%}" in read.texts
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


def with_evil_names(run, tmp_path):
    """Copy a run, and give it and its groups a name that is markup, a formula and a template."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    evil = "<script>alert(1)</script> <img src=http://localhost:9/x> $x^$ {{ 1 }}"
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
    return folder, evil


def test_names_and_texts_are_escaped(run, tmp_path):
    folder, evil = with_evil_names(run, tmp_path)
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


def test_runs_of_a_method_with_other_settings_are_not_averaged(run, tmp_path):
    """They have the same seed."""
    other = tmp_path / "longer"
    other.mkdir()
    result = json.loads((run / "result.json").read_text())
    (other / "result.json").write_text(json.dumps({**result, "test_accuracy": 1.0}))
    texts = Reader(make_page(run, [other])).texts
    rows = [f"{result['name']} ({folder})" for folder in (run, other)]
    assert [text for text in texts if text in rows] == rows
    assert "100.00" in texts
    assert any(f"less test accuracy than {rows[1]}" in text for text in texts)


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
    ],
)
def test_what_is_no_run_is_refused_in_words(make, message, tmp_path, monkeypatch):
    home = tmp_path / "home"
    given = make(home)
    home.mkdir()
    if message.startswith("It holds"):
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "result.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["saflex-report", str(given)])
    with pytest.raises(SystemExit, match=re.escape(message)):
        main()
    assert not list(tmp_path.rglob("*.html"))


DAMAGES = {
    ("result.json", "cut"): (lambda text: text[:40], "it cannot be read"),
    ("result.json", "a list"): (lambda text: "[]", "it holds no mapping of names"),
    ("result.json", "a word"): (lambda text: '{"steps": "many"}', "its `steps` is no number"),
    ("saflex_groups.csv", "a word"): (
        lambda text: re.sub(r",\d+,", ",abc,", text),
        "could not convert string to float: 'abc'",
    ),
    ("saflex_groups.csv", "bytes"): (lambda text: "\udcff" + text, "can't decode byte 0xff"),
    ("saflex_classes.csv", "a column"): (
        lambda text: text.replace("mean_belief", "belief"),
        "there is no column ['mean_belief']",
    ),
    ("saflex_rows.csv", "a cell"): (lambda text: text + "1,2\r\n", "is cut short or too long"),
    ("saflex_rows.csv", "its end"): (lambda text: text[:-4], "its end is cut off"),
    ("saflex_history.csv", "empty"): (
        lambda text: "",
        "there is no column ['group', 'mean_weight'",
    ),
    ("csv/metrics.csv", "a word"): (
        lambda text: re.sub(r"0\.\d+", "x", text, count=1),
        "could not convert string to float",
    ),
}


@pytest.mark.parametrize(
    ("place", "damage"), DAMAGES.items(), ids=[f"{file}-{what}" for file, what in DAMAGES]
)
def test_a_damaged_file_is_named_and_nothing_written(run, tmp_path, monkeypatch, place, damage):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "saflex_report.html").unlink(missing_ok=True)
    file, (spoil, message) = tmp_path / "run" / place[0], damage
    text = file.read_bytes().decode()
    file.write_bytes(spoil(text).encode(errors="surrogateescape"))
    assert file.read_bytes() != text.encode()
    monkeypatch.setattr(sys, "argv", ["saflex-report", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=rf"{re.escape(str(file))} as .*{re.escape(message)}"):
        main()
    assert not list(tmp_path.rglob("*.html"))


def test_a_folder_of_runs_is_no_run(run, tmp_path, monkeypatch):
    for name in ("first", "second"):
        shutil.copytree(run / "rivals" / "upstream", tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["saflex-report", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"It holds 2 runs; give one, .*first for instance"):
        main()


def test_a_page_that_cannot_be_written_is_said(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    given = ["saflex-report", str(run), "-o", str(tmp_path / "file" / "page.html")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match=r"Expected to write the page to .* with --output"):
        main()


def test_another_run_without_result_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"another run in .* Give the folder"):
        make_page(run, [tmp_path])


def test_without_jinja2_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2.*saflex-lightning\[report\]"):
        make_page(run)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
SCHEMES = {"light": "1", "dark": "0"}  # preferred by the reader, as Chromium numbers them
LOOK = """
<iframe width="390" height="800" srcdoc="PAGE"></iframe><pre></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const style = (element) => frame.contentWindow.getComputedStyle(element);
  const texts = [...page.querySelectorAll("h1, h2, p, td, th, figcaption, summary, svg text")];
  document.querySelector("pre").textContent = JSON.stringify({
    width: [root.clientWidth, root.scrollWidth],
    outside: texts.filter((each) => !each.closest(".wide"))
      .filter((each) => each.getBoundingClientRect().right > root.clientWidth)
      .map((each) => each.textContent),
    colors: texts.map((each) => each.closest("svg") ? style(each).fill : style(each).color),
    ground: style(page.body).backgroundColor,
    rows: [...page.querySelectorAll("table")].map((table) => table.rows.length),
    images: [...page.images].map((image) => image.naturalWidth),
    charts: [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().height),
    scripts: page.scripts.length,
    requests: frame.contentWindow.performance.getEntriesByType("resource")
      .map((entry) => entry.name).filter((name) => !name.startsWith("data:")),
    text: page.body.innerText,
  });
};
</script>
"""


def look_at(page, folder, scheme="light"):
    """What a browser makes of a page on a phone, 390 pixels wide."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(LOOK.replace("PAGE", escape(page)))
    options = (
        *("--headless", "--no-sandbox", "--dump-dom", "--virtual-time-budget=10000"),
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    )
    command = [BROWSER, *options, wrapper.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return json.loads(unescape(re.search("<pre>(.*)</pre>", dom, flags=re.DOTALL)[1]))


def luminance(color):
    """Relative luminance of a colour, as the Web Content Accessibility Guidelines define it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    dark, bright = sorted((luminance(first), luminance(second)))
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
class TestInABrowser:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_phone_shows_it(self, run, tmp_path, scheme):
        seen = look_at(make_page(run), tmp_path, scheme)
        assert seen["width"] == [390, 390]
        assert seen["outside"] == []
        assert seen["requests"] == []
        assert (luminance(seen["ground"]) < 0.5) == (scheme == "dark")
        assert min(contrast(color, seen["ground"]) for color in {*seen["colors"]}) >= 4.5
        assert len(seen["rows"]) == 6
        assert min(seen["rows"]) > 1
        assert min(seen["charts"]) > 100
        assert min(seen["images"]) > 100
        for group in cells(run, "saflex_groups.csv"):
            assert group["name"] in seen["text"]

    def test_it_runs_nothing_of_what_names_say(self, run, tmp_path):
        folder, evil = with_evil_names(run, tmp_path)
        seen = look_at(make_page(folder), tmp_path)
        assert seen["scripts"] == 0
        assert seen["requests"] == []
        assert seen["width"] == [390, 390]
        assert evil in seen["text"]

    def test_what_loads_or_overflows_would_be_seen(self, run, tmp_path):
        page = re.sub("<meta http-equiv[^>]*>", "", make_page(run))
        more = '<img src="http://localhost:9/x.png"><p style="width: 500px">wide</p><h1>'
        seen = look_at(page.replace("<h1>", more, 1), tmp_path)
        assert seen["requests"] == ["http://localhost:9/x.png"]
        assert seen["width"][1] > 390
        assert "wide" in seen["outside"]
