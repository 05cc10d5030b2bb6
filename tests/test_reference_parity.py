"""Our backbones with the weights of published implementations give the published outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conversion.weights import infer_arguments, load_reference

FIXTURES = Path(__file__).parent / "fixtures"
SOURCES = {
    "dit": "dit",
    "lightningdit": "lightningdit",
    "uvit_adaln": "uvit-adaln",
    "uvit_official": "uvit",
    "uswin": "uswin",
    "xswin": "xswin",
    "xswin_final_downsample": "xswin",
    "xswin_three_stages_window4_patch2": "xswin",
}


def load_fixture(name):
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    return tensors, weights, config


def load(source, weights):
    return load_reference(source, weights, infer_arguments(source, weights, num_heads=4))


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", SOURCES)
def test_outputs_match(name):
    tensors, weights, _ = load_fixture(name)
    model = load(SOURCES[name], weights)
    inputs = tensors["in/x"], tensors["in/t"], tensors["in/y"]
    with torch.no_grad():
        assert relative_error(model(*inputs), tensors["out/eval"]) < 1e-4
    if "in/pos_embed" in tensors:
        assert relative_error(model.positions, tensors["in/pos_embed"][0]) < 1e-6


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source in ("xswin", "uswin")])
def test_training_mode_outputs_match(name):
    """Batch norms use batch statistics; stochastic depth is off, as when the fixture was made."""
    tensors, weights, _ = load_fixture(name)
    model = load(SOURCES[name], weights).train()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    with torch.no_grad():
        output = model(tensors["in/x"], tensors["in/t"], tensors["in/y"])
    assert relative_error(output, tensors["out/train_no_label_dropout"]) < 1e-4


def test_weights_that_do_not_fit_are_listed():
    _, weights, _ = load_fixture("dit")
    missing = {name: tensor for name, tensor in weights.items() if name != "x_embedder.proj.bias"}
    with pytest.raises(ValueError, match=r"missing \['patch.bias'\]"):
        load("dit", missing)
    with pytest.raises(ValueError, match=r"unknown .'extra'."):
        load("dit", {**weights, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="choose from dit"):
        load("mit", weights)


def test_windows_that_are_not_square_are_refused():
    _, weights, _ = load_fixture("xswin")
    table = "encoder.0.sequential.0.attn.relative_coords_table"
    with pytest.raises(ValueError, match=r"window_size=\[2, 4\]: ours are square"):
        load("xswin", {**weights, table: torch.zeros(1, 3, 7, 2)})
