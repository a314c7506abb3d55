"""Class names become captions, and captions a classifier."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["make_prompts", "template_of_rows", "zero_shot_head"]


def make_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every class in every template, class by class.

    Args:
        class_names: One name per class; classes of one name cannot be told apart by it.
        templates: Captions with ``{}`` where the name goes.

    Returns:
        ``classes * templates`` captions; that of class k in template t is number
        ``k * len(templates) + t``.

    Raises:
        ValueError: If there is no class or no template, or a template has no ``{}``.

    Example:
        >>> make_prompts(["cat", "dog"], ["a photo of a {}.", "{} in the wild."])[1]
        'cat in the wild.'
    """
    if not class_names:
        raise ValueError(
            "Expected `class_names` to hold one name per class, but it is empty. Pass the names in "
            "the order of the labels."
        )
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(
            f"Expected `templates` to hold captions with {{}} for the class name, but got "
            f"{list(templates)}. Pass for example ['a photo of a {{}}.']."
        )
    return [template.replace("{}", name) for name in class_names for template in templates]


def template_of_rows(index: Tensor, epoch: int, num_templates: int) -> Tensor:
    """Return the template that captions each row in an epoch.

    A row goes through all templates in turn, so that no random draw is spent and a resumed run
    sees the same captions.

    Args:
        index: Identity of the rows across epochs, ``(batch,)`` int64.
        epoch: Number of the epoch, from 0.
        num_templates: Number of templates.

    Returns:
        ``(batch,)`` int64, in [0, num_templates).
    """
    return (index + epoch) % num_templates


def zero_shot_head(prompt_features: Tensor, num_classes: int) -> Tensor:
    """Return one direction per class: its normalised prompt features, averaged and normalised.

    Args:
        prompt_features: Text features of `make_prompts`, ``(classes * templates, features)``.
        num_classes: Number of classes.

    Returns:
        ``(classes, features)``, rows of length 1.

    Example:
        >>> zero_shot_head(Tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]]), 2)
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Radford et al. 2021, section 3.1.4.
    """
    by_class = normalize(prompt_features, dim=-1).unflatten(0, (num_classes, -1))
    return normalize(by_class.mean(1), dim=-1)
