"""Checks of the settings that the datamodules share."""

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = [
    "check_batch_size",
    "check_shares",
    "check_sizes",
    "check_steering",
]


def check_batch_size(batch_size: int, num_rows: int) -> None:
    """Refuse a batch larger than the rows of a process.

    Args:
        batch_size: Rows per step and process.
        num_rows: Training rows of one process.

    Raises:
        ValueError: If it is larger.
    """
    if num_rows < batch_size:
        raise ValueError(
            f"Expected `batch_size` to be at most {num_rows}, the training rows of one process, "
            f"but got {batch_size}. Pass a smaller `batch_size`."
        )


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below 1.

    Args:
        **sizes: By the name of their setting.

    Raises:
        ValueError: If one is less than 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(
                f"Expected `{name}` to be at least 1, but got {size}. Pass a positive number."
            )


def check_shares(**shares: float) -> None:
    """Refuse shares that leave one of two parts empty.

    Args:
        **shares: By the name of their setting.

    Raises:
        ValueError: If one is not between 0 and 1.
    """
    for name, share in shares.items():
        if not 0.0 < share < 1.0:
            raise ValueError(
                f"Expected `{name}` to be between 0 and 1, both excluded, but got {share}. Pass "
                "0.2 for a fifth."
            )


def check_steering(steering: str, *, merge_val: bool) -> None:
    """Refuse to steer by validation rows that are trained on.

    Args:
        steering: Which rows steer.
        merge_val: Whether validation rows are training rows too.

    Raises:
        MisconfigurationException: If the same rows would do both.
    """
    if merge_val and steering == "val":
        raise MisconfigurationException(
            "Expected `steering` other than 'val' with `merge_val`=True, but got 'val'. The "
            "validation rows are trained on; choose 'train', the clean training rows, or where "
            "there is one 'split', a part of them."
        )
