"""Every kind of image file gives the right pixels, or is reported as damaged."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data import summarize_splits
from data.images import DataError, ImageDataset
from data.latents import cache_name
from data.pixels import has_other_colors, open_image, to_rgb


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
    image = to_rgb(open_image(png(bits, color, row, transparent)))
    assert np.asarray(image)[0].tolist() == [[grey] * 3 for grey in expected]


def png(bits, color, row, transparent=()):
    """A PNG of one row, with a transparent colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, color, 0, 0, 0))]
    parts += [chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))] if transparent else []
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_caches_of_images_whose_transparency_was_read_otherwise_are_made_anew(tmp_path):
    """Others are read as before, so their caches stay valid."""
    files = {"plain": png(2, 0, b"\x1b"), "grey": png(2, 0, b"\x1b", [1]), "bytes": png(8, 0, bytes(4), [0])}
    files["colour"] = png(16, 2, bytes(24), [1, 2, 3])
    described = {}
    for name, content in files.items():
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.PNG").write_bytes(content)
        described[name] = ImageDataset(tmp_path / name, image_size=8).describe()
    assert {name for name, about in described.items() if "transparency" in about} == {"grey", "colour"}
    before = {key: value for key, value in described["grey"].items() if key != "transparency"}
    assert cache_name(before) != cache_name(described["grey"])


def profile(red, green, blue, gamma):
    """A colour profile (ICC v2) of three primaries, given as XYZ under D50, and a gamma."""

    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    white = (0.9642, 1.0, 0.8249)
    texts = {b"desc": b"desc\0\0\0\0\0\0\0\x02p\0" + bytes(78), b"cprt": b"text\0\0\0\0none\0"}
    primaries = {b"wtpt": white, b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = texts | {name: b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in primaries.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI12s", size, b"", 0x02200000, b"mntrRGB XYZ ") + bytes(12) + b"acsp" + bytes(28)
    return (head + fixed(*white)).ljust(128, b"\0") + table + body


ADOBE_RGB = profile((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.199)
DISPLAY_P3 = profile((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407), 2.2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_colour_profiles_that_are_not_applied_are_reported(tmp_path):
    """Adobe RGB moves evenly spaced colours by 22 levels, root mean square."""
    profiles = {"srgb": SRGB, "none": None, "damaged": SRGB[:100], "adobe": ADOBE_RGB, "p3": DISPLAY_P3}
    for name, icc_profile in profiles.items():
        Image.new("RGB", (8, 8), (0, 200, 0)).save(tmp_path / f"{name}.jpg", icc_profile=icc_profile)
    for name in profiles:
        with Image.open(tmp_path / f"{name}.jpg") as image:
            assert has_other_colors(image) == (name in ("adobe", "p3"))
    dataset = ImageDataset(tmp_path, image_size=8)
    assert (dataset.num_other_colors(), dataset.num_enlarged()) == (2, 0)
    told = "; 2 of the training images have a colour profile other than sRGB, which is not applied"
    assert summarize_splits(dataset, dataset).endswith(told)
    pixels = dataset[dataset.names.index("adobe.jpg")][0]
    assert (pixels.int() - dataset[dataset.names.index("none.jpg")][0]).abs().max() == 0  # as other codebases read it


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
