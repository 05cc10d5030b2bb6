"""Layers of the backbones, and the tensor shapes that their signatures name.

Axis letters, here and in the backbones: `b` batch, `c` channels, `h w` grid, `n` tokens, `m` tokens attended to,
`d` width, `k` attention heads, `e` width of one head, `p q` sides of a patch. The conditioning `Cond` is passed after
its SiLU, so layers apply none.
"""

from collections.abc import Collection
from typing import NamedTuple

from jaxtyping import Float, Int64, Shaped
from torch import Tensor


class FusedOutputs(NamedTuple):
    """The outputs of all of a network's linear layers of the conditioning, in the place of the conditioning itself."""

    outputs: Float[Tensor, "b outputs"]


Size = int | tuple[int, int]  # one side, or height and width
Images = Float[Tensor, "b c h w"]
Output = Float[Tensor, "b c_out h w"]
Grid = Float[Tensor, "b h w d"]
Tokens = Float[Tensor, "b n d"]
Cond = Float[Tensor, "b cond"] | FusedOutputs
Times = Shaped[Tensor, " b"]
Labels = Int64[Tensor, " b"]
GuidanceScales = Float[Tensor, " b"] | None  # of the guidance that each output is to have; None: 1
AugmentLabels = Float[Tensor, "b augment"] | None  # of each image's augmentation (Karras et al. 2022); None: none


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise `ValueError` unless the argument `name` has one of the values in `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value} must be one of {', '.join(choices)}")
