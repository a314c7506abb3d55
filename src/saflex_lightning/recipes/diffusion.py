"""Generated images by the diffusion models of `diffusers`: Text2Img, Img2Img, InstructPix2Pix."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from PIL.Image import Image
from torchvision.transforms.v2.functional import to_pil_image

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.folders import FileImages, read_class_folders
from saflex_lightning.recipes.generation import Task, fill_pool, plan_edits, plan_new

__all__ = ["fill_pool_by_diffusion"]

Precision = Literal["float32", "float16", "bfloat16"]
Kind = Literal["text2img", "img2img", "instruct_pix2pix"]


class _Facts(NamedTuple):
    """What a kind of pipeline is called, and the paper's settings of it."""

    pipeline: str
    strength_argument: str | None
    strength: float
    guidance: float


_KINDS: Mapping[str, _Facts] = MappingProxyType(
    {
        "text2img": _Facts("AutoPipelineForText2Image", None, 0.0, 7.5),
        "img2img": _Facts("AutoPipelineForImage2Image", "strength", 0.6, 7.5),
        "instruct_pix2pix": _Facts(
            "StableDiffusionInstructPix2PixPipeline", "image_guidance_scale", 1.3, 5.0
        ),
    }
)


def fill_pool_by_diffusion(
    kind: Kind,
    model: str,
    train: str,
    output: str,
    prompts: list[str],
    *,
    name: str | None = None,
    images: int = 1,
    strength: float | None = None,
    guidance: float | None = None,
    steps: int = 50,
    size: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "float32",
) -> None:
    """Fill a pool with images of a diffusion model; the same command resumes a stopped run.

    Args:
        kind: text2img makes images from text alone, img2img from training images and text,
            instruct_pix2pix edits training images by instructions.
        model: Folder of a pipeline, fine-tuned or not, or its name on the hub.
        train: Class folders of the training images.
        output: Folder of the pool.
        prompts: What is to be seen, or instructions; {class} stands for the class name.
        name: Name of the generator in folders and manifest; by default the kind. Give a
            fine-tuned model one of its own.
        images: Images of each prompt, from each training image or (text2img) of each class.
        strength: img2img: how much of the source is noised away, in (0, 1], by default 0.6.
            instruct_pix2pix: weight of the source, at least 1, by default 1.3.
        guidance: Weight of the prompt; by default 7.5, and 5.0 for instruct_pix2pix.
        steps: Denoising steps; img2img takes about strength times as many.
        size: Side of the images, pixels; sources are resized to it.
        batch_size: Images made together.
        seed: Seed of the run; each image has its own, made from it.
        device: Device of the model; by default cuda where there is one, else cpu.
        precision: Floating point of the model.

    Raises:
        ImportError: If the extra is not installed.
        OSError: If the model cannot be loaded.
        TypeError: If a setting is of another type.
        ValueError: If it is out of its range.
    """
    check(tuple(_KINDS), kind=kind)
    check(get_args(Precision), precision=precision)
    check("a path", model=model, train=train, output=output)
    check("a name", optional=True, name=name, device=device)
    check("a positive integer", images=images, steps=steps, size=size, batch_size=batch_size)
    check("a non-negative integer below 2**32", seed=seed)
    check("a non-negative number", optional=True, strength=strength, guidance=guidance)
    facts = _KINDS[kind]
    strength = facts.strength if strength is None else strength
    guidance = facts.guidance if guidance is None else guidance
    _check_strength(kind, strength, steps)
    sources = read_class_folders(Path(train).expanduser())
    options: dict[str, Any] = {"guidance_scale": guidance, "num_inference_steps": steps}
    if facts.strength_argument is None:
        options |= {"height": size, "width": size}
        tasks = plan_new(
            sources.classes,
            prompts,
            generator=name or kind,
            settings=f"guidance-{guidance}",
            images_per_class=images,
            seed=seed,
        )
    else:
        options[facts.strength_argument] = strength
        tasks = plan_edits(
            sources,
            prompts,
            generator=name or kind,
            settings=f"strength-{strength}_guidance-{guidance}",
            images_per_source=images,
            seed=seed,
        )
    files = FileImages(sources.files, size)

    @cache  # not loaded when every image is there
    def loaded() -> Callable[..., Any]:
        return _load(facts.pipeline, model, device, precision)

    def make(tasks: list[Task]) -> list[Image]:
        if facts.strength_argument is not None:
            options["image"] = [to_pil_image(files[task.source]) for task in tasks]
        return loaded()(
            prompt=[task.text for task in tasks],
            generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
            **options,
        ).images

    made, there = fill_pool(Path(output).expanduser(), tasks, make, batch_size=batch_size)
    print(f"{made} images made in {output}, {there} were there")


def _check_strength(kind: str, strength: float, steps: int) -> None:
    if kind == "img2img" and not (0.0 < strength <= 1.0 and int(steps * strength) >= 1):
        raise ValueError(
            f"Expected `strength` to be in (0, 1] and to leave one of the `steps` at least, but "
            f"got {strength} of {steps} steps. Raise one of them."
        )
    if kind == "instruct_pix2pix" and strength < 1.0:
        raise ValueError(
            f"Expected `strength` to be at least 1 for instruct_pix2pix, but got {strength}. There "
            "it is the weight of the source image; the paper has 1.3."
        )


def _load(pipeline: str, model: str, device: str | None, precision: str) -> Callable[..., Any]:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "Expected the package `diffusers`, but it is not installed. Install it by "
            "`pip install 'saflex-lightning[generate]'`."
        ) from error
    try:
        loaded = getattr(diffusers, pipeline).from_pretrained(model)
    except OSError as error:
        raise OSError(
            f"Expected `model` to be the folder of a pipeline or its name on the hub, but "
            f"'{model}' cannot be loaded ({error}). Check the path, or download it first."
        ) from error
    loaded.set_progress_bar_config(disable=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.to(device, getattr(torch, precision))
