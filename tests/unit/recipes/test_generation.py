"""Pools made by a small generator: what is written, resumed and refused."""

import csv
import sys

import pytest
import torch
from helpers.folders import CLASSES, make_image_folders, write_image
from PIL import Image

from saflex_lightning.cli import generate
from saflex_lightning.recipes import GeneratedDataModule
from saflex_lightning.recipes.folders import read_class_folders
from saflex_lightning.recipes.generation import (
    class_words,
    fill_pool,
    folder_name,
    plan_edits,
    plan_new,
)
from saflex_lightning.recipes.medmnist import read_medmnist
from saflex_lightning.recipes.medmnist_folders import write_medmnist_folders
from saflex_lightning.recipes.vae import fill_pool_by_vae, train_vae, vary


@pytest.fixture
def real(tmp_path):
    return make_image_folders(tmp_path / "real")


def plan(real, *prompts, **settings):
    defaults = {"generator": "paint", "images_per_source": 2, "seed": 0}
    return plan_edits(read_class_folders(real / "train"), prompts, **defaults | settings)


def paint(tasks):
    return [Image.new("RGB", (8, 8), (task.seed % 256, task.source, 0)) for task in tasks]


def manifest(root):
    with (root / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


class TestPlan:
    def test_edits_name_their_sources(self, real):
        tasks = list(plan(real, "a {class}, in the rain", "at night", settings="strength-0.6"))
        assert len(tasks) == 2 * 12 * 2
        task = tasks[-1]
        assert task.row.file == "paint/at_night/strength-0.6/eel/11-1.png"
        assert task.row[1:] == ("eel", "eel/01.png", "paint", "at night")
        assert tasks[0].row.file == "paint/a_class_in_the_rain/strength-0.6/cat/0-0.png"
        assert (tasks[0].text, tasks[0].row.prompt) == (
            "a cat, in the rain",
            "a {class}, in the rain",
        )

    def test_new_images_have_no_source(self):
        kwargs = {"generator": "draw", "settings": "guidance-7.5", "images_per_class": 2, "seed": 0}
        tasks = list(plan_new(CLASSES, ["a photo of a {class}"], **kwargs))
        folder = "draw/a_photo_of_a_class/guidance-7.5"
        assert tasks[1].row.file == f"{folder}/cat/1.png"
        assert tasks[2].row.file == f"{folder}/dog/0.png"
        assert {(task.source, task.row.source) for task in tasks} == {(-1, "")}
        assert tasks[2].text == "a photo of a dog"

    def test_every_image_has_a_seed_of_its_own(self, real):
        seeds = [[task.seed for task in plan(real, "a", "b", seed=seed)] for seed in (0, 0, 1)]
        assert seeds[0] == seeds[1]
        assert len(set(seeds[0] + seeds[2])) == 2 * len(seeds[0])

    def test_names(self):
        assert class_words("001.Black_footed_Albatross") == "Black footed Albatross"
        assert folder_name("a {class}, in the rain!") == "a_class_in_the_rain"

    @pytest.mark.parametrize("prompts", [(), ("...!", "?"), ("rain?", "rain!")])
    def test_prompts_without_a_folder_of_their_own(self, real, prompts):
        with pytest.raises(ValueError, match="`prompts` to be at least one text"):
            list(plan(real, *prompts))


class TestFilling:
    def test_pool_is_what_the_datamodule_reads(self, real, tmp_path):
        pool = tmp_path / "pool"
        assert fill_pool(pool, plan(real, "rain", "night"), paint, batch_size=5) == (48, 0)
        planned = [task.row.file for task in plan(real, "rain", "night")]
        assert [row["file"] for row in manifest(pool)] == planned
        data = GeneratedDataModule(
            str(real), str(pool), image_size=None, batch_size=12, group_by="prompt"
        )
        data.setup("fit")
        (batch,) = data.train_dataloader()
        assert data.saflex_group_names() == ("clean", "paint: night", "paint: rain")
        assert batch.augmented.sum() == 48
        # The painted green value is the number of the source.
        green = batch.inputs[12:, 1, 0, 0].add(1.0).mul(127.5).round().long()
        assert green.sort().values.equal(batch.index[:12].repeat_interleave(4).sort().values)

    def test_stopped_run_is_resumed(self, real, tmp_path):
        def stop_at_third(tasks):
            if tasks[0].source >= 2:
                raise KeyboardInterrupt
            return paint(tasks)

        whole, part = tmp_path / "whole", tmp_path / "part"
        fill_pool(whole, plan(real, "rain"), paint, batch_size=7)
        with pytest.raises(KeyboardInterrupt):
            fill_pool(part, plan(real, "rain"), stop_at_third, batch_size=2)
        assert len(list(part.rglob("*.png"))) == len(manifest(part)) == 4
        # A file that was written just before its row would have been.
        lines = (part / "manifest.csv").read_text().splitlines(keepends=True)
        (part / "manifest.csv").write_text("".join(lines[:-1]))
        assert fill_pool(part, plan(real, "rain"), paint, batch_size=5) == (20, 4)
        assert fill_pool(part, plan(real, "rain"), stop_at_third, batch_size=5) == (0, 24)
        assert sorted(map(str, manifest(part))) == sorted(map(str, manifest(whole)))
        for file in whole.rglob("*.png"):
            assert file.read_bytes() == (part / file.relative_to(whole)).read_bytes()
        assert not list(part.rglob("*.part"))

    def test_empty_batches_are_refused(self, real, tmp_path):
        with pytest.raises(ValueError, match="`batch_size` to be a positive integer, but got 0"):
            fill_pool(tmp_path, plan(real, "rain"), paint, batch_size=0)


class TestVAE:
    def test_samples_are_told_their_class(self):
        """One class is bright, the other dark, in noise: so are samples of the same latents."""
        target = torch.arange(512) % 2
        images = torch.where(target.bool(), 0.5, -0.5).view(-1, 1, 1, 1)
        images = images + 0.3 * torch.randn(512, 3, 8, 8)
        model = train_vae(images, target, 2, epochs=10, seed=0)
        dark, bright = (
            vary(model, images[:64], torch.full((64,), label), 1.0, list(range(64)))
            for label in (0, 1)
        )
        assert (bright - dark).mean((1, 2, 3)).min() > 0.1

    def test_strength_leads_from_the_image_to_noise(self):
        images = torch.rand(6, 3, 8, 8) * 2 - 1
        target = torch.zeros(6, dtype=torch.int64)
        model = train_vae(images, target, 1, epochs=1, seed=0)
        seeds = list(range(6))
        reconstructed = model.decode(model.encode(images, target)[0], target)
        torch.testing.assert_close(vary(model, images, target, 0.0, seeds), reconstructed)
        one = vary(model, images, target, 1.0, seeds)
        torch.testing.assert_close(one, vary(model, images.flip(0), target, 1.0, seeds))
        # One image alone is what it is among others.
        torch.testing.assert_close(
            vary(model, images[3:4], target[3:4], 0.5, [3])[0],
            vary(model, images, target, 0.5, seeds)[3],
        )

    def test_training_follows_its_seed_and_leaves_the_random_state_alone(self):
        images, target = torch.rand(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)
        weights = []
        for seed in (0, 0, 1):
            torch.manual_seed(5)
            model = train_vae(images, target, 1, epochs=1, seed=seed)
            weights.append(model.posterior.weight)
            assert torch.initial_seed() == 5
        assert weights[0].equal(weights[1])
        assert not weights[0].equal(weights[2])

    def test_command_makes_one_group_per_strength(self, real, tmp_path, monkeypatch, capsys):
        command = ["saflex-generate", "vae", "--train", str(real / "train"), "--epochs", "1"]
        command += ["--output", str(tmp_path / "pool"), "--strengths", "[0.5, 1.0]"]
        for expected in ("24 images made", "0 images made"):
            monkeypatch.setattr(sys, "argv", command)
            generate.main()
            assert expected in capsys.readouterr().out
        data = GeneratedDataModule(
            str(real), str(tmp_path / "pool"), image_size=None, batch_size=12
        )
        data.setup("fit")
        assert data.saflex_group_names() == ("clean", "vae: strength-0.5", "vae: strength-1.0")
        (batch,) = data.train_dataloader()
        assert batch.augmented.sum() == 24

    def test_strength_out_of_range(self, real, tmp_path):
        with pytest.raises(
            ValueError, match=r"`strengths` to be a list of numbers in \[0, 1\], but got \[1.5\]"
        ):
            fill_pool_by_vae(str(real / "train"), str(tmp_path), strengths=[1.5])

    def test_images_that_do_not_fit(self, real, tmp_path):
        write_image(real / "train" / "cat" / "99.png", size=12)
        with pytest.raises(ValueError, match=r"99\.png has 12x12"):
            fill_pool_by_vae(str(real / "train"), str(tmp_path))
        odd = make_image_folders(tmp_path / "odd", size=10)
        with pytest.raises(ValueError, match=r"multiple of 4 pixels, .* shape \(3, 10, 10\)"):
            fill_pool_by_vae(str(odd / "train"), str(tmp_path))


def test_medmnist_folders_hold_the_file(tmp_path):
    write_medmnist_folders(str(tmp_path))
    for name, split in read_medmnist().items():
        folders = read_class_folders(tmp_path / name, num_classes=8)
        assert folders.target.bincount().equal(split.target.bincount())
        row = int(folders.files[-1].stem)
        assert split.target[row] == 7
