"""A pool and its manifest: read strictly, kept inside their folder, written for spreadsheets."""

import csv

import pytest
from helpers.folders import make_image_folders, write_image, write_manifest
from PIL import Image

from saflex_lightning.recipes.folders import read_class_folders
from saflex_lightning.recipes.generation import fill_pool, plan_edits, plan_new
from saflex_lightning.recipes.manifest import as_cell, from_cell, read_manifest
from saflex_lightning.recipes.pool import read_pool

HEADER = "file,class,source,generator,prompt\n"


@pytest.fixture
def real(tmp_path):
    return read_class_folders(make_image_folders(tmp_path / "real") / "train")


@pytest.fixture
def pool(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        write_image(tmp_path / "pool" / name)
    return tmp_path / "pool"


def write(pool, text):
    content = text if isinstance(text, bytes) else text.encode()
    (pool / "manifest.csv").write_bytes(content)


class TestManifest:
    @pytest.mark.parametrize(
        "text",
        [
            HEADER + "a.png,cat,0,edit,rain\n",
            HEADER.replace("\n", "\r\n") + "a.png,cat,0,edit,rain\r\n",
            "\ufeff" + HEADER + "\n a.png , cat,0, edit,rain\n\n",
            "class,extra,prompt,source,generator,file\ncat,7,rain,0,edit,a.png\n",
            '"file","class","source","generator","prompt"\n"a.png","cat","0","edit","rain"\n',
            HEADER + "./sub/../a.png,cat,cat/00.png,edit,rain\n",
        ],
    )
    def test_spellings_of_one_row(self, pool, real, text):
        write(pool, text)
        found = read_pool(pool, real)
        assert [file.resolve() for file in found.files] == [pool / "a.png"]
        assert (found.target.tolist(), found.source.tolist()) == ([0], [0])
        assert found.group_names == ("clean", "edit: rain")

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("a.png,cat,0,edit\n", "5 cells in every row .* line 2 has 4"),
            ("a.png,cat,0,edit,rain\nb.p", "5 cells in every row .* line 3 has 1"),
            ("a.png,cat,0,edit,rain\nb.png,cat,1,edit,in the ra", "last line of .* cut short"),
            ('a.png,cat,0,edit,"rain\nb.png,cat,1,edit,rain\n', "line 2 cannot be read"),
            ('a.png,cat,0,edit,"ra"in\n', "line 2 cannot be read"),
            ("a.png,cat,0,edit,a, b\n", "5 cells in every row .* line 2 has 6"),
            (b"a.png,cat,0,edit,r\xe9gn\n", "text in UTF-8, but line 2 is not"),
            (b"a.png,cat,0,edit,ra\0in\n", "text in UTF-8, but line 2 is not"),
            ("\nb.png,cow,1,edit,x\n", "class of .*b.png .line 3 of .* to be one of .* got 'cow'"),
            ("b.png,Cat,1,edit,x\n", "class of .*b.png .line 2 of .* to be one of .* got 'Cat'"),
            ("b.png,,1,edit,x\n", "class of .*b.png .line 2 of .* to be one of .* got ''"),
            ("z.png,cat,1,edit,x\n", "there is no .*z.png .line 2 of"),
            ("sub,cat,1,edit,x\n", "there is no .*sub .line 2 of"),
            (",cat,1,edit,x\n", "there is no .*pool .line 2 of"),
            ("a.png,cat,,edit,x\n", "a.png .line 2 of .* to say from which training image"),
            ("a.png,cat,12,edit,x\n", "a.png .line 2 of .* its source '12' is neither"),
            (f"a.png,cat,{'9' * 5000},edit,x\n", "a.png .line 2 of .* its source '99"),
            ("a.png,cat,-1,edit,x\n", "a.png .line 2 of .* its source '-1' is neither"),
            ("a.png,cat,7,edit,x\n", "a.png .line 2 of .* the class of its source"),
            ("a.png,cat,0,,x\n", "a.png .line 2 of .* a generator with a name other than 'clean'"),
            ("a.png,cat,0,clean,\n", "a.png .line 2 of .* other than 'clean'"),
            (
                "a.png,cat,0,edit,x\nb.png,cat,1,edit,x\n./a.png,cat,0,edit,x\n",
                r"once, but .*a.png .line 4 of .* is .*a.png .line 2 of",
            ),
            (
                "a.png,cat,0,edit,x\na.png,dog,7,edit,x\n",
                r"once, but .*a.png .line 3 of .* is .*a.png .line 2 of",
            ),
        ],
    )
    def test_what_is_odd_is_refused_with_its_line(self, pool, real, rows, message):
        write(pool, HEADER.encode() + (rows if isinstance(rows, bytes) else rows.encode()))
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            read_pool(pool, real)
        assert "manifest.csv" in str(error.value)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("file,class,source,generator\n", r"\['prompt'\] are missing"),
            (HEADER.replace("prompt", "prompt,class"), r"\['class'\] come twice"),
            ("", r"\['class', 'file', 'generator', 'prompt', 'source'\] are missing"),
            (HEADER.replace(",", ";"), "are missing; it has"),
        ],
    )
    def test_headers(self, pool, real, header, message):
        write(pool, header)
        with pytest.raises(ValueError, match=message):
            read_pool(pool, real)

    def test_a_header_alone_is_an_empty_pool(self, pool, real):
        write(pool, HEADER)
        with pytest.raises(ValueError, match=r"generated images in .*pool, but there are none"):
            read_pool(pool, real)


class TestInsideItsFolder:
    """Nothing outside of a pool's folder is read, unless that is asked for."""

    @pytest.fixture
    def outside(self, tmp_path):
        return write_image(tmp_path / "elsewhere" / "0-0.png", seed=5)

    @pytest.mark.parametrize("how", ["dots", "absolute", "link", "linked folder"])
    def test_manifest(self, pool, real, outside, how):
        (pool / "link.png").symlink_to(outside)
        (pool / "linked").symlink_to(outside.parent)
        name = {
            "dots": "sub/../../elsewhere/0-0.png",
            "absolute": str(outside),
            "link": "link.png",
            "linked folder": "linked/0-0.png",
        }[how]
        write_manifest(pool, [(name, "cat", "0", "edit", "")])
        message = r"to lie in .*pool, but .*line 2 of .*manifest\.csv\) is .*elsewhere/0-0\.png"
        with pytest.raises(ValueError, match=message):
            read_pool(pool, real)
        assert read_pool(pool, real, allow_outside=True).files[0].resolve() == outside

    def test_folders(self, tmp_path, real, outside):
        write_image(tmp_path / "edits" / "cat" / "1-0.png")
        (tmp_path / "edits" / "more" / "cat").parent.mkdir()
        (tmp_path / "edits" / "more" / "cat").symlink_to(outside.parent)
        with pytest.raises(ValueError, match=r"to lie in .*edits, but .*more/cat/0-0\.png is"):
            read_pool(tmp_path / "edits", real)
        assert read_pool(tmp_path / "edits", real, allow_outside=True).source.tolist() == [1, 0]

    def test_a_pool_that_is_a_link_itself(self, tmp_path, pool, real):
        write_manifest(pool, [("a.png", "cat", "0", "edit", "")])
        (tmp_path / "linked").symlink_to(pool)
        assert len(read_pool(tmp_path / "linked", real).files) == 1

    def test_a_neighbour_with_a_longer_name_is_outside(self, tmp_path, pool, real):
        write_image(tmp_path / "pool2" / "a.png")
        write_manifest(pool, [("../pool2/a.png", "cat", "0", "edit", "")])
        with pytest.raises(ValueError, match=r"to lie in .*pool, but"):
            read_pool(pool, real)

    def test_a_file_that_two_links_name(self, pool, real):
        write_image(pool / "cat" / "0-0.png")
        (pool / "cat" / "1-0.png").symlink_to(pool / "cat" / "0-0.png")
        for name in ("a.png", "b.png", "sub/c.png"):
            (pool / name).unlink()
        with pytest.raises(ValueError, match=r"once, but .*1-0\.png is .*0-0\.png again"):
            read_pool(pool, real)

    def test_a_folder_called_clean(self, tmp_path, real):
        write_image(tmp_path / "clean" / "cat" / "0-0.png")
        with pytest.raises(ValueError, match="a generator with a name other than 'clean'"):
            read_pool(tmp_path / "clean", real)

    @pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", "a/", "clean", ""])
    def test_generators_that_name_no_folder(self, tmp_path, real, name):
        for tasks in (
            plan_edits(real, ["rain"], generator=name, images_per_source=1, seed=0),
            plan_new(["cat"], ["x"], generator=name, settings="", images_per_class=1, seed=0),
        ):
            with pytest.raises(ValueError, match=r"^Expected `generator` to"):
                fill_pool(tmp_path / "new", tasks, list, batch_size=1)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("prompt", ["..", ".", "/", "_..", ""])
    def test_prompts_that_name_no_folder(self, real, prompt):
        with pytest.raises(ValueError, match="`prompts` to be at least one text"):
            list(plan_edits(real, [prompt], generator="edit", images_per_source=1, seed=0))


def paint(tasks):
    return [Image.new("RGB", (8, 8), (task.seed % 256, 0, 0)) for task in tasks]


class TestCells:
    TEXTS = (
        "=1+1",
        "+1+1",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "'quoted",
        "'=1",
        "''",
        "-",
        "-inf",
        "+nan",
        "rain",
        "a=1",
        "",
        "1-2",
    )
    NUMBERS = ("-1", "+1", "-0.5", "+1e-3", "-.5", "7")

    def test_text_is_read_as_it_was_written(self):
        for text in (*self.TEXTS, *self.NUMBERS):
            assert from_cell(as_cell(text)) == text

    def test_no_text_begins_like_a_formula_and_numbers_stay_numbers(self):
        for text in self.TEXTS:
            assert not as_cell(text).startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        assert [as_cell(number) for number in self.NUMBERS] == [*self.NUMBERS]

    def test_a_manifest_of_prompts_that_are_formulas(self, tmp_path, real):
        prompts = ["=cmd|' /C calc'!A0", "@SUM(1;2)", "-lora, dark", "+5"]
        tasks = list(plan_edits(real, prompts, generator="-g", images_per_source=1, seed=0))
        root = tmp_path / "new"
        assert fill_pool(root, iter(tasks), paint, batch_size=8)[0] == 48
        with (root / "manifest.csv").open(newline="") as stream:
            cells = {cell for row in csv.reader(stream) for cell in row}
        assert not [cell for cell in cells if cell.startswith(("=", "@", "-", "\t"))]
        assert "+5" in cells
        assert [row for _, row in read_manifest(root / "manifest.csv")] == [t.row for t in tasks]
        found = read_pool(root, real)
        assert found.group_names == ("clean", *sorted(f"-g: {prompt}" for prompt in prompts))
        assert fill_pool(root, iter(tasks), paint, batch_size=8) == (0, 48)


class TestGoingOn:
    def plan(self, real):
        return plan_edits(real, ["rain"], generator="edit", images_per_source=1, seed=0)

    def test_a_manifest_that_was_cut_short_is_named(self, tmp_path, real):
        root = tmp_path / "new"
        fill_pool(root, self.plan(real), paint, batch_size=5)
        text = (root / "manifest.csv").read_text()
        messages = {30: r"row of .*manifest\.csv.* line 13 has", 1: r"last line of .*manifest\.csv"}
        for cut, message in messages.items():
            (root / "manifest.csv").write_text(text[:-cut])
            with pytest.raises(ValueError, match=message):
                fill_pool(root, self.plan(real), paint, batch_size=5)
        assert len(list(root.rglob("*.png"))) == 12

    def test_columns_in_another_order_are_not_written_under(self, pool, real):
        write(pool, "class,file,source,generator,prompt\ncat,a.png,0,edit,rain\n")
        with pytest.raises(ValueError, match=r"columns of .*manifest\.csv to be .* in this order"):
            fill_pool(pool, self.plan(real), paint, batch_size=5)
