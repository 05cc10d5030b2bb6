"""Published weights as checkpoints: every format, both resolutions, and clear errors for wrong files."""

import argparse
import json

import numpy as np
import pytest
import torch
from processes import script
from test_reference_parity import SOURCES, load_fixture, relative_error

from checkpoints.checkpoint import open_checkpoint
from conversion.training_files import read_weights
from conversion.weights import find_named_backbone, infer_arguments, load_reference
from diffusion import sample
from diffusion.paths import Flow
from experiment.config import DataConfig, SamplingFlags

SCRIPT = script("scripts/import_checkpoint.py")
SAMPLE = script("sample.py")


def import_weights(folder, saved, source, suffix="pt", **settings):
    path = folder / f"published.{suffix}"
    torch.save(saved, path)
    settings = {"num_heads": 4, "autoencoder": "embedded", **settings}
    SCRIPT.main(SCRIPT.ImportConfig(source=source, weights=path, output=folder / "imported", **settings))
    return open_checkpoint(folder / "imported")


def of_training(weights, **others):
    """A file as DiT's and XSwin's training scripts save it."""
    arguments = argparse.Namespace(image_size=64, model="DiT-XL/2")
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4}]}
    return {"model": weights, "ema": weights, "opt": optimizer, "args": arguments, "train_steps": 70, **others}


@pytest.mark.parametrize("name", SOURCES)
def test_checkpoint_puts_out_what_the_published_model_did(name, tmp_path):
    """The model is built from the shapes of the weights alone: size, depth, windows, skips and classes."""
    tensors, weights, published = load_fixture(name)
    saved = weights if name in ("uvit_official", "dit") else of_training(weights)
    checkpoint = import_weights(tmp_path, saved, SOURCES[name])
    output = checkpoint.load_model()(tensors["in/x"], tensors["in/t"], tensors["in/y"])
    assert relative_error(output, tensors["out/eval"]) < 1e-4
    num_classes = published["num_classes"] - (name == "uvit_official")
    assert checkpoint.classes == [str(number) for number in range(num_classes)]
    factor = 16 if name == "lightningdit" else 8
    assert checkpoint.image_size == (factor * checkpoint.spec.input_size[0],) * 2
    assert checkpoint.step == (0 if saved is weights else 70)
    assert json.loads((tmp_path / "imported" / "imported.json").read_text())["source"] == SOURCES[name]


def test_it_is_guided_as_its_authors_guide(tmp_path):
    """The scale and the channels: DiT and SiT do not guide the fourth."""
    for number, (fixture, source, expected) in enumerate(
        (("dit", "dit", (1.5, 3)), ("uvit_official", "uvit", (1.4, None)))
    ):
        weights = load_fixture(fixture)[1]
        (tmp_path / str(number)).mkdir()
        sampling = import_weights(tmp_path / str(number), weights, source).config.sampling
        assert (sampling.guidance_scale, sampling.legacy_cfg_channels) == expected
    side = 64 // weights["patch_embed.proj.weight"].shape[-1]
    weights = {**weights, "pos_embed": torch.zeros(1, 2 + side**2, weights["pos_embed"].shape[-1])}
    assert import_weights(tmp_path, weights, "uvit").config.sampling.guidance_scale == 1.7


def test_averaged_weights_come_first_with_the_trained_statistics(tmp_path):
    weights = load_fixture("xswin")[1]
    half = {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    prefixed = {f"module.{name}": tensor for name, tensor in half.items()}
    model = import_weights(tmp_path, of_training(weights, model=prefixed), "xswin").load_model()
    assert torch.equal(model.head.weight, weights["head.pointwise.weight"])
    statistics = "smooth_conv_in.layers.2.running_var"
    assert torch.equal(model.stem_in.norms[0].running_var, weights[statistics] / 2)


@pytest.mark.parametrize("average", ["ema", "model_ema", "ema_state_dict", "params_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod.module.", "model.", "net."])
def test_averages_come_first_whatever_they_are_called_and_wrapped_in(average, prefix, tmp_path):
    wanted = {f"blocks.{number}.weight": torch.full((2,), float(number)) for number in range(2)}
    saved = {f"{prefix}{name}": tensor for name, tensor in wanted.items()}
    raw = {name: tensor - 1 for name, tensor in saved.items()}
    moments = {"state": {0: {"exp_avg": torch.ones(2)}}}
    for trained in ("model", "state_dict", "net"):
        torch.save({"optimizer": moments, trained: raw, average: saved, "step": 3}, tmp_path / "x.pt")
        found, _ = read_weights(tmp_path / "x.pt")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_prefixes_and_extra_state_of_other_trainers_are_removed(tmp_path):
    """A Lightning file with averages under a prefix; an AveragedModel's counter; compiled blocks; REPA's projectors;
    NumPy numbers among the saved arguments."""
    weight, other = torch.ones(2), torch.zeros(2)
    for saved in (
        {"state_dict": {"model.a.w": other, "ema_model.a.w": weight}},
        {"ema": {"module": {"a.w": weight}, "decay": 0.9}, "model": {"a.w": other}},
        {"ema": {"n_averaged": torch.tensor(3), "module.a.w": weight}, "opt": {"a.w": other}},
        {"a._orig_mod.w": weight},
        {"model": {"a.w": weight, "projectors.0.weight": other}, "args": argparse.Namespace(lr=np.float64(0.1))},
        {"ema": {"a.w": weight}, "args": {"lr": np.float32(1e-4), "steps": np.int64(3), "flag": np.bool_(True)}},
    ):
        torch.save(saved, tmp_path / "x.pt")
        found, _ = read_weights(tmp_path / "x.pt")
        assert found.keys() == {"a.w"}, saved
        assert torch.equal(found["a.w"], weight)


def test_sit_is_a_flow_told_its_own_times(tmp_path):
    """SiT integrates from noise at 0 to data at 1; ours goes from noise at 1 to data at 0."""
    tensors, weights, _ = load_fixture("dit")
    theirs, y = load_reference("dit", weights, infer_arguments("dit", weights, num_heads=4)), tensors["in/y"]
    x = tensors["in/x"]
    for step in range(5):  # Euler, as they do it: dx = v dt; half of the output is thrown away
        x = x + theirs(x, torch.full((len(x),), step / 5), y)[:, :4].detach() / 5
    checkpoint = import_weights(tmp_path, weights, "sit")
    diffusion = checkpoint.build_diffusion()
    assert isinstance(diffusion.path, Flow)
    ours = sample(diffusion, checkpoint.load_model(), tensors["in/x"], y, sampler="euler", num_steps=5)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_repa_imports_as_a_sit_with_unreversed_velocity_and_times(tmp_path):
    """REPA has `x_t = (1 - t) x_0 + t noise` and `v = noise - x_0`: unlike SiT's, neither is reversed."""
    tensors, weights, _ = load_fixture("dit")
    theirs, y = load_reference("repa", weights, infer_arguments("dit", weights, num_heads=4)), tensors["in/y"]
    weights = {**weights, "final_layer.linear.weight": weights["final_layer.linear.weight"].reshape(4, 8, -1)[:, :4]}
    weights["final_layer.linear.weight"] = weights["final_layer.linear.weight"].flatten(0, 1)
    weights["final_layer.linear.bias"] = weights["final_layer.linear.bias"].reshape(4, 8)[:, :4].flatten()
    x = tensors["in/x"]
    for step in range(5, 0, -1):
        x = x - theirs(x, torch.full((len(x),), step / 5), y)[:, :4].detach() / 5
    projectors = {f"projectors.0.{number}.weight": torch.ones(2, 2) for number in (0, 2, 4)}
    checkpoint = import_weights(tmp_path, {**weights, **projectors}, "repa")
    settings = {"sampler": "euler", "num_steps": 5}
    ours = sample(checkpoint.build_diffusion(), checkpoint.load_model(), tensors["in/x"], y, **settings)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)
    low, high = checkpoint.config.sampling.guidance_interval
    assert (low, high) == (0, pytest.approx(0.7 / (1 - 0.7)))  # t up to 0.7


def test_lightningdit_is_such_a_flow_with_more_steps_at_noise(tmp_path):
    """Its sampling times are spaced from 0 to 1 by `0.3 t / (1 - 0.7 t)`, and guidance starts at an eighth."""
    checkpoint = import_weights(tmp_path, load_fixture("lightningdit")[1], "lightningdit")
    path, sampling = checkpoint.build_diffusion().path, checkpoint.config.sampling
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(path.shifted(1 - t), 1 - 0.3 * t / (1 - 0.7 * t))
    assert path.model_times == (1.0, 0.0)
    assert sampling.guidance_interval == [0.0, (1 - 1 / 8) / (1 / 8)]


def test_huge_uvits_have_no_last_convolution_and_times_from_1_to_1000(tmp_path):
    tensors, weights, _ = load_fixture("uvit_official")
    delta = torch.nn.init.dirac_(torch.empty(4, 4, 3, 3))
    straight = {**weights, "final_layer.weight": delta, "final_layer.bias": torch.zeros(4)}
    whole = load_reference("uvit", straight, infer_arguments("uvit", weights, num_heads=4))
    huge = {name: tensor for name, tensor in weights.items() if not name.startswith("final_layer")}
    checkpoint = import_weights(tmp_path, huge, "uvit", suffix="pth")
    diffusion = checkpoint.build_diffusion()
    x, t, y = tensors["in/x"], tensors["in/t"].long(), tensors["in/y"]
    told = diffusion.precondition(checkpoint.load_model())(x, t, y)
    torch.testing.assert_close(told, whole(x, t + 1, y))
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    torch.testing.assert_close(diffusion.path.alphas_cumprod, torch.cumprod(1 - root**2, dim=0))


def published_dit(side, patch_size, dim, depth):
    """State dict with the names and shapes of Meta's files, on the meta device."""
    shapes = {
        "x_embedder.proj.weight": (dim, 4, patch_size, patch_size),
        "pos_embed": (1, (side // patch_size) ** 2, dim),
        "y_embedder.embedding_table.weight": (1001, dim),
        "final_layer.linear.weight": (8 * patch_size**2, dim),
    }
    shapes |= {f"blocks.{number}.mlp.fc1.weight": (4 * dim, dim) for number in range(depth)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def published_lightningdit(patch_size, dim, depth, head_dim, width):
    shapes = {
        "x_embedder.proj.weight": (dim, 32, patch_size, patch_size),
        "pos_embed": (1, (16 // patch_size) ** 2, dim),
        "feat_rope.freqs_cos": ((16 // patch_size) ** 2, head_dim),
        "y_embedder.embedding_table.weight": (1001, dim),
        "final_layer.linear.weight": (32 * patch_size**2, dim),
    }
    shapes |= {f"blocks.{number}.mlp.w3.weight": (dim, width) for number in range(depth)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def published_uvit(side, patch_size, dim, half):
    shapes = {
        "patch_embed.proj.weight": (dim, 4, patch_size, patch_size),
        "pos_embed": (1, 2 + (side // patch_size) ** 2, dim),
        "label_emb.weight": (1001, dim),
        "mid_block.mlp.fc1.weight": (4 * dim, dim),
    }
    shapes |= {f"in_blocks.{number}.norm1.weight": (dim,) for number in range(half)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("source", "weights", "row", "side"),
    [
        ("dit", published_dit(32, 2, 1152, 28), "DiT-XL/2", 32),
        ("dit", published_dit(64, 2, 1152, 28), "DiT-XL/2", 64),
        ("sit", published_dit(32, 2, 1152, 28), "DiT-XL/2", 32),
        ("sit", published_dit(64, 4, 384, 12), "DiT-S/4", 64),
        ("repa", published_dit(32, 2, 1152, 28), "DiT-XL/2", 32),
        ("lightningdit", published_lightningdit(1, 1152, 28, 72, 3072), "LightningDiT-XL/1", 16),
        ("lightningdit", published_lightningdit(2, 1024, 24, 64, 2730), "LightningDiT-L/2", 16),
        ("uvit", published_uvit(64, 4, 768, 8), "U-ViT-M/4", 64),
        ("uvit", published_uvit(32, 2, 1024, 10), "U-ViT-L/2", 32),
        ("uvit", published_uvit(32, 2, 1152, 14), "U-ViT-H/2", 32),
        ("uvit", published_uvit(64, 4, 1152, 14), "U-ViT-H/4", 64),
    ],
)
def test_published_models_are_recognised_at_256_and_512(source, weights, row, side):
    arguments = infer_arguments(source, weights)
    assert (arguments.pop("input_size"), arguments.pop("num_classes")) == (side, 1000)
    channels = {"dit": (4, 8), "lightningdit": (32, 32)}.get(source, (4, 4))
    assert (arguments.pop("in_channels"), arguments.pop("out_channels")) == channels
    assert find_named_backbone(arguments.pop("name"), arguments) == (row, {})


def test_classes_have_names_of_their_own(tmp_path):
    imagenet = SCRIPT.read_classes(None, 1000)
    assert len(set(imagenet)) == 1000
    assert imagenet[207] == "golden retriever"
    (tmp_path / "names.txt").write_text("cat\ndog\ncat\n")
    assert SCRIPT.read_classes(tmp_path / "names.txt", 3) == ["cat 0", "dog", "cat 2"]
    with pytest.raises(ValueError, match="3 names, and the model has 11 classes"):
        SCRIPT.read_classes(tmp_path / "names.txt", 11)
    (tmp_path / "table.xls").write_bytes(b"\xff\xfe\x00")
    for name in ("nothere.txt", "table.xls", "."):
        with pytest.raises(ValueError, match=r"--classes .*: not a text file with a class a line"):
            SCRIPT.read_classes(tmp_path / name, 3)


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_what_is_wrong_with_a_file_is_told_in_words(tmp_path, capsys):
    _, weights, _ = load_fixture("dit")
    bad = [
        ({**weights, "extra": torch.zeros(1)}, "dit", {}, r"unknown \['extra'\]"),
        ({**weights, "blocks.0.attn.qkv.bias": torch.zeros(5)}, "dit", {}, r"of another shape \['blocks.0.attention"),
        (weights, "uvit", {}, "the weights have no 'patch_embed.proj.weight'; they begin with"),
        (weights, "dit", {"num_heads": None}, "--num_heads: .* width 32 is no published size"),
        (
            weights,
            "mit",
            {},
            "--source mit: unknown, choose from dit, sit, repa, lightningdit, uvit-adaln, uvit, uswin, xswin",
        ),
        ({"opt": {}}, "dit", {}, "no tensors in it"),
        ({"ema": Payload()}, "dit", {}, "not plain weights, and nothing else is unpickled"),
    ]
    for number, (saved, source, settings, words) in enumerate(bad):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError, match=words):
            import_weights(folder, saved, source, **settings)
        assert not (folder / "imported").exists()
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    for name, words in {"cut.pt": "cut short, or not a file of torch", "none.pt": "no such file"}.items():
        with pytest.raises(ValueError, match=words):
            read_weights(tmp_path / name)


def test_imported_weights_are_sampled_from_by_the_usual_command(tmp_path):
    checkpoint = import_weights(tmp_path, load_fixture("dit")[1], "dit")
    sampling = SamplingFlags(num_steps=2)
    SAMPLE.main(SAMPLE.SampleConfig(checkpoint=str(checkpoint.run), num_per_class=1, sampling=sampling))
    assert (tmp_path / "imported" / "samples.png").is_file()


def test_a_size_of_images_that_the_latents_do_not_have_is_refused(tmp_path):
    weights = load_fixture("dit")[1]
    with pytest.raises(ValueError, match=r"--data.image_size 128: give it as --image_size, which is 64"):
        import_weights(tmp_path, weights, "dit", data=DataConfig(image_size=128))
    checkpoint = import_weights(tmp_path, weights, "dit", image_size=128)
    with pytest.raises(ValueError, match=r"--autoencoder: of images of 128x128 its latents are 4x16x16, and .* 4x8x8;"):
        SAMPLE.main(SAMPLE.SampleConfig(checkpoint=str(checkpoint.run)))
