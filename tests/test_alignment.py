"""Representation alignment: its term by hand, the hidden states and features that it uses, and trainings with it."""

import re
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from exact import randn
from processes import TINY, log, run, weights
from safetensors.torch import save_file
from test_backbones import FAMILIES, small, wake
from test_outside_backbones import SIZES, Plain
from torch import nn

from autoencoders.codec import PixelCodec
from data.encoding import build_cache
from data.latents import LatentCache
from data.shapes import ShapesDataset
from diffusion import GaussianDiffusion
from diffusion.presets import DIFFUSIONS
from experiment.config import AlignmentConfig, AuxiliaryConfig, TrainConfig
from metrics.extractors import ExtractorError
from metrics.feature_maps import FeatureMaps
from metrics.programs import save_program
from models.backbone import Backbone, as_backbone
from studies.cascade.cascade_diffusion import CascadeObjective
from training.alignment import Alignment
from training.batches import Batch, Batches
from training.objective import Objective, Phase, build_auxiliary

PHASE = Phase(0, 0, 1, 1)
IREPA = AlignmentConfig("some.pt2", kind="irepa")


def batch(features=None):
    t = torch.tensor([0.3, 0.8])
    return Batch(randn(2, 4, 8, 8), torch.tensor([0, 1]), t, randn(2, 4, 8, 8, seed=1), features=features)


def objective(backbone, config, **more):
    """Objective of a flow with alignment to features of width 3."""
    alignment = Alignment(backbone, config).build_projector(3, seed=0)
    return Objective(DIFFUSIONS["flow"](), alignment=alignment, **more), randn(2, 3, *alignment.grid, seed=2)


@pytest.mark.parametrize("kind", ["repa", "irepa"])
def test_the_alignment_term_is_one_minus_the_mean_cosine_similarity(kind):
    alignment = Alignment(small("DiT-S/2"), AlignmentConfig("some.pt2", kind=kind)).build_projector(16, seed=0)
    alignment.projector = nn.Identity()
    state, features = randn(2, 16, 16), randn(2, 16, 4, 4, seed=1)
    alignment._block_output = state
    expected = torch.zeros(2)
    for sample in range(2):
        target = features[sample].reshape(16, 16)  # by feature and place
        if kind == "irepa":
            target = torch.stack([(row - row.mean()) / (row.std() + 1e-6) for row in target])
        places = [state[sample, place] @ target[:, place] for place in range(16)]
        lengths = [state[sample, place].norm() * target[:, place].norm() for place in range(16)]
        expected[sample] = 1 - sum(a / b for a, b in zip(places, lengths, strict=True)) / 16
    torch.testing.assert_close(alignment(features), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [0.4, 0.9])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Cascade"])
def test_alignment_uses_the_hidden_states_of_features_for_every_backbone(name, depth):
    """Hidden states collected in the loss's own pass equal those of `features`; the loss is the plain one plus the
    term."""
    model = wake(small(name)).eval()
    ours, features = objective(model, replace(IREPA, depth=depth))
    aligned = ours(model, batch(features), PHASE)
    plain = Objective(ours.diffusion)(model, batch(), PHASE)
    torch.testing.assert_close(aligned["loss"], plain["loss"] + 0.5 * aligned["alignment"])
    x_t = ours.diffusion.q_sample(batch().x_0, batch().t, batch().noise)
    (tokens,) = model.features(*ours.diffusion.path.model_inputs(x_t, batch().t), batch().y, [depth])
    ours.alignment._block_output = tokens
    ours.alignment._as_tokens = lambda state: state
    torch.testing.assert_close(ours.alignment(features), aligned["alignment"])


def test_the_feature_grid_of_an_odd_side_is_half_of_it_rounded_up():
    assert Alignment(small("XSwin", input_size=9), IREPA).grid == (5, 5)


def test_gradient_reaches_the_blocks_before_it_and_the_projector_alone():
    model = wake(small("DiT-S/2")).eval()
    ours, features = objective(model, IREPA)
    ours(model, batch(features), PHASE)["alignment"].sum().backward()
    reached = [any(weight.grad is not None for weight in block.parameters()) for block in model.blocks]
    assert reached == [True, True, False, False]
    assert all(weight.grad.abs().sum() > 0 for weight in ours.heads.parameters())


def test_other_passes_of_the_model_store_no_hidden_states():
    """Feature matching runs the same blocks on other images after the main pass; validation has no alignment term."""
    model = small("DiT-S/2").eval()
    ours, features = objective(model, IREPA)
    expected = ours(model, batch(features), PHASE)["alignment"]
    auxiliary = build_auxiliary([AuxiliaryConfig("feature_matching", 0.1)], model, PixelCodec(), torch.device("cpu"))
    ours.auxiliary = auxiliary
    torch.testing.assert_close(ours(model, batch(features), PHASE)["alignment"], expected)
    assert "alignment" not in ours(model, batch())
    assert ours.alignment._block_output is None


class Stack(Backbone):
    """Two blocks; their signatures are not checked, as they are compiled."""

    def __init__(self):
        super().__init__()
        self.input_size, self.in_channels, self.num_classes = (8, 8), 4, 0
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))

    def block_types(self):
        return (nn.Conv2d,)

    def forward(self, x_t, t, y):
        return self.blocks(x_t)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that torch looks at while it compiles
def test_states_are_seen_in_compiled_blocks():
    torch.manual_seed(0)
    model = Stack()
    ours, features = objective(model, IREPA)
    expected = ours(model, batch(features), PHASE)["alignment"]
    for block in model.blocks:
        block.compile(backend="eager", dynamic=False)
    for _ in range(2):
        torch.testing.assert_close(ours(model, batch(features), PHASE)["alignment"], expected)
    torch._dynamo.reset()


def test_features_of_the_views_that_a_batch_holds(tmp_path):
    """Mirrored images have their own features, averaged over the grid."""
    maps = FeatureMaps(edges(tmp_path / "edges.pt"), None, (4, 4))
    images = ShapesDataset(12, image_size=32)
    build_cache(tmp_path / "maps", images, maps.prepare, maps.provenance, flips=True)
    build_cache(tmp_path / "pixels", images, lambda images: images, PixelCodec().provenance, flips=True)
    caches = [LatentCache(tmp_path / name, {}) for name in ("pixels", "maps")]
    stream = Batches(caches[0], PixelCodec(), Objective(GaussianDiffusion()), TrainConfig(batch_size=8), caches[1])
    (drawn,) = stream.micro_batches(0)
    assert drawn.features.shape == (8, 4, 4, 4)
    pixels = (drawn.x_0 * 127.5 + 127.5).round().to(torch.uint8)
    torch.testing.assert_close(drawn.features.float(), maps.prepare(pixels), rtol=1e-3, atol=1e-3)


def test_timms_feature_maps_are_its_last_layer_resized_to_the_grid(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    maps = FeatureMaps("timm:test_vit", str(tmp_path / "vit.safetensors"), (5, 5))
    images = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    found = maps.prepare(images)
    side = model.pretrained_cfg["input_size"][-1]
    pixels = nn.functional.interpolate(images.float(), size=side, mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    tokens = model.forward_features((pixels - mean) / std)[:, model.num_prefix_tokens :]
    grid = tokens.transpose(1, 2).unflatten(2, (side // 16, side // 16))
    torch.testing.assert_close(found, nn.functional.adaptive_avg_pool2d(grid, (5, 5)), rtol=1e-3, atol=1e-3)


class Edges(nn.Module):
    """Four features for every fourth position."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, images):
        return self.conv(images.float() / 255)


def edges(path, seed=0):
    """A small network exported to a file."""
    torch.manual_seed(seed)
    return str(save_program(Edges(), torch.zeros(2, 3, 16, 16), path))


class Constant(nn.Module):
    def __init__(self, *shape, value=1.0):
        super().__init__()
        self.shape, self.value = shape, value

    def forward(self, images):
        return torch.full((1, *self.shape), self.value) + 0 * images.float().mean()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Constant(8), r"it gives \[1, 8\], not features at their places"),
        (Constant(8, 2, 2), r"its features of 16 pixels are 2x2, coarser than the backbone's 4x4; .*alignment.depth"),
        (Constant(8, 4, 4, value=1e9), r"its features are not finite in half precision"),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_features_that_do_not_fit_are_refused_in_words(network, words, tmp_path):
    path = str(save_program(network, torch.zeros(1, 3, 16, 16), tmp_path / "net.pt"))
    with pytest.raises(ExtractorError, match=rf"^--alignment.extractor {path}: {words}"):
        FeatureMaps(path, None, (4, 4)).prepare(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("extractor", "weights_path", "words"),
    [
        ("nowhere.pt2", None, r"--alignment.extractor nowhere.pt2: no such file"),
        ("inception", None, r"--alignment.extractor inception: has no features at places; give timm:NAME"),
        ("timm:nothing", None, r"--alignment.extractor timm:nothing: timm .* has no such model"),
        ("timm:test_vit", "none.pth", r"--alignment.weights_path none.pth: no such file"),
    ],
)
def test_networks_that_cannot_be_had_are_refused_in_words(extractor, weights_path, words):
    with pytest.raises(ExtractorError, match=words):
        FeatureMaps(extractor, weights_path, (4, 4))


def test_backbones_that_cannot_be_aligned_are_refused_in_words():
    plain = as_backbone(Plain)(**SIZES)
    vars(plain).update(SIZES)  # as `create_model` does
    with pytest.raises(ValueError, match=r"--alignment.depth: .*there are 0 blocks in this --model"):
        Alignment(plain, IREPA)
    with pytest.raises(ValueError, match=r"--alignment.extractor: this --diffusion.kind trains its backbone in parts"):
        CascadeObjective(DIFFUSIONS["flow"](), alignment=Alignment(small("DiT-S/2"), IREPA))


def test_training_resumes_bitwise_and_samplers_know_nothing_of_it(folder, tmp_path):
    path = edges(folder / "edges.pt")
    settings = {**TINY, "name": "aligned", "alignment": {"extractor": path}}
    (folder / "aligned.yaml").write_text(yaml.safe_dump(settings))
    run("train.py", "--config", "aligned.yaml", cwd=folder)
    assert weights(folder, "aligned").keys() == weights(folder, "tiny").keys()  # no projector
    assert all("alignment" in event for event in log(folder, "aligned") if "loss" in event)
    assert not any("validation_alignment" in event for event in log(folder, "aligned"))
    files = ("ema", "state/model", "state/heads", "state/heads_optimizer")
    straight = [weights(folder, "aligned", file=f"{name}.safetensors") for name in files]

    last = folder / "runs" / "aligned" / "checkpoints" / "00000004"
    last.rename(tmp_path / "last")
    for name, value, words in (
        ("kind", "repa", r"--alignment.kind repa: \S+ was trained with irepa"),
        ("extractor", "null", r"--alignment.extractor null: \S+ was trained with set"),
        ("extractor", edges(folder / "b.pt", seed=1), r"--alignment.extractor: \S+ .* another alignment, whose sha256"),
    ):
        flags = ("--resume", "runs/aligned", f"--alignment.{name}", value)
        done = run("train.py", *flags, cwd=folder, check=False)
        assert done.returncode == 2
        assert re.search(words, done.stderr), done.stderr
    run("train.py", "--resume", "runs/aligned", cwd=folder)
    for before, name in zip(straight, files, strict=True):
        after = weights(folder, "aligned", file=f"{name}.safetensors")
        assert all(torch.equal(before[key], after[key]) for key in before), name
