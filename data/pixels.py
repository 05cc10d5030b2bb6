"""Bytes to pixels: which files are read as images, and what becomes of each kind."""

import io

import numpy as np
from PIL import Image, ImageOps

Image.init()
# Those that Pillow decodes by itself: EPS is handed to Ghostscript, whatever the file is called.
_DECODED = {"AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD"}
_DECODED |= {"SGI", "TGA", "TIFF", "WEBP"}
FORMATS = tuple(name for name in Image.ID if name in _DECODED)
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _DECODED)
NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".svg", ".eps", ".pdf", ".exr", ".dng", ".cr2", ".nef"} - SUFFIXES


def open_image(data: bytes) -> Image.Image:
    """The image in a file's bytes, its header read alone as yet."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Three 8-bit channels, upright as EXIF has it; transparency lies on white. Grey of more than 8 bits is scaled by
    the least white that holds it: 1 (of floats), 255 or 65535; where a TIFF has 0 for white, it is turned round."""
    format, white_is_zero = image.format, getattr(image, "tag_v2", {}).get(262) == 0
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey, clear = np.asarray(image), image.info.get("transparency")  # of PNG: the grey that is not there
        image = _to_8_bits(image, format)
        image = ImageOps.invert(image) if white_is_zero else image
        if isinstance(clear, int):
            image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, format: str | None) -> Image.Image:
    grey = np.asarray(image).astype(np.float64)
    whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    if image.mode == "I" and format in ("PNG", "PPM"):  # of 16 bits, whichever they use
        whites = (65535,)
    low, high = grey.min(), grey.max()
    white = next((white for white in whites if 0 <= low <= high <= white), None)
    if white is None:
        raise ValueError(f"its grey goes from {low:g} to {high:g}; save it with 8 or 16 bits")
    return Image.fromarray(np.round(grey * (255 / white)).astype(np.uint8))


def fit(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The centre rectangle of the shape of `size` (height, width), resized to it (Lanczos)."""
    return image if size is None else ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
