"""``saflex-generate diffusion``: tiny pipelines of every kind, and what is refused."""

import sys

import numpy as np
import pytest
from helpers.folders import make_image_folders
from PIL import Image

from saflex_lightning.cli import generate
from saflex_lightning.recipes import GeneratedDataModule
from saflex_lightning.recipes.diffusion import fill_pool_by_diffusion

KINDS = {
    "text2img": ("stable_diffusion", "text2img/a_class_at_night/guidance-7.5"),
    "img2img": ("stable_diffusion", "img2img/a_class_at_night/strength-0.6_guidance-7.5"),
    "instruct_pix2pix": (
        "instruct_pix2pix",
        "instruct_pix2pix/a_class_at_night/strength-1.3_guidance-5.0",
    ),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_image_folders(tmp_path_factory.mktemp("real"), train=(2, 1, 1), size=20)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from helpers.pipelines import save_pipelines

    return save_pipelines(tmp_path_factory.mktemp("models"))


# diffusers against a newer huggingface_hub.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")
class TestPipelines:
    @pytest.fixture(autouse=True)
    def _offline(self, monkeypatch):
        # The environment variable is read only once, when the package is imported.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    @pytest.fixture
    def command(self, real, models, monkeypatch):
        def run(kind, output, **settings):
            options = {
                "kind": kind,
                "model": models / KINDS[kind][0],
                "train": real / "train",
                "output": output,
                "prompts": '["a {class} at night"]',
                "images": 2,
                "steps": 4,
                "size": 16,
            }
            args = [f"--{name}={value}" for name, value in (options | settings).items()]
            monkeypatch.setattr(sys, "argv", ["saflex-generate", "diffusion", *args])
            generate.main()

        return run

    @pytest.mark.parametrize(
        "kind",
        [
            "img2img",
            pytest.param("text2img", marks=pytest.mark.slow),
            pytest.param("instruct_pix2pix", marks=pytest.mark.slow),
        ],
    )
    def test_pool_is_made_resumed_and_read(self, command, real, tmp_path, kind, capsys):
        number = 6 if kind == "text2img" else 8
        command(kind, tmp_path / "pool", batch_size=3)
        assert f"{number} images made" in capsys.readouterr().out
        files = sorted((tmp_path / "pool").rglob("*.png"))
        assert {file.parents[1] for file in files} == {tmp_path / "pool" / KINDS[kind][1]}
        assert len(files) == number

        before = read(files[0])
        files[0].unlink()
        command(kind, tmp_path / "pool", batch_size=3)
        assert f"1 images made in {tmp_path / 'pool'}, {number - 1} were" in capsys.readouterr().out
        # Alone in its batch it is the same image, but for the rounding of other kernels.
        assert np.abs(read(files[0]) - before).max() <= 2
        assert np.abs(read(files[0]) - read(files[1])).max() > 2

        data = GeneratedDataModule(
            str(real),
            str(tmp_path / "pool"),
            image_size=16,
            has_sources=kind != "text2img",
            batch_size=4,
        )
        data.setup("fit")
        (batch,) = data.train_dataloader()
        assert data.saflex_group_names() == ("clean", f"{kind}: a {{class}} at night")
        assert batch.augmented.sum() == number

    @pytest.mark.slow
    def test_seed_prompt_and_source_change_the_image(self, command, tmp_path):
        images = []
        for name, settings in {
            "one": {},
            "same": {},
            "seed": {"seed": 1},
            "prompt": {"prompts": '["rain"]'},
        }.items():
            command("img2img", tmp_path / name, images=1, **settings)
            images.append([read(file) for file in sorted((tmp_path / name).rglob("*.png"))])
        one, same, seed, prompt = images
        assert all((a == b).all() for a, b in zip(one, same, strict=True))
        assert all((a != b).any() for a, b in zip(one, seed, strict=True))
        assert all((a != b).any() for a, b in zip(one, prompt, strict=True))
        assert (one[0] != one[1]).any()

    def test_model_that_is_not_there(self, command, tmp_path):
        with pytest.raises(OSError, match=r"`model` to be the folder of a pipeline .* 'absent'"):
            command("img2img", tmp_path, model="absent")


def read(file):
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gan"}, r"`kind` to be one of \['img2img', 'instruct_pix2pix', 'text2img'\]"),
        ({"strength": 0.0}, r"`strength` to be in \(0, 1\] .* got 0.0 of 50 steps"),
        ({"strength": 0.1, "steps": 5}, "got 0.1 of 5 steps"),
        ({"kind": "instruct_pix2pix", "strength": 0.6}, "`strength` to be at least 1 for instruct"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(real, tmp_path, settings, message):
    options = {"kind": "img2img", "model": "absent", "prompts": ["rain"]} | settings
    with pytest.raises(ValueError, match=message):
        fill_pool_by_diffusion(train=str(real / "train"), output=str(tmp_path), **options)


def test_missing_extra_is_named(real, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'saflex-lightning\[generate\]'"):
        fill_pool_by_diffusion("img2img", "absent", str(real / "train"), str(tmp_path), ["rain"])
