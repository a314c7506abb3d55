"""Both file formats give the same table; a bad file is named, with its column or row."""

import numpy as np
import pytest
from helpers.tables import make_table, write_csv, write_npz

from saflex_lightning.recipes.tabular.csv_file import Roles, read_csv
from saflex_lightning.recipes.tabular.npz_file import read_npz

ROLES = Roles("answer", ("colour", "size"))


def assert_same_table(one, other):
    for name, value in one._asdict().items():
        if isinstance(value, tuple):
            assert value == getattr(other, name)
        else:
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def with_missing_cells():
    table = make_table(20)
    table.numeric[3, 1] = np.nan
    table.categorical[5, 0] = -1
    return table


def test_both_formats_give_the_table_that_was_written(tmp_path):
    table = with_missing_cells()
    assert_same_table(read_npz(write_npz(tmp_path / "a.npz", table)), table)
    assert_same_table(read_csv(write_csv(tmp_path / "a.csv", table), ROLES), table)


def test_a_table_without_categorical_columns(tmp_path):
    table = make_table(20)._replace(
        categorical=np.zeros((20, 0), np.int64), categorical_names=(), levels=()
    )
    assert_same_table(read_npz(write_npz(tmp_path / "a.npz", table)), table)
    assert_same_table(read_csv(write_csv(tmp_path / "a.csv", table), Roles("answer")), table)


class TestNpz:
    @pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04broken"])
    def test_unreadable_file(self, tmp_path, content):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.npz to be a NumPy .npz archive"):
            read_npz(tmp_path / "broken.npz")

    def test_single_array(self, tmp_path):
        np.save(tmp_path / "array.npy", np.zeros(3))
        with pytest.raises(ValueError, match=r"array\.npy to be a NumPy .npz archive"):
            read_npz(tmp_path / "array.npy")

    def test_missing_keys(self, tmp_path):
        file = write_npz(tmp_path / "part.npz", make_table(), leave_out=("y", "classes"))
        with pytest.raises(ValueError, match=r"part\.npz .*\['classes', 'y'\] are missing"):
            read_npz(file)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("x_num", np.zeros((120, 3)), r"shape \(120, 2\).*shape \(120, 3\)"),
            ("x_num", np.zeros((120, 2), int), "floating numbers .* int64 of shape"),
            ("x_cat", np.zeros((9, 2), int), r"shape \(120, 2\).*shape \(9, 2\)"),
            ("y", np.zeros(120), "`y` .* integer numbers .* float64"),
            ("y", np.full(120, 2), r"codes of 'y' .* in \[0, 1\], but they range from 2 to 2"),
            ("x_cat", np.full((120, 2), 2), r"codes of 'size' .* in \[-1, 1\]"),
            ("x_num", np.full((120, 2), np.inf), "column 'height' holds an infinite one"),
        ],
    )
    def test_bad_arrays_are_named(self, tmp_path, key, value, message):
        file = write_npz(tmp_path / "bad.npz", make_table(), **{key: value})
        with pytest.raises(ValueError, match=message):
            read_npz(file)


class TestCsv:
    def read(self, tmp_path, text, roles=Roles("y")):  # noqa: B008  an immutable tuple
        file = tmp_path / "table.csv"
        file.write_text(text)
        return read_csv(file, roles)

    def test_quotes_spaces_byte_order_mark_and_empty_lines(self, tmp_path):
        table = self.read(
            tmp_path, '\ufeffa, b ,y\n1," x, y ",no\n\n 2 ,z,yes\n', Roles("y", ("b",))
        )
        assert table.numeric.tolist() == [[1.0], [2.0]]
        assert table.levels == (("x, y", "z"),)
        assert table.classes == ("no", "yes")

    def test_classes_that_are_numbers_are_sorted_as_numbers(self, tmp_path):
        table = self.read(tmp_path, "a,y\n0,10\n0,9\n0,2\n")
        assert table.classes == ("2", "9", "10")
        assert table.target.tolist() == [2, 1, 0]

    @pytest.mark.parametrize("cell", ["", "?", "NA", "N/A", "NaN", "nan", "NULL", "null"])
    def test_missing_cells(self, tmp_path, cell):
        table = self.read(tmp_path, f"a,b,y\n{cell},{cell},0\n1,x,1\n", Roles("y", ("b",)))
        assert np.isnan(table.numeric[0, 0])
        assert table.categorical[:, 0].tolist() == [-1, 0]

    def test_columns_without_a_role_are_left_out(self, tmp_path):
        table = self.read(tmp_path, "id,a,y\nfirst,1,0\nsecond,2,1\n", Roles("y", (), ("a",)))
        assert table.numeric_names == ("a",)

    @pytest.mark.parametrize(
        ("text", "roles", "message"),
        [
            ("a,y\n1,0\n", Roles("z"), r"columns \['z'\], but \['z'\] are not among .*'a', 'y'"),
            ("a,y\n1,0\n", Roles("y", ("b",)), r"but \['b'\] are not among"),
            ("a,y\n1,0\n", Roles("y", ("a",), ("a",)), r"one role, but \['a'\]"),
            ("a,a,y\n1,1,0\n", Roles("y"), r"one name and one role, but \['a'\]"),
            ("", Roles("y"), "are not among its columns"),
            ("a,y\n", Roles("y"), "hold rows below its header, but it has none"),
            ("a,y\n1,0\n1,2,3\n", Roles("y"), "2 cells in every row .* line 3 has 3"),
            ("a,y\n1,0\nred,1\n", Roles("y"), "column 'a' .* line 3 has 'red'"),
            ("a,y\ninf,0\n", Roles("y"), "column 'a' .* line 2 has 'inf'"),
            ("a,y\n1,0\n1,\n", Roles("y"), "column 'y' of line 3 is missing"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path, text, roles, message):
        with pytest.raises(ValueError, match=message) as error:
            self.read(tmp_path, text, roles)
        assert "table.csv" in str(error.value)
