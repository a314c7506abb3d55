"""Both file formats give the same table; a bad file is named, with its column or row."""

import csv
import io
import os
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from helpers.tables import make_table, write_csv, write_npz
from hypothesis import given, settings
from hypothesis import strategies as st

from saflex_lightning.recipes.tabular import TabularDataModule
from saflex_lightning.recipes.tabular.csv_file import MISSING, Roles, read_csv
from saflex_lightning.recipes.tabular.npz_file import read_npz

ROLES = Roles("answer", ("colour", "size"))
CELLS = st.one_of(
    st.sampled_from(["a", "7", "NA", " b ", '"q"', '"a, b"', '"x\ny"', '"say ""hi"""', ""]),
    st.text(st.sampled_from("ab\",\n\r '1\té"), max_size=4),
)


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

    @pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
    def test_a_file_cut_short(self, tmp_path, place):
        file = write_npz(tmp_path / "cut.npz", make_table())
        content = file.read_bytes()
        file.write_bytes(content[: int(place * len(content))])
        with pytest.raises(ValueError, match=r"cut\.npz to be a NumPy .npz archive"):
            read_npz(file)

    @pytest.mark.parametrize("key", ["x_num", "num_names", "x_cat", "y", "classes", "levels_size"])
    def test_a_broken_member_is_named(self, tmp_path, key):
        file = write_npz(tmp_path / "rot.npz", make_table())
        content = bytearray(file.read_bytes())
        content[content.find(f"{key}.npy".encode()) + 160] ^= 255
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"`{key}` of .*rot\.npz to be an array .*Write the"):
            read_npz(file)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_names", np.array(["height", "weight"], object)),
            ("y", np.array([{}] * 120, object)),
        ],
    )
    def test_pickled_objects_are_refused(self, tmp_path, key, value):
        file = write_npz(tmp_path / "object.npz", make_table(), **{key: value})
        with pytest.raises(ValueError, match=rf"`{key}` of .*object\.npz to be an array wit"):
            read_npz(file)

    def test_members_that_are_no_arrays_or_encrypted(self, tmp_path):
        file = write_npz(tmp_path / "odd.npz", make_table(), leave_out=("y",))
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("y", b"no array")
        with pytest.raises(ValueError, match=r"`y` of .*odd\.npz to be integer numbers .* \|S8"):
            read_npz(file)
        content = bytearray(write_npz(tmp_path / "locked.npz", make_table()).read_bytes())
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.find(mark) + place] |= 1  # says that it is encrypted
        (tmp_path / "locked.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"locked\.npz to be an array .*encrypted"):
            read_npz(tmp_path / "locked.npz")

    def test_a_header_that_promises_too_much(self, tmp_path):
        file = write_npz(tmp_path / "big.npz", make_table(), leave_out=("x_num",))
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": "<f8", "fortran_order": False, "shape": (2**45, 2)}
        )
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("x_num.npy", head.getvalue())
        with pytest.raises(ValueError, match=r"`x_num` of .*big\.npz to be an array"):
            read_npz(file)

    def test_names_as_bytes_are_names(self, tmp_path):
        table = make_table(20)
        num_names, classes = np.array([b"height", b"weight"]), np.array([b"no", b"yes"])
        file = write_npz(tmp_path / "a.npz", table, num_names=num_names, classes=classes)
        assert_same_table(read_npz(file), table)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_names", np.array(["height", "height"])),
            ("cat_names", np.array(["size", "size"])),
            ("classes", np.array(["no", "no"])),
            ("levels_size", np.array(["large", ""])),
            ("classes", np.array([b"\xff", b"yes"])),
        ],
    )
    def test_names_that_are_none_or_come_twice(self, tmp_path, key, value):
        file = write_npz(tmp_path / "names.npz", make_table(), **{key: value})
        with pytest.raises(ValueError, match=rf"`{key}` of .*names\.npz to be names, each another"):
            read_npz(file)

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
            ("y", np.array(3), r"shape \(120,\).* int64 of shape \(\)"),
            ("x_num", np.array(0.5), "`x_num` .* with one row or more"),
            ("y", np.zeros((60, 2), int), r"shape \(120,\).* int64 of shape \(60, 2\)"),
            ("x_num", np.zeros((120, 2), complex), "floating numbers .* complex128"),
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
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_csv(file, roles)

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_line_ends_and_a_last_line_without_one(self, tmp_path, end):
        table = self.read(tmp_path, end.join(["a,y", "1,0", "", "2,1"]))
        assert table.numeric.tolist() == [[1.0], [2.0]]

    def test_quoted_cells(self, tmp_path):
        text = 'a, "b\nc",y\n1,"say ""x"", then\ny",0\n2, "z",1\n3,5" pipe,0\n'
        table = self.read(tmp_path, text, Roles("y", ("b\nc",)))
        assert table.levels == (('5" pipe', 'say "x", then\ny', "z"),)
        assert table.categorical[:, 0].tolist() == [1, 2, 0]

    def test_numbers_are_those_that_python_reads(self, tmp_path):
        cells = ["0.1", "-1e-3", "+2", "1e308", " 3 ", "123456789.123456789", "-0.0", ".5"]
        text = "a,y\n" + "".join(f"{cell},{row % 2}\n" for row, cell in enumerate(cells))
        assert self.read(tmp_path, text).numeric[:, 0].tolist() == list(map(float, cells))

    @pytest.mark.parametrize("cell", ["1_000", "20_1", "0x10", "1,5", "5%", "1e999", "-inf"])
    def test_cells_that_are_no_numbers(self, tmp_path, cell):
        with pytest.raises(ValueError, match=r"column 'a' of .*table\.csv, but line 4 has"):
            self.read(tmp_path, f'a,y\n1,0\n\n"{cell}",1\n')

    @pytest.mark.parametrize(
        ("levels", "expected"),
        [
            (["b", "a", "c"], ("a", "b", "c")),
            (["10", "9", "-1", "1e1"], ("-1", "9", "10", "1e1")),
            (["2", "NAN", "1", "10"], ("1", "10", "2", "NAN")),
            (["2", "-nan", "1", "Nan"], ("-nan", "1", "2", "Nan")),
            (["2", "inf", "10"], ("10", "2", "inf")),
            (["01", "1", "1.0"], ("01", "1", "1.0")),
            (["é", "z", "Z"], ("Z", "z", "é")),
        ],
    )
    def test_order_of_levels_and_classes(self, tmp_path, levels, expected):
        text = "a,c,y\n" + "".join(f"1,{level},{level}\n" for level in levels * 2)
        table = self.read(tmp_path, text, Roles("y", ("c",)))
        assert table.classes == table.levels[0] == expected
        assert [table.classes[code] for code in table.target] == levels * 2

    @pytest.mark.slow
    def test_codes_are_the_same_in_every_process(self, tmp_path):
        """Rows of a table that two processes read, whose sets of text have other orders."""
        rows = [f"{row % 7},{row},{['NAN', 'b', '3'][row % 3]}" for row in range(60)]
        (tmp_path / "a.csv").write_text("\n".join(["c,x,y", *rows, ""]))
        code = (
            "import sys; from pathlib import Path; "
            "from saflex_lightning.recipes.tabular.csv_file import Roles, read_csv; "
            "print(read_csv(Path(sys.argv[1]), Roles('y', ('c',)))._replace(numeric=0))"
        )
        command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "a.csv")]
        printed = {
            subprocess.run(
                command,
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(printed) == 1

    def test_column_names_that_are_numbers(self, tmp_path):
        rows = [f"{row % 9},{row},{'rgb'[row % 3]},{row % 2}" for row in range(300)]
        table = self.read(tmp_path, "\n".join(["0,1,2,3", *rows]), Roles("3", ("2",)))
        assert table.numeric_names == ("0", "1")
        data = TabularDataModule(None, str(tmp_path / "table.csv"), target=3, categorical=[2])
        data.make_splits()
        assert data.sizes() == {"num_numeric": 2, "cardinalities": [5], "num_classes": 2}

    def test_20_000_columns_are_read_in_seconds(self, tmp_path):
        names = ",".join(f"probe_{number}" for number in range(20_000))
        rows = "".join("0.5," * 20_000 + f"{row % 2}\n" for row in range(10))
        started = time.perf_counter()
        table = self.read(tmp_path, f"{names},y\n{rows}")
        assert time.perf_counter() - started < 20.0  # 1 s; all pairs of names would be minutes
        assert table.numeric.shape == (10, 20_000)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a,naïve,y\n1,2,0\n".encode("latin-1"), "text in UTF-8, but line 1 is not"),
            ("a,y\n1,0\n2,ü\n".encode("cp1252"), "text in UTF-8, but line 3 is not"),
            ("a,y\n1,0\n".encode("utf-16"), "text in UTF-8, but line 1 is not"),
            (b"a,y\n1,0\n1\x002,1\n", "text in UTF-8, but line 3 is not"),
            (b"a,y\n1,0\n\xff\xfe,1\n", "text in UTF-8, but line 3 is not"),
            (b"\xef\xbb\xbf", "are not among its columns"),
            (b"\n\n", "are not among its columns"),
            (b"a,y\n1,0\n\n2\n", "2 cells in every row .* line 4 has 1"),
            (b"a,b,y\n1,2,0\n1,2,3,4\n", "3 cells in every row .* line 3 has 4"),
            (b'a,b,y\n1,"x\ny",0\n1,2\n', "3 cells in every row .* line 4 has 2"),
            (b"a,y\n1,0\n  \n", "2 cells in every row .* line 3 has 1"),
            (b'a,y\n1,0\n"2,1\n3,0\n', "line 3 cannot be read .*quotation marks"),
            (b'a,y\n1,0\n"2"x,1\n', "line 3 cannot be read .*quotation marks"),
            (b"a,c,y\n1," + b"x" * 200_000 + b",0\n", "line 2 cannot be read .*field limit"),
            (b",a,y\n0,1,0\n1,2,1\n", r"one name and one role, but \[''\]"),
            (b"a,y,\n0,1,\n1,2,\n", r"one name and one role, but \[''\]"),
            (b"y\n0\n1\n", "a column beside 'y' to predict it from"),
            (b"a;y\n1;0\n", r"\['y'\] are not among its columns \['a;y'\]"),
        ],
    )
    def test_files_that_are_cut_or_odd_are_named_with_the_line(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message) as error:
            self.read(tmp_path, content)
        assert "table.csv" in str(error.value)

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=3), min_size=1, max_size=4))
    def test_cells_are_those_of_pythons_strict_reader_or_refused(self, tmp_path_factory, rows):
        file = tmp_path_factory.mktemp("cells") / "table.csv"
        file.write_bytes("\n".join(["c,y", *map(",".join, rows)]).encode())
        try:
            table = read_csv(file, Roles("y", ("c",)))
        except ValueError as error:
            found = str(error)
            assert found.startswith("Expected ") and "table.csv" in found  # noqa: PT018
            return
        text = io.StringIO(file.read_bytes().decode(), newline="")
        lines = csv.reader(text, strict=True, skipinitialspace=True)
        expected = [tuple(map(str.strip, line)) for line in lines if line][1:]
        levels = [*table.levels[0], *MISSING]
        for (cell, label), code, target in zip(
            expected, table.categorical[:, 0], table.target, strict=True
        ):
            assert cell in MISSING if code < 0 else levels[code] == cell
            assert table.classes[target] == label

    def test_an_unused_column_may_have_any_name(self, tmp_path):
        table = self.read(tmp_path, ",x,x,a,y\n7,1,1,2,0\n8,1,1,3,1\n", Roles("y", (), ("a",)))
        assert table.numeric.tolist() == [[2.0], [3.0]]

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
