"""The paper's numbers, and the tables with ours beside them."""

import pytest
from helpers.benchmarks import load_benchmark
from helpers.configs import render

paper = load_benchmark("paper")
make_paper_tables, paper_cell = paper.make_paper_tables, paper.paper_cell

ROWS = {
    "no_aug": "table1/no_aug",
    "upstream": "table1/randaugment",
    "saflex_paper": "table1/saflex_randaugment",
    "uniform": None,
}


def result(name, accuracy, *overrides, column="blood", **changed):
    settings = {
        "table": "table1",
        "cells": [{"column": column, "metric": "test_accuracy"}],
        "rows": ROWS,
        "references": {"LP-A3": "table8/lp_a3"},
        **changed,
    }
    return {
        "name": name,
        "test_accuracy": accuracy,
        "overrides": list(overrides),
        "paper": settings,
    }


def lines(results):
    (table,) = make_paper_tables(results)
    return render(table).splitlines()


def line_of(label, results):
    return next(line for line in lines(results) if f" {label} " in line)


@pytest.mark.parametrize(
    ("row", "column", "mean", "spread"),
    [
        ("table1/saflex_randaugment", "path", 95.11, 0.14),
        ("table1/mixup", "organs", 80.99, 0.21),
        ("table2/saint_cutmix", "qsar", 98.61, 0.06),
        ("table3/img2img_saflex", "cub_fine_grained", 73.22, 0.63),
        ("table4/flyp_saflex", "ood", 36.9, 1.5),
        ("table7/soft_augmentation", "derma", 77.05, 0.24),
        ("table8/lp_a3", "tissue", 68.63, 0.14),
    ],
)
def test_cells_as_printed_in_the_paper(row, column, mean, spread):
    assert paper_cell(row, column) == (mean, spread)


def test_every_row_of_a_table_has_the_same_columns():
    for table in paper.read_paper_tables().values():
        columns = [tuple(row) for row in table["rows"].values()]
        assert len(set(columns)) == 1


def test_ours_beside_theirs_with_mean_spread_and_seeds():
    results = [result("upstream", 0.80), result("upstream", 0.84), result("no_aug", 0.9)]
    row = line_of("upstream", results)
    assert "95.00 ± 0.21" in row
    assert "82.00 ± 2.83 (2)" in row
    row = line_of("no_aug", results)
    assert "96.81 ± 0.19" in row
    assert "90.00 (1)" in row


def test_what_was_not_run_says_so():
    results = [result("no_aug", 0.9), result("upstream", 0.8, "data=pathmnist", column="path")]
    assert line_of("saflex_paper", results).count("not measured") == 2
    assert line_of("uniform", results).count(" - ") == 2  # the paper has no such row
    row = line_of("no_aug", results)
    assert "90.00 (1)" in row
    assert row.count("not measured") == 1
    row = line_of("LP-A3 (the paper's reference)", results)
    assert "96.97 ± 0.06" in row
    assert "94.42 ± 0.24" in row
    assert row.count("not run here") == 2


def test_other_settings_get_lines_of_their_own():
    results = [result("upstream", 0.8), result("upstream", 0.7, "batch=union")]
    assert "70.00 (1)" in line_of("upstream batch=union", results)
    assert "95.00 ± 0.21" in line_of("upstream batch=union", results)


@pytest.mark.parametrize("others", [[], [result("no_aug", 0.9)]])
def test_another_upstream_augmentation_stands_beside_nothing(others):
    changed = result("upstream", 0.8, "augmentation=augmix")
    text = "\n".join(lines([changed, *others]))
    label = "upstream augmentation=augmix" if others else "upstream"
    assert "95.00" not in line_of(label, [changed, *others])
    assert "augmentation=augmix" in text


def test_settings_of_all_jobs_are_told_below_the_table():
    results = [result("upstream", 0.8, "batch=union"), result("no_aug", 0.7, "batch=union")]
    assert any("batch=union" in line for line in lines(results)[-2:])
    assert "80.00 (1)" in line_of("upstream", results)


def test_a_set_that_is_not_in_the_paper():
    row = line_of("no_aug", [result("no_aug", 0.9, column="blood_subset")])
    assert "90.00 (1)" in row
    assert " - " in row


def test_runs_without_a_table_make_none():
    assert make_paper_tables([{"name": "no_aug", "overrides": [], "paper": None}]) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"table": "table9"}, "table 'table9' and the unknown rows []"),
        ({"rows": {"no_aug": "table1/none"}}, r"unknown rows ['table1/none']"),
        ({"references": {"LP-A3": "lp_a3"}}, r"unknown rows ['lp_a3']"),
    ],
)
def test_unknown_rows_are_named(change, found):
    with pytest.raises(ValueError, match="Expected `paper` to name tables and rows") as error:
        paper.check_paper(result("no_aug", 0.9, **change)["paper"])
    assert found in str(error.value)
