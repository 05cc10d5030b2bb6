"""Decode image files to RGB pixels."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

Image.init()
# Only formats that Pillow decodes itself: a file of any name that contains EPS would be passed to Ghostscript.
_DECODED = {"AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD"}
_DECODED |= {"SGI", "TGA", "TIFF", "WEBP"}
FORMATS = tuple(name for name in Image.ID if name in _DECODED)
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _DECODED)
NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".svg", ".eps", ".pdf", ".exr", ".dng", ".cr2", ".nef"} - SUFFIXES


def open_image(data: bytes) -> Image.Image:
    """Open the image in a file's bytes; only its header is read yet."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, rotated upright by EXIF, with transparency composited on white. Grey images of more than
    8 bits are scaled from their white level, as `_to_8_bits` guesses it, and inverted for TIFFs in which 0 is white."""
    format, white_is_zero = image.format, getattr(image, "tag_v2", {}).get(262) == 0
    _convert_transparency(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey, transparent = np.asarray(image), image.info.get("transparency")  # in PNG the transparent grey value
        image = _to_8_bits(image, format)
        image = ImageOps.invert(image) if white_is_zero else image
        if isinstance(transparent, int):
            image.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _convert_transparency(image: Image.Image) -> None:
    """Convert the transparent value of a PNG, which has as many bits as the file's pixels, to the 8 bits that Pillow
    converts these to. Of 16-bit colours that leaves the upper half."""
    value, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    stored_as = tiles[0][3] if tiles else None
    if isinstance(value, int) and stored_as in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if stored_as == "L;2" else 17)
    if isinstance(value, tuple) and stored_as == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def has_converted_transparency(data: bytes) -> bool:
    """Whether a PNG is one that `_convert_transparency` changes, as it did not before 30 November 2026."""
    colour_and_bits = (data[25], data[24]) if data.startswith(b"\x89PNG") and len(data) > 25 else None
    return colour_and_bits in ((0, 2), (0, 4), (2, 16)) and b"tRNS" in data[: data.find(b"IDAT")]


def has_other_colors(image: Image.Image) -> bool:
    """Whether the image's colour profile is not that of sRGB, for which `to_rgb` takes it, as others do."""
    return _differs_from_srgb(image.info.get("icc_profile") or b"")


@lru_cache(maxsize=64)
def _differs_from_srgb(profile: bytes) -> bool:
    """Whether a profile changes evenly spaced colours by more than 4 levels (root mean square). Half of sRGB's copies
    differ by one or two; Display P3 is 20, Adobe RGB 22 away. A damaged profile is none."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colors = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3))
    try:
        own: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        stored = colors.convert({"GRAY": "L", "CMYK": "CMYK"}.get(own.profile.xcolor_space.strip(), "RGB"))
        shown = ImageCms.profileToProfile(stored, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False
    difference = np.asarray(shown).astype(np.float64) - np.asarray(stored.convert("RGB"))
    return bool(np.square(difference).mean() > 4**2)


def _to_8_bits(image: Image.Image, format: str | None) -> Image.Image:
    """Scale a grey image from its white level: the smallest of 1 (for floats), 255 and 65535 above all pixels."""
    grey = np.asarray(image).astype(np.float64)
    whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    if image.mode == "I" and format in ("PNG", "PPM"):  # Pillow gives 16-bit files this mode
        whites = (65535,)
    low, high = grey.min(), grey.max()
    white = next((white for white in whites if 0 <= low <= high <= white), None)
    if white is None:
        raise ValueError(f"its grey goes from {low:g} to {high:g}; save it with 8 or 16 bits")
    return Image.fromarray(np.round(grey * (255 / white)).astype(np.uint8))


def fit(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Crop the largest centred rectangle with the aspect ratio of `size` (height, width), and resize it (Lanczos)."""
    return image if size is None else ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
