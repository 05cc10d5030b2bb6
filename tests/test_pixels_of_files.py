"""Every kind of image file gives the right pixels, or is reported as damaged."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import DataError, ImageDataset
from data.pixels import open_image, to_rgb


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("P", 0, None),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
        ("I;16", 25700, (100, 100, 100)),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, color, expected):
    Image.new(mode, (10, 10), color).save(tmp_path / "image.png")
    image, label = ImageDataset(tmp_path)[0]
    assert image.shape == (3, 10, 10)
    assert image.dtype == torch.uint8
    assert label == 0
    if expected is not None:
        assert image[:, 5, 5].tolist() == list(expected)


def saved(values, kind="TIFF"):
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (np.float32(0.5), "TIFF", 128),
        (np.float32(100), "TIFF", 100),
        (np.float32(25700), "TIFF", 100),
        (np.int32(100), "TIFF", 100),
        (np.int32(25700), "TIFF", 100),
        (np.uint16(100), "TIFF", 0),  # 16 bits say what white is
        (np.uint16(25700), "PPM", 100),
        (np.uint16(100), "PPM", 0),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_brightness(value, kind, expected):
    grey = np.array([[0, value]], dtype=value.dtype)
    assert to_rgb(open_image(saved(grey, kind))).getpixel((1, 0)) == (expected,) * 3


@pytest.mark.parametrize("grey", [np.uint8(50), np.uint16(50 * 257), np.float32(50 / 255)])
def test_a_white_is_zero_tiff_is_not_read_as_a_negative(grey):
    """Scanners write such files."""
    file = io.BytesIO()
    Image.fromarray(np.array([[0, grey]], dtype=grey.dtype)).save(file, "TIFF")
    photometric = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert file.getvalue().count(photometric) == 1
    negative = file.getvalue().replace(photometric, struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    image = to_rgb(open_image(negative))
    assert [image.getpixel((x, 0))[0] for x in (0, 1)] == [255, 205]


def test_transparent_16_bit_grey_is_composited_on_white():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 25700]], dtype=np.uint16)).save(file, "PNG", transparency=0)
    image = to_rgb(open_image(file.getvalue()))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (100,) * 3]


@pytest.mark.parametrize("value", [np.float32("nan"), np.float32("inf"), np.float32(-1), np.int32(70000)])
def test_grey_that_has_no_brightness_is_refused(tmp_path, value):
    (tmp_path / "a.tiff").write_bytes(saved(np.array([[0, value]], dtype=value.dtype)))
    with pytest.raises(DataError, match=r"a.tiff is damaged \(its grey goes from"):
        ImageDataset(tmp_path)[0]


@pytest.mark.parametrize(
    ("bits", "color", "row", "transparent", "expected"),
    [
        (2, 0, bytes([0b00_01_10_11]), (1,), [0, 255, 170, 255]),
        (4, 0, bytes([0x01, 0x9F]), (9,), [0, 17, 255, 255]),
        (
            16,
            2,
            struct.pack(">12H", *[0x1234] * 3, *[0x8034] * 3, *[0x56FF] * 3, *[0] * 3),
            [0x8034] * 3,
            [18, 255, 86, 0],
        ),
    ],
)
def test_transparent_colours_of_pngs_are_white_at_any_depth(bits, color, row, transparent, expected):
    """Pillow compares a file's transparent value with pixels of 8 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, color, 0, 0, 0))]
    parts += [chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    image = to_rgb(open_image(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))
    assert np.asarray(image)[0].tolist() == [[grey] * 3 for grey in expected]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, orientation):
    upright = Image.new("RGB", (4, 6), "white")
    upright.paste("black", (0, 0, 2, 2))
    turns = Image.Transpose
    undo = [None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE]
    undo += [turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270]
    stored = upright if undo[orientation - 1] is None else upright.transpose(undo[orientation - 1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    image, _ = ImageDataset(tmp_path)[0]
    assert image.shape == (3, 6, 4)
    assert (image[0] < 128).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **more: pytest.fail("was run"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png is damaged \(not an image\)"):
        ImageDataset(tmp_path)[0]
