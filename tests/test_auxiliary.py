"""Auxiliary losses: where their gradients go, what their networks see, and what is refused."""

import pytest
import torch
import yaml
from accelerate import Accelerator
from exact import randn
from processes import TINY, log, run
from test_outside_backbones import SIZES, Plain
from torch import nn
from torchvision.models import VGG16_Weights, VGG19_Weights, vgg19
from torchvision.models.vgg import cfgs, make_layers

from autoencoders.codec import LatentCodec, PixelCodec
from diffusion.diffusion import Auxiliary
from diffusion.presets import DIFFUSIONS
from experiment.config import AuxiliaryConfig, OptimConfig
from metrics.perceptual import LPIPSFeatures, VGG19Features, perceptual_network
from metrics.programs import save_program
from models import create_model
from models.backbone import as_backbone
from training.batches import Batch
from training.guard import clip_gradients
from training.objective import AUXILIARY, Objective, Phase, build_auxiliary, clean_time
from training.optimizer import build_optimizers

CPU = torch.device("cpu")
UNET = {"channels": [8, 8, 16], "down": ["R", "A"], "middle_channels": [16], "middle": ["R"], "up": ["A", "R"]}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small TorchScript network for images from 0 to 255."""

    class Edges(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: torch.Tensor):
            features = self.conv(images.float() / 255)
            return features, features.mean(dim=(2, 3))

    torch.manual_seed(0)
    return str(save_program(Edges(), torch.zeros(2, 3, 16, 16), tmp_path_factory.mktemp("net") / "edges.pt"))


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return create_model("UNet-Mini", input_size=16, in_channels=3, out_channels=3, num_classes=2, **UNET)


@pytest.mark.parametrize("kind", AUXILIARY)
def test_gradients_reach_the_model_and_only_the_model(kind, network, unet):
    (term,) = build_auxiliary([AuxiliaryConfig(kind, 0.1, network)], unet, PixelCodec(), CPU)
    x_0, y = randn(2, 3, 16, 16).requires_grad_(), torch.tensor([0, 1])
    nn.init.normal_(unet.head.weight, std=0.1)
    loss = term.term(unet(x_0.detach(), torch.tensor([5.0, 9.0]), y), x_0, y)
    assert loss.shape == (2,)
    loss.sum().backward()
    assert x_0.grad is None  # the true side is detached
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in unet.parameters())
    if kind == "perceptual":
        assert not any(parameter.requires_grad for parameter in term.term.network.parameters())
    assert term.term(x_0, x_0, y).tolist() == [0, 0]


@pytest.mark.parametrize(("model_times", "time"), [([0.0, 999.0], 0.0), ([1.0, 0.0], 1.0)])
def test_features_are_those_of_data_without_noise(unet, monkeypatch, model_times, time):
    """Published flows (SiT, LightningDiT) are told 1 of data and 0 of noise."""
    diffusion, told = DIFFUSIONS["flow"](model_times=model_times), []
    terms = build_auxiliary([AuxiliaryConfig("feature_matching", 0.1)], unet, PixelCodec(), CPU, clean_time(diffusion))
    monkeypatch.setattr(terms[0].term, "encode", lambda x, t, y: told.append(t.tolist()) or [x])
    terms[0].term(randn(2, 3, 16, 16), randn(2, 3, 16, 16), torch.tensor([0, 1]))
    assert told == [[time, time]] * 2


def test_a_term_that_is_a_module_is_trained_beside_the_model(unet):
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, predicted, x_0, y):
            return (self.weight[:, None, None] * (predicted - x_0)).square().flatten(1).mean(1)

    objective = Objective(DIFFUSIONS["flow"](), [Auxiliary("probe", 0.1, Probe())])
    optimizers = build_optimizers(unet, objective.heads, OptimConfig())
    batch = Batch(randn(2, 3, 16, 16), torch.tensor([0, 1]), torch.tensor([0.2, 0.9]), randn(2, 3, 16, 16, seed=1))
    objective(unet, batch, Phase(0, 0, 1, 1))["loss"].sum().backward()
    assert (clip_gradients(Accelerator(cpu=True), unet, 1.0, objective.heads) > 0).tolist() == [True, True]
    optimizers.step()
    state = objective.heads.state_dict()
    assert (state["probe.weight"] < 1).all()
    assert state["probe.frozen"].tolist() == [1, 1, 1]


def test_encoder_features_equal_those_of_a_full_forward_pass(unet):
    seen, x, t, y = [], randn(2, 3, 16, 16), torch.tensor([0.0, 0.0]), torch.tensor([0, 1])
    for module in (*unet.encoder, unet.middle[0]):
        module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    unet(x, t, y)
    assert [tuple(each.shape) for each in seen] == [(2, 8, 16, 16), (2, 8, 8, 8), (2, 16, 4, 4)]
    given = unet.encode(x, t, y)
    assert all(ours.equal(theirs) for ours, theirs in zip(given, seen, strict=False))


def test_vgg19_is_torchvisions_up_to_its_fourth_convolution(monkeypatch):
    torch.manual_seed(0)
    whole = vgg19()
    monkeypatch.setattr(type(VGG19_Weights.IMAGENET1K_V1), "get_state_dict", lambda *a, **k: whole.state_dict())
    images = randn(2, 3, 16, 16).clamp(-1, 1)
    normalised = VGG19_Weights.IMAGENET1K_V1.transforms(crop_size=16, resize_size=16)((images + 1) / 2)
    torch.testing.assert_close(VGG19Features()(images), whole.features[:8](normalised))
    assert len([layer for layer in VGG19Features().layers if isinstance(layer, nn.Conv2d)]) == 4


def test_lpips_is_its_formula(monkeypatch, tmp_path, unet):
    """Layer by layer, as in the paper: features are normalised, squared differences weighted by channel, averaged and
    added up; with random weights in the formats of torchvision and of the lpips package."""
    torch.manual_seed(0)
    features = make_layers(cfgs["D"])
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    monkeypatch.setattr(type(VGG16_Weights.IMAGENET1K_V1), "get_state_dict", lambda *a, **k: state)
    widths = enumerate([64, 128, 256, 512, 512])
    heads = {f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1) for number, width in widths}
    path = str(tmp_path / "vgg.pth")
    torch.save(heads, path)
    config = AuxiliaryConfig("perceptual", 1.0, "lpips", heads=path)
    (term,) = build_auxiliary([config], unet, PixelCodec(), CPU)
    predicted, x_0 = randn(2, 3, 32, 32).clamp(-1, 1).requires_grad_(), randn(2, 3, 32, 32, seed=1).clamp(-1, 1)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]  # the package's own constants
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, y = (predicted.detach() - shift) / scale, (x_0 - shift) / scale
    expected = torch.zeros(2)
    for number, layer in enumerate(features[:30]):
        x, y = layer(x), layer(y)
        if number in (3, 8, 15, 22, 29):
            a, b = (each / (each.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for each in (x, y))
            weight = heads[f"lin{(3, 8, 15, 22, 29).index(number)}.model.1.weight"]
            expected += (weight * (a - b).square()).sum(dim=1).mean(dim=(1, 2))
    distance = term.term(predicted, x_0, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(distance.detach(), expected.detach(), rtol=1e-3, atol=1e-6)
    distance.sum().backward()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()
    assert term.term(x_0, x_0, torch.zeros(2, dtype=torch.int64)).tolist() == [0, 0]


def test_missing_or_wrong_lpips_heads_give_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "text.pth").write_text("not a file of weights")
    torch.save({"lin0.model.1.weight": torch.rand(1, 64, 1, 1)}, tmp_path / "other.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    for heads, words in {
        None: r"network lpips: its heads could not be downloaded; put them into .*lpips_vgg_v0.1.pth \(no network\)",
        str(tmp_path / "none.pth"): "none.pth: not the file of LPIPS's heads",
        str(tmp_path / "text.pth"): "text.pth: not the file of LPIPS's heads",
        str(tmp_path / "other.pth"): "other.pth: not the file of LPIPS's heads",
    }.items():
        with pytest.raises(ValueError, match=words):
            LPIPSFeatures(heads)
    with pytest.raises(ValueError, match="network vgg19 has none; leave it out"):
        perceptual_network("vgg19", "vgg.pth")


def test_a_failed_download_of_vgg19_gives_one_clear_line(monkeypatch, tmp_path, unet):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match=r"network vgg19: .* downloaded \(no network\); put .* TorchScript file$"):
        build_auxiliary([AuxiliaryConfig("perceptual", 0.1)], unet, PixelCodec(), CPU)


MISTAKES = {
    "unknown kind": ([{"kind": "style", "weight": 1.0}], "--auxiliary style: unknown, choose from perceptual, feature"),
    "no weight": ([{"kind": "feature_matching", "weight": 0.0}], "weight 0.0 must be above 0"),
    "no file": ([{"kind": "perceptual", "weight": 1.0, "network": "x.pt"}], "network x.pt: no such file; .*vgg19"),
    "latents": ([{"kind": "perceptual", "weight": 1.0}], "looks at images, not at latents; use --autoencoder pixel"),
    "no encoder": (
        [{"kind": "feature_matching", "weight": 1.0}],
        "Plain has no block_types; take another --model",
    ),
    "twice": ([{"kind": "feature_matching", "weight": 1.0}] * 2, "--auxiliary feature_matching: given twice"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_refused_in_words(mistake, unet):
    given, words = MISTAKES[mistake]
    model = as_backbone(Plain)(**SIZES)
    codec = LatentCodec() if mistake == "latents" else PixelCodec()
    configs = [AuxiliaryConfig(**each) for each in given]
    with pytest.raises(ValueError, match=words):
        build_auxiliary(configs, model if mistake == "no encoder" else unet, codec, CPU)


def test_a_training_with_auxiliary_terms_logs_each_by_name_and_equals_two_processes(folder, network):
    """A small version of the CIFAR-10 study; two processes reach the encoder around DDP's forward."""
    terms = [
        {"kind": "perceptual", "weight": 0.1, "network": network},
        {"kind": "feature_matching", "weight": 0.05},
    ]
    settings = {**TINY, "model": "UNet-Mini", "model_args": UNET, "autoencoder": "pixel", "auxiliary": terms}
    settings["data"] = {**TINY["data"], "image_size": 16}
    settings["diffusion"] = {"schedule": "cosine", "variance": "fixed_small"}
    (folder / "auxiliary.yaml").write_text(yaml.safe_dump(settings))
    run("train.py", "--config", "auxiliary.yaml", "--name", "auxiliary", cwd=folder)
    run("train.py", "--config", "auxiliary.yaml", "--name", "auxiliary-two", cwd=folder, processes=2)
    one, two = ([e for e in log(folder, name) if "loss" in e] for name in ("auxiliary", "auxiliary-two"))
    for ours, theirs in zip(one, two, strict=True):
        total = ours["mse"] + 0.1 * ours["perceptual"] + 0.05 * ours["feature_matching"]
        assert ours["loss"] == pytest.approx(total, rel=1e-5)
        assert ours["perceptual"] > 0
        assert ours["feature_matching"] > 0
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
