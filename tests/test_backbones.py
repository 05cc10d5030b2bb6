"""The contract of backbones, on a small one of each in the registry: what trainer and samplers rely on."""

import inspect
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import studies.cascade  # noqa: F401, registers a backbone
from models import BACKBONES, class_of, create_model
from models.backbone import Backbone
from models.layers.modulation import Modulator
from models.layers.style import Mlp
from training.preparation import recompute_blocks

SMALL = {
    "XSwin": {"dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_global_blocks": 1},
    "DiT": {"dim": 16, "depth": 4, "num_heads": 2},
    "UViTTokens": {"dim": 16, "depth": 5, "num_heads": 2},
    "UNet": {
        "channels": (16, 24, 32),
        "down": ("RA", "A"),
        "middle_channels": (16,),
        "middle": ("AR",),
        "up": ("A", "RA"),
        "time_dim": 16,
    },
    "Cascade": {
        "coarse_args": {"width": 8, "latent": 16, "num_blocks": 2},
        "upsampler_args": {"width": 8},
        "refiner_args": {"width": 16, "depth": 1, "num_heads": 2},
    },
}
FAMILIES = ["XSwin", "USwin", "DiT-S/2", "DiT-S/4", "UViT-S/2", "UViT-tokens-S/2", "UNet-Mini", "UNet-CIFAR10"]
FAMILIES += ["Cascade"]
families = pytest.mark.parametrize("name", FAMILIES)


def small(name, input_size=8, num_classes=5, **overrides):
    torch.manual_seed(0)
    shrink = SMALL[class_of(name).__name__]
    shape = {"input_size": input_size, "in_channels": 4, "out_channels": 8, "num_classes": num_classes}
    return create_model(name, **{**shape, **shrink, **overrides})


def inputs(batch=3, size=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, *size, generator=generator)
    return x, torch.arange(batch) * 300, torch.arange(batch) % 6


def wake(model):
    """Give zero-initialised layers values, as they block the gradients behind them."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_builds_on_the_meta_device(name, **variant):
    with torch.device("meta"):
        model = create_model(name, input_size=32, in_channels=4, out_channels=8, num_classes=1000, **variant)
    assert (model.in_channels, model.out_channels, model.num_classes) == (4, 8, 1000)
    assert model.input_size == (32, 32)
    assert isinstance(model, Backbone)
    assert set(model._no_split_modules) == {kind.__name__ for kind in model.block_types()} & {
        type(module).__name__ for module in model.modules()
    }
    blocks = model.repeated_blocks()
    assert len(blocks) > 1
    assert not any(inner in blocks for block in blocks for inner in [*block.modules()][1:])
    decayed, rest = (group["params"] for group in model.param_groups())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names) == sorted(map(id, [*decayed, *rest]))
    assert rest[-1] is not decayed[-1]
    assert all(parameter.ndim > 1 and names[id(parameter)].endswith("weight") for parameter in decayed)
    assert not any("label" in names[id(parameter)] or "norm" in names[id(parameter)] for parameter in decayed)


@pytest.mark.parametrize(
    ("name", "millions"), [("DiT-S/2", 32.5), ("UViT-S/2", 34.0), ("USwin", 33.9), ("XSwin", 35.0), ("DiT", 32.5)]
)
def test_parameters_are_the_papers(name, millions):
    with torch.device("meta"):
        model = create_model(name, input_size=8, in_channels=4, out_channels=8, num_classes=101)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("patch_size", [2, 4])
@pytest.mark.parametrize(("size", "millions"), [("S", 44), ("M", 131), ("L", 287), ("H", 501)])
def test_uvits_have_the_published_number_of_parameters(size, patch_size, millions):
    with torch.device("meta"):
        model = create_model(
            f"U-ViT-{size}/{patch_size}", input_size=16 * patch_size, in_channels=4, out_channels=4, num_classes=1000
        )
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.9)


@families
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (12, 20)])
def test_output_has_the_inputs_size(name, size):
    assert small(name, size).eval()(*inputs(size=size)).shape == (3, 8, *size)


@families
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(name, **variant):
    model = wake(small(name, **variant)).train()
    model(*inputs(batch=6))[:].square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        before_norm = key.endswith(("convs.0.bias", "convs.1.bias", "convs.2.bias", "unpatch.bias"))
        assert parameter.grad.any() or before_norm, key


def count_bytes(counter, tensor):
    counter["bytes"] += tensor.nbytes
    return tensor


RANDOM = {"XSwin": {"drop_path": 0.5}, "DiT": {"drop_path": 0.5}, "UNet": {"dropout": 0.5}}


@families
def test_recomputed_blocks_have_the_same_masks_and_store_less(name):
    found = []
    for recompute in (False, True):
        model = wake(small(name, **RANDOM.get(class_of(name).__name__, {}))).train()
        if recompute:
            recompute_blocks(model, torch.device("cpu"))
        torch.manual_seed(3)
        kept = Counter()
        with saved_tensors_hooks(partial(count_bytes, kept), lambda tensor: tensor):
            loss = model(*inputs())[:].square().mean()
        loss.backward()
        found.append(([parameter.grad for parameter in model.parameters()], kept.total(), torch.rand(1)))
    (whole, all_kept, after), (again, kept, after_again) = found
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))
    assert kept < 0.7 * all_kept
    assert torch.equal(after, after_again)


@pytest.mark.parametrize("name", ["XSwin", "USwin", "DiT", "UViT"])
def test_stochastic_depth_drops_branches_in_training_alone(name):
    model, plain = (wake(small(name, drop_path=rate)) for rate in (0.9, 0.0))
    plain.load_state_dict(model.state_dict())
    x, t, y = inputs(batch=6)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(model.eval()(x, t, y), plain.eval()(x, t, y))
        model, plain = model.train(), plain.train()
        one, other, whole = model(x, t, y)[:], model(x, t, y)[:], plain(x, t, y)[:]
    assert not torch.equal(one, other)
    assert not torch.allclose(one, whole)
    with pytest.raises(ValueError, match=r"drop_path=1.0 must lie in \[0, 1\)"):
        small(name, drop_path=1.0)


def test_recomputation_is_refused_where_it_would_change_the_training():
    for layer, device, words in (("batch", "cpu", "would count each batch twice"), ("group", "mps", "again on mps")):
        model = small("XSwin")
        model.middle[0].norm1 = nn.BatchNorm1d(4) if layer == "batch" else nn.Identity()
        with pytest.raises(ValueError, match=words):
            recompute_blocks(model, torch.device(device))


@families
def test_samples_of_a_batch_do_not_mix(name, **variant):
    model = wake(small(name, **variant)).eval()
    x, t, y = inputs()
    with torch.no_grad():
        together, alone = model(x, t, y), model(x[1:2], t[1:2], y[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-4, rtol=1e-4)


@families
def test_time_and_label_matter_and_the_null_label_is_one(name, **variant):
    model = wake(small(name, **variant)).eval()
    x, t, y = inputs()
    with torch.no_grad():
        base = model(x, t, y)
        assert not torch.allclose(base, model(x, t + 1, y))
        assert not torch.allclose(base, model(x, t, torch.full_like(y, 5)))


@families
def test_unconditional_models_ignore_labels(name, **variant):
    model = wake(small(name, num_classes=0, **variant)).eval()
    x, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, t, y), model(x, t, torch.zeros_like(y)))


@families
def test_features_are_sequences_of_hidden_states_at_shares_of_the_depth(name, **variant):
    model, seen = wake(small(name, **variant)).eval(), []
    for block in model.repeated_blocks():
        block.register_forward_hook(lambda block, inputs, state: seen.append(state))
    shallow, deep, last = model.features(*inputs(), (1e-6, 0.5, 1.0))
    assert len(seen) == len(model.repeated_blocks())
    model.features(*inputs(), (0.5,))
    assert len(seen) < 2 * len(model.repeated_blocks())  # no further than asked
    assert [state.shape[::2] for state in (shallow, deep, last)] == [
        (3, model.as_tokens(seen[index]).shape[2])
        for index in (0, math.ceil(len(model.repeated_blocks()) / 2) - 1, len(model.repeated_blocks()) - 1)
    ]
    assert all(math.isqrt(state.shape[1]) ** 2 == state.shape[1] for state in (shallow, deep, last))  # of an 8x8 image
    torch.testing.assert_close(last, model.as_tokens(seen[len(model.repeated_blocks()) - 1]))
    deep.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert not any(len(block._forward_hooks) > 1 for block in model.repeated_blocks())
    with pytest.raises(ValueError, match=r"features at depths \[0.0\]: give shares in"):
        model.features(*inputs(), [0.0])


VARIANTS = [
    {"skip": "global_cross_attention"},
    {"skip": "none"},
    {"stem": "none"},
    {"conditioning": "adaln_zero"},
    {"conditioning": "tokens"},
    {"wide_decoder": False},
    {"neighbourhood": 3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, *variant.items())))
def test_variants_keep_the_backbones_contract(variant):
    test_every_parameter_has_a_finite_gradient_that_is_not_zero("XSwin", **variant)
    test_samples_of_a_batch_do_not_mix("XSwin", **variant)
    test_time_and_label_matter_and_the_null_label_is_one("XSwin", **variant)
    for size in [(12, 20), (7, 9)]:
        assert small("XSwin", size, window_size=4, **variant).eval()(*inputs(size=size)).shape == (3, 8, *size)


def test_global_cross_attention_is_the_localized_one_in_a_window_as_large_as_the_grid():
    local, everywhere = (
        small("XSwin", skip=skip, window_size=8) for skip in ("cross_attention", "global_cross_attention")
    )
    wake(local.eval())
    everywhere.eval().load_state_dict(local.state_dict())
    with torch.no_grad():
        assert torch.allclose(local(*inputs()), everywhere(*inputs()), atol=1e-6)


def test_a_narrow_decoder_has_blocks_of_the_encoders_size():
    def sizes(stage):
        return [[(name, parameter.shape) for name, parameter in block.named_parameters()] for block in stage.blocks]

    model = small("XSwin", wide_decoder=False)
    for encoder, decoder in zip(model.encoder, reversed(model.decoder), strict=True):
        assert sizes(encoder) == sizes(decoder)


def test_gated_blocks_are_the_identity_at_initialisation():
    model = small("XSwin", conditioning="adaln_zero").eval()
    x, cond = torch.randn(2, 8, 8, 16), torch.randn(2, 16)
    assert torch.equal(model.encoder[0](x, cond, {}), x)
    assert not torch.equal(small("XSwin").eval().encoder[0](x, cond, {}), x)


def test_a_dense_predictor_knows_no_time_and_no_labels():
    model = wake(small("XSwin", num_classes=0, conditioning="none")).eval()
    x, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, t, y), model(x, t + 1, y + 1))
    assert not any("modulator" in name or "cond" in name for name, _ in model.named_parameters())


@families
def test_bfloat16_autocast_stays_close(name, **variant):
    model = wake(small(name, **variant)).eval()
    with torch.no_grad():
        exact = model(*inputs())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*inputs()).float()
    assert (exact - rounded).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("skip", ["cross_attention", "concat"])
@pytest.mark.parametrize("size", [(7, 9), (5, 5), (3, 10)])
def test_odd_grids_are_padded_and_cut(skip, size):
    model = wake(small("XSwin", size, skip=skip, window_size=4)).eval()
    assert model(*inputs(size=size)).shape == (3, 8, *size)


def test_modulator_is_the_identity_at_first():
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(Modulator(16, 8)(x, torch.randn(2, 16)), x)


def test_mlp_ratio_reaches_every_block():
    hidden = {m.fc1.out_features for m in small("UViT-tokens-S/2", mlp_ratio=2.0).modules() if isinstance(m, Mlp)}
    assert hidden == {32}


def test_constructors_take_no_kwargs():
    for backbone in map(class_of, BACKBONES):
        kinds = {parameter.kind for parameter in inspect.signature(backbone).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("XSwim", {}, r"--model XSwim: unknown; did you mean XSwin"),
        (
            "DiT-XL/3",
            {},
            r"did you mean DiT-XL/\d, DiT-XL/\d or DiT-XL/\d\? .*, DiT-{S,B,L,XL}/{2,4,8}, .*U-ViT-{S,M,L,H}/",
        ),
        ("XSwin", {"window": 2}, r"--model_args.window: XSwin has no such argument; it takes .*window_size"),
        ("XSwin", {"patch_size": 3}, r"patch_size=3 must divide the 8x8 input"),
        ("XSwin", {"num_heads": (5, 12)}, r"num_heads=5 must divide the width 192"),
        ("XSwin", {"depths": (1,)}, r"must be of one length"),
        ("XSwin", {"skip": "sum"}, r"skip=sum must be one of cross_attention, global_cross_attention, concat, none"),
        ("XSwin", {"conditioning": "none"}, r"conditioning=none leaves labels no place"),
        ("XSwin", {"num_heads": (0, 12)}, r"--model_args.num_heads \(0, 12\): must be positive"),
        ("XSwin", {"window_size": -2}, r"--model_args.window_size -2: must be positive"),
        ("XSwin", {"mlp_ratio": 0}, r"--model_args.mlp_ratio 0: must be positive"),
        ("XSwin", {"num_global_blocks": -1}, r"--model_args.num_global_blocks -1: must be at least 0"),
        ("DiT-S/2", {"patch_size": 0}, r"--model_args.patch_size 0: must be positive"),
        ("DiT-S/2", {"dim": 100}, r"num_heads=6 must divide the width 100"),
        ("UViT-tokens-S/2", {"depth": 12}, r"depth=12 must be odd"),
    ],
)
def test_mistakes_are_told_in_words(name, overrides, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_model(name, input_size=8, in_channels=4, out_channels=8, num_classes=5, **overrides)
