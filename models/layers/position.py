"""Fixed positions and relative position bias."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def sincos_2d(dim: int, height: int, width: int) -> Float[Tensor, "n dim"]:
    """Fixed sin-cos positions of a grid, row by row: half the width for the column, half for the row.

    Raises:
        ValueError: when four does not divide the width.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4 for 2-D sin-cos positions")
    omega = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.flatten()[:, None] * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=-1).float()


class ContinuousPositionBias(nn.Module):
    """Log-spaced continuous position bias of Swin V2 (Liu et al. 2022, section 3.3): `16 sigmoid(mlp(offset))`."""

    def __init__(self, window_size: int, num_heads: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_heads, bias=False))
        w = window_size
        offsets = torch.arange(1 - w, w, dtype=torch.float32) * 8 / max(1, w - 1)
        offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / 3  # log2(8) = 3
        table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)
        row, column = torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")
        row, column = row.flatten(), column.flatten()
        index = (row[:, None] - row + w - 1) * (2 * w - 1) + (column[:, None] - column + w - 1)
        self.register_buffer("table", rearrange(table, "i j two -> (i j) two"), persistent=False)
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Float[Tensor, "k n n"]:
        bias = 16 * self.mlp(self.table).float().sigmoid()  # [offsets k]
        return rearrange(bias[self.index], "n m k -> k n m")
