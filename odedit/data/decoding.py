"""Decoding of image files to RGB pixels.

- Transparent pixels are composited over white. (Dropping the alpha channel, as Pillow's conversion to RGB does, would
  show arbitrary colours that the file holds there.)
- 16 bits per channel are scaled to 8 bits (65535 becomes 255), not clipped.
- The EXIF orientation is applied.
- The first frame of an animation is used.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from odedit.errors import in_words

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that may be opened. Pillow supports many more, some of which start external programs."""


class ImageError(ValueError):
    """An image cannot be used. The message names it.

    Attributes:
        kind: Category for counting, such as `image not found`.
    """

    def __init__(self, message: str, kind: str = "unreadable image") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return (ImageError, (str(self), self.kind))


def decode(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """Decodes one image.

    Args:
        data: Content of the file.
        name: Name of the image in messages, such as `image 'val2014/x.jpg'`.
        max_pixels: Largest width x height; checked in the header, before pixels are decoded.

    Returns:
        `uint8 (height, width, 3)`, RGB.

    Raises:
        ImageError: The file is empty, no image, too large, damaged, or has values of unknown range.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty.", "empty image")
    image = _open(data, name, max_pixels)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels are more than the limit of {max_pixels:,}. "
            "Scale it down, or raise data.max_pixels.",
            "image too large",
        )
    try:
        image.load()
        image = _upright(image)
        return np.array(_to_rgb(image, name), dtype=np.uint8)
    except ImageError:
        raise
    # Pillow raises any exception for a damaged file: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ImageError(
            f"{name}: the file is damaged or cut off ({in_words(error)}). Fetch it again.", "damaged image"
        ) from error


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: has far more pixels than the limit of {max_pixels:,} ({in_words(error)}).", "image too large"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image of a known kind. Allowed: {', '.join(FORMATS)}. Save it as one of these.",
            "not an image",
        ) from error
    except Exception as error:  # Pillow raises any exception for a damaged header, too
        raise ImageError(
            f"{name}: the file is damaged or cut off ({in_words(error)}). Fetch it again.", "damaged image"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data does not make the pixels unreadable
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image), name).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            f"{name}: holds floating-point values, whose range of brightness is unknown. Save it with 8 bits.",
            "unknown brightness",
        )
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(values: np.ndarray, name: str) -> Image.Image:
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name}: holds 32-bit values, whose range of brightness is unknown. Save it with 8 or 16 bits.",
            "unknown brightness",
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
