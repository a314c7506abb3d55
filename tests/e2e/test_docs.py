"""What the documentation prints runs as printed, and its links, columns and messages are real."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saflex_lightning.insight.summary import ClassSummary, GroupSummary, RowSummary

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FILES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in sorted(ROOT.rglob("*.md"))
    if not {part for part in file.relative_to(ROOT).parts if part in {"site", "outputs", "build"}}
    and not any(part.startswith(".") for part in file.relative_to(ROOT).parts)
}
BLOCKS = {
    name: blocks
    for name, text in FILES.items()
    if (blocks := re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
}
# Libraries that a page is about, beyond those of the test suite.
NEEDS = {
    "docs/how-to/graphs.md": ["torch_geometric"],
    "docs/how-to/hugging_face.md": ["transformers"],
    "docs/how-to/library_modules.md": ["torchgeo", "lightly"],
}
SCRIPTS = {"docs/how-to/several_gpus.md"}  # starts processes, so that it must be a file
SLOW = {*NEEDS, *SCRIPTS, "docs/how-to/paper_tables.md"}


PAGES = [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in BLOCKS]


# Pages train without a validation step, or close to data of their own, as a first try does.
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.parametrize("name", PAGES)
def test_page_runs_as_printed(name, tmp_path, monkeypatch):
    for package in NEEDS.get(name, []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if name in SCRIPTS:
        Path("script.py").write_text("\n".join(BLOCKS[name]))
        subprocess.run([sys.executable, "script.py"], check=True, timeout=300)
        return
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(BLOCKS[name]):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)


def test_every_how_to_page_shows_what_changes_and_runs():
    how_to = {name for name in FILES if name.startswith("docs/how-to/")}
    words_alone = {"docs/how-to/troubleshooting.md"}
    assert how_to - words_alone <= BLOCKS.keys()
    assert [name for name in how_to - words_alone if "```diff" not in FILES[name]] == []
    assert {*NEEDS, *SCRIPTS} <= how_to


def test_quick_start_is_short():
    assert len([line for line in BLOCKS["README.md"][0].splitlines() if line.strip()]) < 15
    assert len(FILES["README.md"].split()) < 900


def anchors(text):
    """Names of the headings as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    prose = re.sub(r"^```.*?^```", "", FILES[name], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target
        if name.startswith("docs/"):  # the site holds nothing else
            assert file.resolve().is_relative_to(DOCS), target


def test_the_site_has_every_page():
    nav = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(nav) == sorted(str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md"))


def test_every_column_of_the_tables_is_explained():
    page = FILES["docs/how-to/read_the_report.md"]
    for name in {*RowSummary._fields, *GroupSummary._fields, *ClassSummary._fields}:
        assert re.search(rf"^\| .*`{name}`", page, flags=re.MULTILINE), name


def said(text):
    """What the package says: its strings, with the values that are filled in as `...`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "..." for p in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_of_the_troubleshooting_page_are_those_of_the_package():
    page = FILES["docs/how-to/troubleshooting.md"]
    quoted = re.findall(r"^### (.*)$", page, flags=re.MULTILINE)
    source = [
        " ".join(message.replace("`", "").split())
        for file in (ROOT / "src").rglob("*.py")
        for message in said(file.read_text())
    ]
    assert len(quoted) >= 20
    for message in quoted:
        words = message.replace("`", "")
        assert any(re.search(_pattern(words), found) for found in source), message


def _pattern(words):
    return r".*?".join(re.escape(part.strip()) for part in words.split("..."))


def test_functions_of_the_paper_table_exist():
    page = FILES["docs/paper_to_code.md"]
    names = re.findall(r"`((?:functional|engines|step|batch|data|validation)\.[\w.]+)`", page)
    assert len(set(names)) > 10
    for name in names:
        pkgutil.resolve_name(f"saflex_lightning.{name}")


def test_no_term_stands_twice_in_the_glossary():
    terms = re.findall(r"^\| ([^|]+) \|", FILES["docs/glossary.md"], flags=re.MULTILINE)[1:]
    assert terms == sorted(set(terms), key=str.lower)


@pytest.mark.parametrize("package", ["", ".data", ".engines", ".functional", ".recipes"])
def test_every_public_name_is_in_the_reference(package):
    reference = "".join(text for name, text in FILES.items() if name.startswith("docs/api/"))
    shown = set(re.findall(r"^::: \S+\.(\w+)$", reference, flags=re.MULTILINE))
    assert set(importlib.import_module(f"saflex_lightning{package}").__all__) <= shown


def test_files_that_the_pages_name_exist():
    for name, text in FILES.items():
        named = re.findall(r"`((?:tests|benchmarks|docs)/[\w./-]+\.\w+)`", text)
        missing = [path for path in named if not (ROOT / path).exists()]
        assert name == "CHANGELOG.md" or missing == [], name
