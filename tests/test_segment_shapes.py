import pytest
import torch
from PIL import Image
from processes import ROOT, run, script

from data.shapes import ShapesDataset

segment_shapes = script("scripts/segment_shapes.py")


def test_scores_by_hand():
    masks = torch.tensor([[[0, 1], [1, 2]]])
    found = torch.tensor([[[0, 1], [2, 2]]])
    of_shape, of_classes = segment_shapes.scores(found, masks, 3)
    assert of_shape == 1  # whatever it was taken for
    assert of_classes == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_masks_name_the_class_of_each_pixel():
    shapes = ShapesDataset(20, image_size=16)
    images, masks = segment_shapes.segmentation(shapes, [3, 14])
    assert images.shape == (2, 3, 16, 16)
    assert images.abs().max() <= 1
    assert [sorted(set(mask.flatten().tolist())) for mask in masks] == [[0, 4], [0, 5]]


def test_held_out_images_are_of_every_class(monkeypatch, tmp_path):
    """A class that does not occur would count as never found."""
    shown = []
    monkeypatch.setattr(segment_shapes, "fit", lambda *_: None)
    monkeypatch.setattr(segment_shapes, "scores", lambda found, masks, num: shown.append(masks) or (0.0, 0.0))
    segment_shapes.main(segment_shapes.SegmentConfig(["UNet"], image_size=16, output=tmp_path / "found.png"))
    assert shown[0].flatten(1).max(dim=1).values.bincount().tolist() == [0, *[40] * 10]


def test_a_short_training_prints_a_table_and_draws_what_was_found(tmp_path):
    output = tmp_path / "found.png"
    flags = ["--num_steps", "2", "--image_size", "16", "--difficulty", "easy", "--output", str(output)]
    done = run("scripts/segment_shapes.py", *flags, cwd=ROOT)
    assert "| XSwin " in done.stdout
    assert "| UNet " in done.stdout
    with Image.open(output) as picture:
        assert picture.width > 10 * 16


def test_unknown_model_lists_what_there_is(tmp_path):
    done = run("scripts/segment_shapes.py", "--models", "[Swin]", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "--models Swin: choose from XSwin, USwin, UNet" in done.stderr
