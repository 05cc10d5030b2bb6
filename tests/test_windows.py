"""Window partitions: which tokens attend to each other, padding, shifts, and merging."""

import pytest
import torch

from models import create_model
from models.layers.modulation import ConditioningLayers
from models.layers.style import BlockStyle
from models.layers.window import Neighbourhoods, WindowAttention, WindowCrossAttention, Windows
from models.xswin import SwinBlock


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (8, 8), (3, 3), (4, 10)])
def test_windows_equal_attention_among_the_tokens_that_share_one(size, shifted):
    """Token by token, by definition: tokens that share a window after the shift, and never across the border of the
    grid."""
    torch.manual_seed(0)
    window, heads, dim = 4, 2, 16
    attention = WindowAttention(dim, heads, window, shifted=shifted).eval()
    height, width = size
    x = torch.randn(1, height, width, dim)
    shifts = [window // 2 if shifted and side > window else 0 for side in size]

    bias = torch.cat([attention.q_bias, torch.zeros(dim), attention.v_bias])
    q, k, v = attention.qkv(x[0].flatten(0, 1), bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
    scale = attention.logit_scale.exp()
    logits = scale * torch.nn.functional.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    place = [(row, column) for row in range(height) for column in range(width)]
    shared = torch.full((len(place), len(place)), -torch.inf)
    bias = torch.zeros(heads, len(place), len(place))
    table = attention.position_bias()[:, Windows(window, window, window).offsets(x.device)]
    for i, token in enumerate(place):
        for j, other in enumerate(place):
            # floor division: the shift leaves a narrower window at each end, which nothing joins round the edge
            windows = [[(p - s) // window for p, s in zip(t, shifts, strict=True)] for t in (token, other)]
            if windows[0] == windows[1]:
                inside = [[(p - s) % window for p, s in zip(t, shifts, strict=True)] for t in (token, other)]
                shared[i, j] = 0
                bias[:, i, j] = table[:, inside[0][0] * window + inside[0][1], inside[1][0] * window + inside[1][1]]
    expected = attention.proj(((logits + bias + shared).softmax(-1) @ v).transpose(0, 1).flatten(1))
    with torch.no_grad():
        assert torch.allclose(attention(x)[0].flatten(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (3, 3)])
def test_cross_attention_never_looks_at_padding(size):
    torch.manual_seed(0)
    attention = WindowCrossAttention(16, 2, 4).eval()
    x, context = torch.randn(1, *size, 16), torch.randn(1, *size, 16)
    corner = context[:, 4:, 4:] if size == (5, 7) else context  # the last window, mostly padding
    mine = x[:, 4:, 4:] if size == (5, 7) else x
    with torch.no_grad():
        alone = attention.attention(mine.flatten(1, 2), corner.flatten(1, 2)).unflatten(1, mine.shape[1:3])
        together = attention(x, context)
    assert torch.allclose(together[:, 4:, 4:] if size == (5, 7) else together, alone, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (4, 12), (3, 3)])
def test_merge_undoes_partition(shift, size):
    windows, x = Windows(*size, 4, shift), torch.randn(2, *size, 3)
    assert torch.equal(windows.merge(windows.partition(x)), x)


def test_shifted_windows_do_not_wrap_round():
    mask = Windows(8, 8, 4, 2).mask(torch.device("cpu"))
    assert not mask[0].any()  # the first window lies inside the grid
    assert mask[-1].any()  # the last holds tokens from both ends
    assert Windows(4, 4, 4, 2).mask(torch.device("cpu")) is None  # one window: no shift


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (2, 6)])
def test_each_token_attends_to_the_neighbourhood_around_it(size):
    """The attention of a token equals attention among the 3 x 3 tokens nearest to it that lie in the grid."""
    torch.manual_seed(0)
    attention, (height, width) = WindowAttention(16, 2, 3, shifted=False, neighbourhood=True).eval(), size
    x = torch.randn(1, *size, 16)
    with torch.no_grad():
        together = attention(x)
        for row in range(height):
            for column in range(width):
                top, left = min(max(row - 1, 0), max(0, height - 3)), min(max(column - 1, 0), max(0, width - 3))
                around = x[:, top : top + 3, left : left + 3]
                alone = attention(around)[:, row - top, column - left]
                assert torch.allclose(together[:, row, column], alone, atol=1e-5)


def test_a_grid_no_larger_than_the_neighbourhood_needs_no_mask():
    assert Neighbourhoods(3, 2, 3).mask(torch.device("cpu")) is None
    assert Neighbourhoods(3, 4, 3).mask(torch.device("cpu")) is not None


def test_a_block_of_neighbourhoods_sees_around_each_token_and_one_of_windows_inside_its_window():
    torch.manual_seed(0)
    reach: dict[int | None, set] = {}
    for neighbourhood in (None, 3):
        args: dict = {"window_size": 2, "shifted": False, "mlp_ratio": 2.0, "drop_path": 0.0}
        kinds: dict = {
            "cond_layers": ConditioningLayers("none", 16),
            "style": BlockStyle(),
            "neighbourhood": neighbourhood,
        }
        block, grid = SwinBlock(16, 2, **args, **kinds), torch.randn(1, 8, 8, 16, requires_grad=True)
        block(grid, torch.zeros(1, 16))[0, 3, 3, 0].backward()
        assert grid.grad is not None
        reach[neighbourhood] = {tuple(place) for place in grid.grad[0].abs().sum(-1).nonzero().tolist()}
    assert reach[None] == {(row, column) for row in (2, 3) for column in (2, 3)}
    assert reach[3] == {(row, column) for row in (2, 3, 4) for column in (2, 3, 4)}


def test_a_neighbourhood_of_an_even_side_is_refused():
    sizes = {"input_size": 8, "in_channels": 4, "out_channels": 4, "num_classes": 3}
    with pytest.raises(ValueError, match="neighbourhood=2 must be an odd number"):
        create_model("XSwin-S", **sizes, neighbourhood=2)
