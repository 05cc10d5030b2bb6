"""Kernel launches on a GPU: how many, which kernels, and that fused operations compute the same."""

import copy
from itertools import product

import pytest
import torch
from launches import count_launches
from test_backbones import inputs, small, wake

from diffusion.forward_mode import load_forward_rules
from models import create_model
from models.layers import kernel_launches
from models.layers.modulation import Modulator
from models.layers.window import ContinuousPositionBias, WindowAttention, WindowCrossAttention, Windows
from training.preparation import fuse_weight_casts, recompute_blocks

TRAINING, SAMPLING = 492, 443  # launches of XSwin's forward pass, of which there were 1,323 and 972


@pytest.fixture
def fused(monkeypatch):
    """A switch that makes the CPU fuse operations as a GPU does."""
    return lambda on: monkeypatch.setattr(kernel_launches, "FUSED_DEVICES", {"cpu"} if on else set())


def test_xswin_launches_few_kernels_and_all_attention_is_fused():
    model = create_model("XSwin", input_size=8, in_channels=4, out_channels=8, num_classes=101).train()
    fuse_weight_casts(model)
    found = count_launches(model)
    assert sum(found.names.values()) <= TRAINING, found.lines.most_common(20)
    swin = {"efficient 6 x 64": 5, "efficient 12 x 16": 5, "efficient 12 x 64": 1, "efficient 24 x 16": 1}
    swin["efficient 6 x 64"] += 1  # the skips' cross-attention, by windows
    swin["efficient 12 x 16"] += 1
    assert found.attention == {**swin, "flash 12 x 16": 3}
    assert not any(name in found.names for name in ("roll", "bmm", "_safe_softmax")), "windows are not moved about"
    assert found.names["_foreach_copy_"] == 16, "weights are cast by the block: 15, and what lies in none"


def test_sampling_does_not_cast_weights_again_at_each_call():
    model = create_model("XSwin", input_size=8, in_channels=4, out_channels=8, num_classes=101).eval()
    found = count_launches(model)
    assert sum(found.names.values()) <= SAMPLING, found.lines.most_common(20)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("size", "window"), [*product([(8, 8), (5, 7), (12, 20), (9, 3)], [2, 3, 4]), ((3, 3), 4)])
def test_windows_computed_in_shared_tiles_equal_separate_windows(size, window, shifted, fused):
    torch.manual_seed(0)
    attention = WindowAttention(16, 2, window, shifted=shifted).double()
    skip = WindowCrossAttention(16, 2, window).double()
    x, token = torch.randn(2, *size, 16, dtype=torch.float64), torch.randn(2, 1, 16, dtype=torch.float64)
    found = []
    for on in (False, True):
        fused(on)
        found.append((attention(x), attention(x, token), skip(x, x.roll(1, dims=0))))
    for alone, shared in zip(*found, strict=True):
        assert torch.allclose(alone, shared, atol=1e-9, rtol=1e-6)


def test_a_grid_of_one_tile_is_left_as_it_is():
    windows, x = Windows(8, 8, 2, 1, tile=8), torch.randn(2, 8, 8, 3)
    tiles = windows.partition(x)
    assert tiles.shape == (2, 1, 64, 3)
    assert tiles.data_ptr() == x.data_ptr() == windows.merge(tiles).data_ptr()
    reached = windows.mask(x.device).eq(0).sum(dim=-1)[0].unflatten(0, (8, 8))
    assert reached[0, 0] == 1, "a corner, which the shift leaves alone"
    assert reached[0, 1] == 2
    assert reached[1, 1] == 4


VARIANTS = [
    {},
    {"conditioning": "adaln_zero"},
    {"conditioning": "tokens", "skip": "global_cross_attention"},
    {"skip": "none", "qk_norm": True, "norm": "rms"},
    {"drop_path": 0.5, "final_downsample": True},
    {"window_size": 4, "wide_decoder": False, "neighbourhood": 3},
]


@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_xswin_with_fused_operations_has_the_same_outputs_and_gradients(variant, size, fused):
    model, (x, t, y) = wake(small("XSwin", size, **variant)).double().train(), inputs(size=size)
    found = []
    for on in (False, True):
        fused(on)
        torch.manual_seed(3)
        model.zero_grad()
        output = model(x.double(), t.double(), y)
        output.square().mean().backward()
        found.append([output.detach(), *(parameter.grad for parameter in model.parameters())])
    for apart, together in zip(*found, strict=True):
        assert torch.allclose(apart, together, rtol=1e-5, atol=1e-9)


def test_forward_derivatives_along_time_pass_through_fused_operations(fused):
    model, (x, t, y) = wake(small("XSwin")).double().eval(), inputs()
    load_forward_rules()
    found = []
    for on in (False, True):
        fused(on)
        with torch.autograd.forward_ad.dual_level():
            now = torch.autograd.forward_ad.make_dual(t.double(), torch.ones(len(t), dtype=torch.float64))
            found.append(torch.autograd.forward_ad.unpack_dual(model(x.double(), now, y)).tangent)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-12)
    assert found[0].any()


@pytest.mark.parametrize(("kind", "path"), [(Modulator, "linear"), (ContinuousPositionBias, "mlp.2")])
def test_layers_are_not_fused_where_something_wraps_one(kind, path, fused):
    """As LoRA does: each is then called on its own."""
    fused(True)
    model, (x, t, y) = wake(small("XSwin")).eval(), inputs()
    part = next(module for module in model.modules() if isinstance(module, kind))
    with torch.no_grad():
        plain = model(x, t, y)
        part.set_submodule(path, torch.nn.Sequential(part.get_submodule(path), torch.nn.Identity()))
        assert torch.allclose(model(x, t, y), plain, atol=1e-5)


def test_a_copy_of_a_model_uses_its_own_weights(fused):
    """As the average of the weights does."""
    fused(True)
    model, (x, t, y) = wake(small("XSwin")).eval(), inputs()
    other = copy.deepcopy(model)
    with torch.no_grad():
        plain = model(x, t, y)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert torch.equal(other(x, t, y), plain)
        assert not torch.allclose(model(x, t, y), plain, rtol=0.1)


def test_fused_operations_work_with_recomputed_blocks(fused):
    fused(True)
    found, (x, t, y) = [], inputs()
    for recomputed in (False, True):
        model = wake(small("XSwin", drop_path=0.5)).train()
        if recomputed:
            recompute_blocks(model, torch.device("cpu"))
        torch.manual_seed(3)
        output = model(x, t, y)
        output.square().mean().backward()
        found.append([output.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["XSwin", "DiT-S/2", "UNet-Mini"])
def test_weights_that_are_cast_by_the_block_give_the_same_gradients(name):
    found, (x, t, y) = [], inputs()
    for joined in (False, True):
        model = wake(small(name)).train()
        if joined:
            fuse_weight_casts(model)
        before = dict(model.named_parameters())
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x, t, y)
        output.float().square().mean().backward()
        assert all(parameter is before[key] for key, parameter in model.named_parameters()), "they are put back"
        found.append([output.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_cast_weights_are_restored_when_a_block_fails():
    model = small("XSwin")
    fuse_weight_casts(model)
    before = list(model.parameters())
    model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ZeroDivisionError):
        model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.features(*inputs(), (0.5,))) == 1  # which stops halfway by an exception
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
