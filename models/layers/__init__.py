"""Bricks of the backbones, and the shapes that their signatures name.

Axis letters, here and in the backbones: `b` batch, `c` channels, `h w` grid, `n` tokens, `m` tokens attended to,
`d` width, `k` attention heads, `e` width of one head, `p q` sides of a patch. Conditioning has gone through its SiLU
once, at the top.
"""

from collections.abc import Collection

from jaxtyping import Float, Int64, Shaped
from torch import Tensor

Size = int | tuple[int, int]  # a side, or height and width
Images = Float[Tensor, "b c h w"]
Output = Float[Tensor, "b c_out h w"]
Grid = Float[Tensor, "b h w d"]
Tokens = Float[Tensor, "b n d"]
Cond = Float[Tensor, "b cond"]
Times = Shaped[Tensor, " b"]
Labels = Int64[Tensor, " b"]
Changes = Float[Tensor, "b augment"] | None  # of images, by numbers; None: none


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value} must be one of {', '.join(known)}")
