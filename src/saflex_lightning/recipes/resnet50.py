"""ResNet-50 with ImageNet weights and a last layer of its own."""

from pathlib import Path
from tarfile import is_tarfile
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import Bottleneck, ResNet

from saflex_lightning.data.checks import check

__all__ = ["ResNet50"]

InputRange = Literal["imagenet", "unit"]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResNet50(ResNet):
    """torchvision's ResNet-50 with a new last layer, for images in [-1, 1].

    Args:
        num_classes: Number of logits.
        weights: ImageNet weights below the last layer: the name of torchvision's
            (``"IMAGENET1K_V1"`` or ``"IMAGENET1K_V2"``, downloaded once by torchvision), or the
            path of a file of theirs; None starts from random ones. A file is read as weights only,
            and torch before 2.10 has known holes there: give it none of an unknown origin.
        input_range: What the first layer sees: ``"imagenet"`` normalises images by the mean and
            standard deviation of ImageNet's channels, ``"unit"`` maps them to [0, 1].

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If the weights are neither a file nor a name, or not those of a ResNet-50, or
            the input range is unknown.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        weights: str | None = None,
        input_range: InputRange = "imagenet",
    ) -> None:
        check("a positive integer", num_classes=num_classes)
        check("a path", optional=True, weights=weights)
        check(get_args(InputRange), input_range=input_range)
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=num_classes)
        if weights is not None:
            self._load(weights)
        shift, scale = (_MEAN, _STD) if input_range == "imagenet" else ((0.0,) * 3, (1.0,) * 3)
        # Not in checkpoints, so that the keys stay torchvision's.
        self.register_buffer("mean", torch.tensor(shift).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(scale).view(3, 1, 1), persistent=False)
        # Convolutions follow the layout of their weights; on a CPU this is the faster one.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, ``(batch, classes)``.

        Args:
            x: Images in [-1, 1], ``(batch, 3, height, width)``.
        """
        return super().forward((x.add(1.0).div(2.0) - self.mean) / self.std)

    def _load(self, weights: str) -> None:
        state, own = _read(weights), self.state_dict()
        odd = [
            name
            for name in sorted(state.keys() | own.keys())
            if not name.startswith("fc.") and _shape_of(state, name) != _shape_of(own, name)
        ]
        if odd:
            raise ValueError(
                f"Expected `weights`='{weights}' to be the state dict of torchvision's ResNet-50, "
                f"but {len(odd)} tensors differ, '{odd[0]}' among them. Pass a file such as "
                "resnet50-11ad3fa6.pth."
            )
        body = {name: value for name, value in state.items() if not name.startswith("fc.")}
        self.load_state_dict(body, strict=False)  # the last layer is new


def _shape_of(state: dict[str, Any], name: str) -> Any:
    return getattr(state.get(name), "shape", None)


def _read(weights: str) -> dict[str, Any]:
    file = Path(weights).expanduser()
    if file.is_file():
        try:
            # Before 2.6 torch runs what it finds in the oldest of its formats, weights or not.
            if is_tarfile(file):
                raise ValueError("it is a tar archive")
            state = torch.load(file, map_location="cpu", weights_only=True)
            return {str(name): value for name, value in state.items()}
        except Exception as error:  # whatever a broken file brings about
            raise ValueError(
                f"Expected `weights` to name a file of tensors that `torch.save` wrote, but {file} "
                f"cannot be read as one ({error}). Download it again."
            ) from error
    names = sorted(ResNet50_Weights.__members__)
    if weights not in names:
        raise ValueError(
            f"Expected `weights` to be one of {names} or the path of a file, but got '{weights}'. "
            "Check the path, or leave it out to start from random weights."
        )
    return dict(ResNet50_Weights[weights].get_state_dict(progress=False, check_hash=True))
