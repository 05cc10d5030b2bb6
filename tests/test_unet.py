"""The U-Nets: named sizes, placement and axis of attention, and images of any size."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import studies.cascade  # noqa: F401, registers a backbone
from models import create_model
from models.layers import attention as attention_layers
from models.layers import residual
from models.layers.embedding import Conditioning
from models.layers.residual import ATTENTIONS, UPSAMPLERS, ChannelAttention, ImageAttention, ResidualBlock


def build(name="UNet-Mini", *, input_size=16, num_classes=0, **overrides):
    torch.manual_seed(0)
    shape = {"input_size": input_size, "in_channels": 3, "out_channels": 3, "num_classes": num_classes}
    return create_model(name, **shape, **overrides).eval()


def small(**overrides):
    sizes = {"channels": (8, 16, 24), "middle_channels": (16,), "time_dim": 16, "num_heads": 2}
    return build(**{**sizes, "down": ("RA", "A"), "middle": ("A",), "up": ("A", "R"), **overrides})


def wake(module):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return module


def run(model, *size, batch=2):
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(x, torch.arange(batch) * 400, torch.zeros(batch, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "published", "ours"),
    [
        ("UNet-Mini", 10, 10.2),
        ("UNet-Simple", 49, 50.1),
        ("UNet-Mega", 74, 77.0),
        ("UNet-Giga", 85, 83.0),
        ("UNet-CIFAR10-S", 15, 16.9),
    ],
)
def test_parameters_are_those_of_the_table(name, published, ours):
    with torch.device("meta"):
        millions = sum(parameter.numel() for parameter in build(name).parameters()) / 1e6
    assert millions == pytest.approx(ours, abs=0.06)  # as the comment beside the table says
    assert millions == pytest.approx(published, rel=0.15)


def placement(model):
    """For each part of the network, which blocks are followed by attention."""
    return {
        part: [
            "".join("A" if isinstance(after, ImageAttention) else "R" for after in level.attentions)
            for level in getattr(model, part)
        ]
        for part in ("encoder", "middle", "decoder")
    }


@pytest.mark.parametrize(
    ("name", "encoder", "middle", "decoder"),
    [
        ("UNet-Mini", ["AA"] * 3, ["AA", "AA"], ["AA"] * 3),
        ("UNet-Simple", ["AAA"] * 4, ["AA", "AA"], ["AAA"] * 4),
        ("UNet-Mega", ["AAAAA"] * 4, ["AAA", "AAA"], ["AAAAA"] * 4),
        ("UNet-Giga", ["RARAA"] * 3, ["RAR", "RAR"], ["RARAR"] * 3),
        ("UNet-CIFAR10", ["RR", "AA", "AA"], ["RR"], ["AA", "AA", "RR"]),
    ],
)
def test_attention_is_where_it_was_asked_for(name, encoder, middle, decoder):
    with torch.device("meta"):
        assert placement(build(name)) == {"encoder": encoder, "middle": middle, "decoder": decoder}


def attention_calls(model, *size, monkeypatch):
    """(tokens, head size) of each attention call of a forward pass, in order."""
    calls = []
    for module in (attention_layers, residual):
        attend = module.attend

        def spy(q, k, v, attend=attend, **kwargs):
            calls.append(tuple(q.shape[-2:]))
            return attend(q, k, v, **kwargs)

        monkeypatch.setattr(module, "attend", spy)
    run(model, *size)
    return calls


def test_cifar_study_attends_at_16_and_8(monkeypatch):
    with torch.device("meta"):
        model = build("UNet-CIFAR10-S", input_size=32)
    model = model.to_empty(device="cpu")
    assert attention_calls(wake(model), 32, 32, monkeypatch=monkeypatch) == [(256, 16), (64, 32), (64, 16), (256, 8)]


def test_flags_place_attention_blocks(monkeypatch):
    model = small(down=["RR", "RA"], middle=["R"], up=["R", "R"])
    assert placement(model)["encoder"] == ["RR", "RA"]
    assert attention_calls(model, 12, 8, monkeypatch=monkeypatch) == [(6 * 4, 12)]


def test_tokens_are_pixels_or_channels(monkeypatch):
    pixels = attention_calls(small(), 16, 16, monkeypatch=monkeypatch)
    monkeypatch.undo()
    channels = attention_calls(small(attention_axis="channels"), 16, 16, monkeypatch=monkeypatch)
    assert pixels == [(256, 8), (64, 12), (16, 8), (64, 8)]  # width: channels over 2 heads
    assert channels == [(16, 128), (24, 32), (16, 8), (16, 32)]  # width: pixels over 2 heads


def test_both_axes_have_the_same_parameters():
    ours = {axis: {n: p.shape for n, p in small(attention_axis=axis).named_parameters()} for axis in ATTENTIONS}
    assert ours["pixels"] == ours["channels"]


@pytest.mark.parametrize("num_pixels", [24, 25])
def test_channel_attention_is_multi_head_attention_of_the_transposed_image(num_pixels):
    """Compared with torch's own, whose heads split the width; here projections act on channels, outside of it."""
    torch.manual_seed(0)
    heads, dim = 4, 8
    layer = wake(ChannelAttention(dim, heads)).double()
    x = torch.randn(2, num_pixels, dim, dtype=torch.float64)
    q, k, v = (part.mT for part in layer.qkv(x).chunk(3, dim=-1))  # [b d n]
    padded = -(-num_pixels // heads) * heads
    q, k, v = (nn.functional.pad(part, (0, padded - num_pixels)) for part in (q, k, v))
    eye, zero = torch.eye(padded, dtype=torch.float64), torch.zeros(3 * padded, dtype=torch.float64)
    expected, _ = nn.functional.multi_head_attention_forward(
        *(part.transpose(0, 1) for part in (q, k, v)),
        *(padded, heads, torch.cat([eye] * 3), zero, None, None, False, 0.0, eye, None),
        need_weights=False,
    )
    expected = layer.proj(expected.transpose(0, 1)[..., :num_pixels].mT)
    assert torch.allclose(layer(x), expected, atol=1e-12)


def test_pixel_attention_equals_that_of_diffusers():
    torch.manual_seed(0)
    ours = wake(ImageAttention(16, 2, "pixels"))
    theirs = Attention(16, heads=2, dim_head=8, norm_num_groups=8, eps=1e-5, bias=True, residual_connection=True)
    theirs.group_norm.load_state_dict(ours.norm.state_dict())
    for part, weight, bias in zip(
        (theirs.to_q, theirs.to_k, theirs.to_v),
        *(tensor.chunk(3) for tensor in (ours.attention.qkv.weight, ours.attention.qkv.bias)),
        strict=True,
    ):
        part.load_state_dict({"weight": weight, "bias": bias})
    theirs.to_out[0].load_state_dict(ours.attention.proj.state_dict())
    x = torch.randn(2, 16, 5, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("out_channels", [16, 24])
def test_residual_block_equals_that_of_diffusers(out_channels):
    torch.manual_seed(0)
    ours = wake(ResidualBlock(16, out_channels, 12, dropout=0.0))
    theirs = ResnetBlock2D(in_channels=16, out_channels=out_channels, temb_channels=12, groups=8, eps=1e-5)
    names = {"cond": "time_emb_proj", "shortcut": "conv_shortcut"}
    renamed = {".".join([names.get(key.split(".")[0], key.split(".")[0]), key.split(".")[1]]): value
               for key, value in ours.state_dict().items()}  # fmt: skip
    theirs.load_state_dict(renamed)
    x, cond = torch.randn(2, 16, 5, 6), torch.randn(2, 12)
    assert torch.allclose(ours(x, nn.functional.silu(cond)), theirs(x, cond), atol=1e-5)


@settings(max_examples=30)
@given(
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    axis=st.sampled_from(sorted(ATTENTIONS)),
    upsampling=st.sampled_from(sorted(UPSAMPLERS)),
)
def test_outputs_have_the_size_of_inputs_of_any_size(height, width, axis, upsampling):
    model = wake(small(attention_axis=axis, upsampling=upsampling, stem_size=7))
    out = run(model, height, width)
    assert out.shape == (2, 3, height, width)
    assert out.is_contiguous()
    assert out.isfinite().all()


@pytest.mark.parametrize("upsampling", UPSAMPLERS)
def test_every_pixel_of_an_odd_sized_output_depends_on_the_network(upsampling):
    """No output pixel is made of padding alone: the last row and column depend on the middle like all others."""
    model = wake(small(upsampling=upsampling))
    before = run(model, 7, 9)
    model.middle[0].blocks[0].cond.bias.data[::2] += 1  # not all of a group, whose norm would take it back
    assert (run(model, 7, 9) != before).all()


def test_decoder_levels_concatenate_the_inputs_of_mirrored_encoder_levels():
    model, seen = small(), {"in": [], "joined": []}
    for level in model.encoder:
        level.register_forward_pre_hook(lambda _, args: seen["in"].append(args[0]))
    for level in model.decoder:
        level.register_forward_pre_hook(lambda _, args: seen["joined"].append(args[0]))
    run(wake(model), 10, 10)
    for skip, joined in zip(reversed(seen["in"]), seen["joined"], strict=True):
        assert torch.equal(joined[:, -skip.shape[1] :], skip)


def test_memory_format_and_dropout_change_no_sample():
    model = wake(small(dropout=0.5))
    assert torch.equal(run(model, 9, 9), run(model, 9, 9))
    x = torch.randn(2, 3, 9, 9)
    t, y = torch.arange(2), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(model(x, t, y), model(x.contiguous(memory_format=torch.channels_last), t, y))
        assert not torch.equal(model.train()(x, t, y), model(x, t, y))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"down": ["AA"]}, r"down=\['AA'\]: must be 2 words, one for each of its widths"),
        ({"middle": "A"}, r"middle=A: must be 1 words"),
        ({"up": ["A", "AX"]}, r"up=AX: a letter a block, R for a residual block, A for one with attention"),
        ({"down": ["A", ""]}, r"down=: a letter a block"),
        ({"channels": (8, 12, 16)}, r"12 channels: every width of a U-Net must be a multiple of 8"),
        ({"num_heads": 3}, r"num_heads=3 must divide the width 16"),
        ({"attention_axis": "rows"}, r"attention_axis=rows must be one of pixels, channels"),
        ({"upsampling": "cubic"}, r"upsampling=cubic must be one of transposed, nearest"),
        ({"stem_size": 4}, r"stem_size=4 must be odd"),
        ({"dropout": 1.5}, r"dropout=1.5 must lie in \[0, 1\)"),
    ],
)
def test_mistakes_are_told_in_words(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)


@pytest.mark.parametrize("name", ["UNet-MNIST", "UNet-CIFAR10-S", "Cascade"])
def test_labels_and_times_affect_an_untrained_unet(name):
    """Each block adds the conditioning to features of about unit variance; otherwise it takes epochs to learn to use
    it."""
    torch.manual_seed(0)
    model = create_model(name, input_size=32, in_channels=3, out_channels=3, num_classes=10)
    conditioning = next(module for module in model.modules() if isinstance(module, Conditioning))
    labels, times = torch.arange(10), torch.arange(0, 1000, 100)
    for block in (module for module in model.modules() if isinstance(module, ResidualBlock)):
        by_label = block.cond(conditioning(torch.full((10,), 500), labels))
        by_time = block.cond(conditioning(times, torch.zeros_like(labels)))
        assert by_label.std(dim=0).mean() > 0.2
        assert by_time.std(dim=0).mean() > 0.01
