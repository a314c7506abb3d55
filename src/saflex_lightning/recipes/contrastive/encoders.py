"""Two towers behind one small interface, and `open_clip` models behind it."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.network import plain

__all__ = ["ImageTextEncoders", "OpenClipEncoders", "check_encoders", "prepare_images"]


@runtime_checkable
class ImageTextEncoders(Protocol):
    """What the recipes ask of a two-tower model, an ``nn.Module``.

    Attributes:
        logit_scale: Logarithm of the inverse temperature of cosine similarities, scalar.
    """

    logit_scale: nn.Parameter

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return one row of int64 tokens per text."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Return features ``(batch, features)`` of images in [-1, 1], of any size."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return features ``(batch, features)`` of tokens."""
        ...


def check_encoders(encoders: Any) -> None:
    """Refuse what is not `ImageTextEncoders`."""
    if not isinstance(encoders, nn.Module) or not isinstance(encoders, ImageTextEncoders):
        raise TypeError(
            "Expected `encoders` to be a module with `logit_scale`, `tokenize`, `encode_image` and "
            f"`encode_text`, but got {type(encoders).__name__}. Wrap the towers, see "
            "`OpenClipEncoders`."
        )


def prepare_images(
    images: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Resize images to a tower's size and normalise them as it was trained.

    Args:
        images: In [-1, 1], as the recipes' datamodules yield them, ``(batch, channels, height,
            width)`` with one or three channels.
        size: Height and width in pixels.
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel.

    Returns:
        ``(batch, 3, *size)``.
    """
    images = images.expand(-1, 3, -1, -1)
    if images.shape[-2:] != size:
        images = nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
    shape = (3, 1, 1)
    unit = images.add(1.0).div(2.0).clamp(0.0, 1.0)  # bicubic interpolation overshoots
    return (unit - unit.new_tensor(mean).view(shape)) / unit.new_tensor(std).view(shape)


class OpenClipEncoders(nn.Module):
    """A CLIP model of ``open_clip``, with its tokenizer and its image normalisation.

    Args:
        architecture: Name known to ``open_clip``.
        pretrained: Name of weights to download, or a file with them; None starts at random.
            ``open_clip`` reads the file, and some versions run what it holds: give it none of an
            unknown origin.
        config: ``embed_dim``, ``vision_cfg`` and ``text_cfg`` of a model made from scratch; then
            ``architecture`` and ``pretrained`` are not read.

    Raises:
        ModuleNotFoundError: If ``open_clip`` is not installed.
        TypeError: If a setting is of another type.
        ValueError: If ``open_clip`` cannot make the model.
    """

    def __init__(
        self,
        architecture: str = "ViT-B-16",
        pretrained: str | None = "openai",
        *,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check("a name", architecture=architecture)
        check("a path", optional=True, pretrained=pretrained)
        check("a mapping of names to values", optional=True, config=config)
        try:
            import open_clip
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Expected the package `open_clip_torch`, but it is not installed. Run "
                "`pip install 'saflex-lightning[clip]'`."
            ) from error
        try:
            if config is None:
                model = open_clip.create_model(architecture, pretrained)
                self._tokenizer = open_clip.get_tokenizer(architecture)
            else:
                model = open_clip.CLIP(**plain(config))
                length = config["text_cfg"]["context_length"]
                self._tokenizer = open_clip.SimpleTokenizer(context_length=length)
        except Exception as error:  # whatever it raises, of settings or of a download
            given = f"{architecture!r}, {pretrained!r}" if config is None else repr(config)
            raise ValueError(
                f"Expected a model of `open_clip`, but it cannot make one of {given} ({error}). "
                "Correct `architecture` and `pretrained`, or `config`."
            ) from error
        visual: Any = model.visual
        settings = getattr(visual, "preprocess_cfg", {})
        self.mean = tuple(settings.get("mean", open_clip.OPENAI_DATASET_MEAN))
        self.std = tuple(settings.get("std", open_clip.OPENAI_DATASET_STD))
        size = visual.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.model: Any = model

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature, scalar."""
        return self.model.logit_scale

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return ``(texts, context length)`` int64."""
        return self._tokenizer(list(texts))

    def encode_image(self, images: Tensor) -> Tensor:
        """Return image features, ``(batch, features)``."""
        return self.model.encode_image(prepare_images(images, self.size, self.mean, self.std))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return text features, ``(batch, features)``."""
        return self.model.encode_text(tokens)
