"""Models of which each process holds a part from the start: their weights, and the memory that building them takes."""

from pathlib import Path

import pytest
import torch
import yaml
from processes import ROOT, SHARDED, TINY, log, run, weights

BUILD = """
import sys
sys.path.insert(0, "{root}/tests")
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from machine.sharded_building import FreedWeightError, build_in_shards, weights_of

torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
"""

EQUAL = """
from test_backbones import FAMILIES, small

for name in FAMILIES:
    whole = small(name)
    after = torch.rand(1)
    model = build_in_shards(lambda: small(name), mesh)
    assert torch.equal(torch.rand(1), after), "as many random numbers are drawn"
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # as on several GPUs
    assert all(parameter.is_meta for parameter in model.parameters())
    for key, shard in weights_of(model).items():
        expected = whole.state_dict()[key]
        if isinstance(shard, DTensor):
            assert shard.to_local().untyped_storage().nbytes() <= -(-len(expected) // 2) * expected[:1].nbytes
            shard = shard.full_tensor()
        assert torch.equal(shard, expected), (name, key)
    for (key, buffer), expected in zip(model.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(buffer, expected), (name, key)
"""

REFUSED = """
class Reading(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.no_grad():
            use(self.first.weight)

def fill(weight):
    nn.init.eye_(weight.view(4, 4).zero_())

for use in (lambda weight: weight.mul_(2), lambda weight: weight.norm(), lambda weight: weight[:2].fill_(1)):
    try:
        build_in_shards(lambda: Reading(use), mesh)
    except FreedWeightError as error:
        assert "(4, 4)" in str(error)
    else:
        raise AssertionError
model = build_in_shards(lambda: Reading(lambda weight: weight.view(16).fill_(3)), mesh)
assert weights_of(model)["first.weight"].full_tensor().eq(3).all()
class Sharing(nn.Module):
    def __init__(self, name):
        super().__init__()
        halves = torch.randn(2, 4, 4)
        self.first = nn.Parameter(halves[0])
        if name == "parameter":
            self.second = nn.Parameter(halves[1])
        elif name == "buffer":
            self.register_buffer("second", self.first.detach())
        else:
            self.second = self.first.detach()
        self.last = nn.Linear(2, 2)

for name in ("parameter", "buffer", "tensor"):
    try:
        build_in_shards(lambda: Sharing(name), mesh)
    except FreedWeightError as error:
        assert "shares its memory with a weight" in str(error)
    else:
        raise AssertionError(name)
shared = build_in_shards(lambda: nn.ModuleDict({{"one": (layer := nn.Linear(2, 2)), "other": layer}}), mesh)
assert len([*shared.parameters()]) == 2
"""

SMALL_MEMORY = """
from pathlib import Path
from ctypes import CDLL
from models import create_model
from training.meter import memory_gb

CDLL(None).mallopt(-3, 65536)  # give freed tensors back to the system: on a GPU's host no shards lie between them

def build():
    sizes = {{"input_size": 8, "in_channels": 4, "out_channels": 8, "num_classes": 10}}
    return create_model("DiT", **sizes, dim=512, depth=8, num_heads=8)  # 156 MB

build_in_shards(lambda: nn.Linear(1, 1), mesh)  # imports what it needs
taken = []
for make in (lambda: build_in_shards(build, mesh), build):
    Path("/proc/self/clear_refs").write_text("5")
    held = memory_gb(torch.device("cpu"))
    model = make()
    taken.append(memory_gb(torch.device("cpu")) - held)
    whole = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
assert taken[0] < 0.7 * whole < 0.9 * taken[1], (taken, whole)
"""


@pytest.mark.parametrize("program", [EQUAL, REFUSED], ids=["equal", "refused"])
def test_a_model_built_in_shards_has_the_weights_of_one_built_whole(tmp_path, program):
    (tmp_path / "built.py").write_text((BUILD + program).format(root=ROOT))
    run(tmp_path / "built.py", cwd=tmp_path, processes=2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets the most memory that was held")
def test_no_process_ever_holds_the_whole_model(tmp_path):
    (tmp_path / "built.py").write_text((BUILD + SMALL_MEMORY).format(root=ROOT))
    run(tmp_path / "built.py", cwd=tmp_path, processes=2)


MODELS = {
    "XSwin": {**TINY["model_args"], "depths": [1], "num_heads": [2], "drop_path": 0.0},
    "DiT": {"dim": 16, "depth": 2, "num_heads": 2},
    "Halved": {},
}
OUTSIDE = """
import torch
from torch import nn
from experiment.registry import register

@register("backbone", "Halved")
class Halved(nn.Module):
    def __init__(self, *, input_size, in_channels, out_channels, num_classes):
        super().__init__()
        self.first, self.last = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Conv2d(8, out_channels, 1)
        with torch.no_grad():
            self.first.weight.div_(2)  # which it has left

    def forward(self, x_t, t, y):
        return self.last(self.first(x_t))
"""


@pytest.mark.parametrize("model", MODELS)
def test_a_sharded_training_begins_with_the_same_weights(tmp_path, model):
    """Random ones, and those of another run; also if it must be built whole. A learning rate of 1e-30 moves no weight
    that is not zero."""
    (tmp_path / "halved.py").write_text(OUTSIDE)
    settings = {**TINY, "model": model, "model_args": MODELS[model], "sampling": {"num_steps": 1}}
    settings["imports"] = ["halved.py"]
    settings["log"] = {"every": 1, "validate_every": 0, "sample_every": 0, "trackers": []}
    settings["optim"], settings["train"] = {"lr": 1e-30}, {**TINY["train"], "num_steps": 1}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(settings))
    sharded, flags = {"cwd": tmp_path, **SHARDED}, ("--config", "one.yaml", "--name")
    run("train.py", *flags, "whole", cwd=tmp_path)
    done = run("tests/fsdp_on_cpus.py", ROOT / "train.py", *flags, "parts", **sharded)
    assert ("is first built whole" in done.stdout) == (model == "Halved")
    moved = ("--train.seed", 1, "--optim.lr", 1e-3)
    run("train.py", *flags, "other", *moved, cwd=tmp_path)
    started = ("--init_from", "runs/other", "--name", "started")
    run("tests/fsdp_on_cpus.py", ROOT / "train.py", "--config", "one.yaml", *started, **sharded)
    assert log(tmp_path, "parts")[0]["loss"] == pytest.approx(log(tmp_path, "whole")[0]["loss"], rel=1e-6)
    for name, origin, file in (("parts", "whole", "state/model"), ("started", "other", "ema")):
        theirs = weights(tmp_path, origin, 1, f"{file}.safetensors")
        ours = weights(tmp_path, name, 1, "state/model.safetensors")
        assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-29) for key in theirs)
        assert ours.keys() == theirs.keys()
