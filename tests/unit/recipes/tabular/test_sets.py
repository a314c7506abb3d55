"""The paper's sets by name: what ships, what must be found, what differs from Table 5."""

import json
import re

import numpy as np
import pytest
from helpers.tables import SHARED, make_table, write_csv, write_npz

from saflex_lightning.recipes.tabular.csv_file import Roles
from saflex_lightning.recipes.tabular.facts import SETS
from saflex_lightning.recipes.tabular.sets import make_rare, read_table

STAND_INS = {"kdd99_rare", "letter"}
shared_data = pytest.mark.skipif(
    not (SHARED / "data" / "tabular").is_dir(), reason="needs the shared data"
)


@pytest.mark.parametrize(("name", "columns"), [("qsar", 41), ("arrhythmia", 274)])
def test_shipped_sets(name, columns):
    table = read_table(name)
    assert table.numeric.shape[1] == columns
    assert sorted(table.class_counts) == list(SETS[name].class_counts)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the paper's tables")
def test_facts_are_those_of_the_paper():
    tables = json.loads((SHARED / "paper_tables.json").read_text())
    statistics, sources = tables["table5"]["rows"], tables["table6"]["rows"]
    assert SETS.keys() - STAND_INS == statistics.keys() == sources.keys()
    for name, paper in statistics.items():
        facts = SETS[name]
        assert facts.rows == paper["rows"]
        assert facts.categorical == paper["categorical"]
        assert facts.numeric == paper["continuous"] or str(paper["continuous"]) in facts.note
        assert facts.source.startswith(sources[name])
        if "positives" in paper:
            assert facts.class_counts == (paper["positives"], paper["negatives"])


@shared_data
@pytest.mark.parametrize("name", ["letter", "shrutime"])
def test_sets_in_a_folder(name):
    table = read_table(name, str(SHARED / "data" / "tabular"))
    assert len(table.classes) == SETS[name].classes


@pytest.mark.slow
@shared_data
def test_kdd_cup_and_its_rare_subsample():
    table = read_table("appetency", str(SHARED / "data" / "tabular"))
    counts = dict(zip(table.classes, table.class_counts, strict=True))
    assert counts == {"attack": 396_743, "normal": 97_278}
    rare = make_rare(table)
    assert rare.classes == ("normal", "attack")
    assert tuple(sorted(rare.class_counts)) == SETS["kdd99_rare"].class_counts
    assert rare.target.mean() == pytest.approx(492 / 284_807, rel=0.01)


def test_rare_subsample_keeps_distinct_normal_rows_and_some_attacks():
    table = make_table(3000)._replace(classes=("attack", "normal"))
    normal = table.numeric[table.target == 1]
    twice = table._replace(
        numeric=np.tile(table.numeric, (2, 1)),
        categorical=np.tile(table.categorical, (2, 1)),
        target=np.tile(table.target, 2),
    )
    rare = make_rare(twice)
    np.testing.assert_array_equal(rare.numeric[rare.target == 0], normal)
    assert rare.target.sum() == round(len(normal) * 0.00173)
    with pytest.raises(ValueError, match=r"\['attack', 'normal'\] of KDD .* got \['no', 'yes'\]"):
        make_rare(make_table())


@pytest.mark.parametrize("name", sorted(SETS.keys() - {"qsar", "arrhythmia"}))
def test_a_missing_file_names_file_folder_and_source(tmp_path, name):
    facts = SETS[name]
    with pytest.raises(FileNotFoundError) as error:
        read_table(name, str(tmp_path))
    for part in (f"{facts.stems[0]}.npz", f"{facts.stems[0]}.csv", str(tmp_path), facts.source):
        assert part in str(error.value)


def test_another_table_than_the_named_one(tmp_path):
    file = write_npz(tmp_path / "mine.npz", make_table())
    message = (
        "'shrutime' to have 10000 rows, 8 numeric columns, 3 categorical columns, "
        f"(2037, 7963) rows per class, but {file} has 120, 2, 2, "
    )
    with pytest.raises(ValueError, match=re.escape(message) + ".*Table 5"):
        read_table("shrutime", str(file))
    with pytest.raises(ValueError, match="Table 5 says 226"):
        read_table("arrhythmia", str(file))


def test_a_csv_of_ones_own(tmp_path):
    table = make_table()
    file = str(write_csv(tmp_path / "mine.csv", table))
    found = read_table(None, file, roles=Roles("answer", ("colour", "size")))
    np.testing.assert_array_equal(found.numeric, table.numeric)
    with pytest.raises(ValueError, match=r"roles of the columns of .*mine\.csv, but `target` is"):
        read_table(None, file)


def test_a_csv_of_a_set_has_its_usual_roles(tmp_path):
    columns = ["Time", *(f"V{number}" for number in range(1, 29)), "Amount", "Class"]
    cells = ",".join("1" for _ in columns[:-1])
    (tmp_path / "creditcard.csv").write_text(f"{','.join(columns)}\n{cells},0\n{cells},1\n")
    with pytest.raises(ValueError, match=r"to have 284807 rows, \(492, 284315\) rows per class, "):
        read_table("credit", str(tmp_path))  # 29 numeric columns and 2 classes, as there should be


@pytest.mark.parametrize(
    ("name", "path", "error", "message"),
    [
        ("quasar", None, ValueError, r"`dataset` to be one of \['appetency', .* got 'quasar'"),
        (None, None, ValueError, "`path` to name a .npz or .csv file where `dataset` is None"),
        (None, "absent.csv", FileNotFoundError, r"no file at absent\.csv"),
    ],
)
def test_bad_names(name, path, error, message):
    with pytest.raises(error, match=message):
        read_table(name, path)


def test_another_kind_of_file(tmp_path):
    (tmp_path / "mine.arff").write_text("")
    with pytest.raises(ValueError, match=r"ends in .npz or .csv, but got .*mine\.arff"):
        read_table(None, str(tmp_path / "mine.arff"))
