"""Write the weights of the examples beside their descriptions: random ones, and real ones where a package has them."""

from __future__ import annotations

from pathlib import Path

import narrowboat as nb
from narrowboat import zoo
from narrowboat.zoo.save import save_random_weights

FOLDER = Path(__file__).resolve().parent
NAMES = ("yolov3", "fcn", "resnet101", "vgg19", "minilm", "efficientnet_lite2")


def main() -> None:
    """Write what is not there yet, packed for streaming."""
    for name in NAMES:
        target = FOLDER / f"{name}.safetensors"
        if target.exists():
            continue
        find = zoo.get(name).find_weights
        if find is not None:
            nb.pack(find(), target)
        else:
            random = FOLDER / f"{name}.random.safetensors"
            save_random_weights(name, random, overwrite=True)
            nb.pack(random, target)
            random.unlink()
        print(f"wrote {target.name}")


if __name__ == "__main__":
    main()
