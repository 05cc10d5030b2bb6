import pytest
import torch

from data.shapes import DIFFICULTIES, SHAPES, ShapesDataset


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_image_is_a_function_of_seed_and_index(difficulty):
    a, b = (ShapesDataset(40, difficulty=difficulty) for _ in range(2))
    assert all(torch.equal(a[i][0], b[i][0]) for i in (0, 7, 39))
    assert not torch.equal(a[0][0], ShapesDataset(40, difficulty=difficulty, seed=1)[0][0])
    assert torch.equal(a[7][0], ShapesDataset(100, difficulty=difficulty)[7][0])


def test_splits_are_disjoint_and_balanced():
    train, test = (ShapesDataset(50, split=split) for split in ("train", "test"))
    assert not set(train.source_indices.tolist()) & set(test.source_indices.tolist())
    assert torch.bincount(train.labels).tolist() == [5] * 10
    assert len(test) == 10


@pytest.mark.parametrize("size", [8, 27, 64, 128])
def test_any_size(size):
    image, label = ShapesDataset(10, image_size=size)[3]
    assert image.shape == (3, size, size)
    assert image.dtype == torch.uint8
    assert label == 3


def test_edges_are_anti_aliased_and_shapes_visible():
    dataset = ShapesDataset(10, image_size=64)
    for index, name in enumerate(SHAPES):
        image = dataset[index][0].float()
        ground = image[:, 0, 0]
        distance = (image - ground[:, None, None]).abs().amax(dim=0)
        inside, edge = (distance > 0.95 * distance.max()).float().mean(), (distance > 0).float().mean()
        assert 0.1 < inside < 0.7, name
        assert edge > inside, name


def test_classes_can_be_told_apart():
    """The nearest mean silhouette of the other images identifies the class of easy shapes."""
    dataset = ShapesDataset(200, image_size=16)
    images = torch.stack([dataset[i][0] for i in range(200)]).float()
    silhouettes = (images - images[:, :, :1, :1]).abs().amax(dim=1).flatten(1)
    silhouettes = silhouettes / silhouettes.amax(dim=1, keepdim=True)
    means = torch.stack([silhouettes[:100][dataset.labels[:100] == label].mean(dim=0) for label in range(10)])
    predicted = torch.cdist(silhouettes[100:], means).argmin(dim=1)
    assert (predicted == dataset.labels[100:]).float().mean() > 0.98


def test_unknown_settings_are_told():
    with pytest.raises(ValueError, match=r"--data.difficulty brutal: unknown, choose from easy, medium, hard"):
        ShapesDataset(10, difficulty="brutal")
    for num_images in (3, 10**12):
        with pytest.raises(ValueError, match=rf"--data.num_images {num_images}: must lie in 10..100000000"):
            ShapesDataset(num_images)


@pytest.mark.parametrize("difficulty", ["easy", "medium"])
def test_mask_is_where_the_shape_lies(difficulty):
    """On plain backgrounds, pixels that differ from the background by half of the shape's colour are the shape."""
    dataset = ShapesDataset(20, difficulty=difficulty, image_size=64)
    for index in range(20):
        image, mask = dataset[index][0].float(), dataset.mask(index)
        ground, shape = image[:, ~mask].median(dim=1).values, image[:, mask].median(dim=1).values
        away = (image - ground[:, None, None]).norm(dim=0) > (image - shape[:, None, None]).norm(dim=0)
        assert (away == mask).float().mean() > 0.99, index
        assert 0.02 < mask.float().mean() < 0.8
