"""Images from strangers: decoded within limits, and made the tensor that the networks were measured with."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from narrowboat.errors import BadRequestError, TooLargeError
from narrowboat.tasks.tensors import RawTensor

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # no other decoder is ever tried on these bytes
MAX_BYTES = 20 << 20
MAX_PIXELS = 25_000_000


def prepare(data: bytes, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> RawTensor:
    """What ``narrowboat.zoo`` makes of an image file, bit by bit, without torch.

    Args:
        data: a file of one of ``FORMATS``.
        shape: of the network's input, ``[1, 3, height, width]``.
        mean, std: of red, green and blue, each between 0 and 1.

    Returns:
        FP32, of that shape.

    Raises:
        BadRequestError: no such image, or one that is broken.
        TooLargeError: more than ``MAX_PIXELS``; found out before any of them is decoded.
    """
    height, width = shape[2], shape[3]
    # float32 as torch would have it, so that results are the same to the last bit.
    pixels = np.array(_decode(data, width, height), dtype=np.float32) / np.float32(255.0)
    scaled = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    tensor = np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], "<f4")
    return RawTensor("FP32", (1, 3, height, width), tensor.tobytes())


def _decode(data: bytes, width: int, height: int) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise TooLargeError(
                    f"the image has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are decoded"
                )
            return file.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    except TooLargeError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"the image is too large: {error}") from error
    except Exception as error:  # a decoder that is given broken bytes raises anything
        said = "" if isinstance(error, UnidentifiedImageError) else f": {error or type(error).__name__}"
        raise BadRequestError(f"this is no image that can be read ({', '.join(FORMATS)}){said}") from error
