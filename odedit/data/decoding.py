"""Bytes of an image file to RGB pixels, with every way this fails said in a sentence.

What a reader of results may want to know:

- Transparent pixels are laid over white, as a page shows them. (Dropping the alpha channel, as a plain
  conversion to RGB does, brings out whatever colour the file happens to hold there.)
- 16 bits per channel are scaled to 8 (65535 becomes 255), not clipped.
- The orientation stored by a camera is applied; of an animation, the first frame is used.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from odedit.errors import in_words

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What may be opened. Pillow knows many more, some of which start other programs."""


class ImageError(ValueError):
    """An image cannot be used. The message is a sentence that names it.

    Attributes:
        kind: Two or three words for counting, such as `image not found`.
    """

    def __init__(self, message: str, kind: str = "unreadable image") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return (ImageError, (str(self), self.kind))


def decode(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """Decodes one image.

    Args:
        data: The file's content.
        name: How messages call it, e.g. `image 'val2014/x.jpg'`.
        max_pixels: Width times height; more is refused from the header, before anything is decoded.

    Returns:
        `uint8 (height, width, 3)`, RGB.

    Raises:
        ImageError: Empty, no image, too large, damaged, or of a kind that has no agreed meaning in 8 bits.
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
    # Pillow's decoders let through whatever a damaged file leads them into: OSError, SyntaxError, struct.error, ...
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
            f"{name}: not an image of a known kind. Allowed: {', '.join(FORMATS)}.", "not an image"
        ) from error
    except Exception as error:  # as above: a damaged header ends in any exception
        raise ImageError(
            f"{name}: the file is damaged or cut off ({in_words(error)}). Fetch it again.", "damaged image"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged note on the camera does not make the picture unreadable; viewers ignore it too
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
