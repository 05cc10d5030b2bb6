"""Backbones from outside of this repository: what they are given of the contract, and how they are refused."""

import pytest
import torch
from torch import nn

from models import BACKBONES, create_model
from models.backbone import Backbone, as_backbone

SIZES = {"input_size": (8, 8), "in_channels": 4, "out_channels": 8, "num_classes": 5}


class Plain(nn.Module):
    """A backbone whose author does not know the contract."""

    def __init__(self, *, input_size, in_channels, out_channels, num_classes, width=8):
        super().__init__()
        self.first, self.last = nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, out_channels, 1)

    def forward(self, x_t, t, y):
        return self.last(self.first(x_t) + t[:, None, None, None])


@pytest.fixture
def outside(monkeypatch):
    """A backbone from outside of this repository."""
    monkeypatch.setitem(BACKBONES, "Plain", (Plain, {"width": 4}))
    return create_model("Plain", **SIZES)


def test_a_plain_module_is_given_what_it_lacks_of_the_contract(outside):
    inputs = torch.zeros(3, 4, 8, 8), torch.zeros(3), torch.arange(3)
    assert {name: getattr(outside, name) for name in SIZES} == SIZES
    assert isinstance(outside, Plain)
    assert isinstance(outside, Backbone)
    assert (outside.block_types(), outside.extras(), outside._no_split_modules) == ((), (), [])
    assert outside.first.out_channels == 4
    assert outside(*inputs).shape == (3, 8, 8, 8)
    assert [len(group["params"]) for group in outside.param_groups()] == [2, 2]
    assert set(outside.state_dict()) == set(Plain(**SIZES).state_dict())
    with pytest.raises(ValueError, match=r"there are 0 blocks"):
        outside.features(*inputs, [1.0])


class Numbers(Plain):
    """A backbone whose numbers may have any sign."""

    def __init__(self, *, input_size, in_channels, out_channels, num_classes, layer=-1, num_registers=4, shift=0.0):
        super().__init__(
            input_size=input_size, in_channels=in_channels, out_channels=out_channels, num_classes=num_classes
        )
        self.numbers = layer, num_registers, shift


def test_numbers_of_a_backbone_from_outside_may_have_any_sign(monkeypatch):
    monkeypatch.setitem(BACKBONES, "Mine", (Numbers, {}))
    model = create_model("Mine", **SIZES, layer=-2, num_registers=0, shift=-1.0)
    assert model.numbers == (-2, 0, -1.0)


class Extra(Plain):
    """A backbone with a second time."""

    def forward(self, x_t, t, y, *, t_next=None):
        return super().forward(x_t, t, y)


class NoClasses(nn.Module):
    """A backbone without `num_classes`."""

    def __init__(self, *, input_size, in_channels, out_channels):
        super().__init__()


class NoLabels(Plain):
    """A backbone that takes no labels."""

    def forward(self, x_t, t):
        return super().forward(x_t, t, None)


def test_extras_are_the_keyword_arguments_of_forward():
    assert as_backbone(Extra)(**SIZES).extras() == ("t_next",)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (len, r"--model: len is no nn.Module class"),
        (NoClasses, r"--model: the constructor of NoClasses must take .*num_classes; it lacks num_classes"),
        (NoLabels, r"--model: NoLabels must have forward\(self, x_t, t, y\) \(too many positional"),
    ],
)
def test_what_cannot_be_a_backbone_is_told_before_anything_is_allocated(thing, message, monkeypatch):
    monkeypatch.setitem(BACKBONES, "Mine", (thing, {}))
    with pytest.raises(ValueError, match=message):
        create_model("Mine", **SIZES)
