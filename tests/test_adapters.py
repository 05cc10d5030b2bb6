"""Adapters: which weights stay frozen, what is merged, and what is refused."""

import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from processes import assert_same_training, log, run, weights
from test_backbones import FAMILIES, inputs, small, wake
from test_outside_backbones import SIZES, Plain

from checkpoints.averages import EMA
from checkpoints.checkpoint import CheckpointError
from checkpoints.warm_start import warm_start
from experiment.config import ExperimentConfig, OptimConfig, TrainConfig
from models import ModelSpec
from models.backbone import as_backbone
from settings import check_settings
from studies.cascade.cascade_diffusion import CascadeObjective
from training.adapters import Merged, adapt
from training.objective import Objective
from training.optimizer import build_optimizer

KINDS = ["lora", "biases"]


def adapted(model, kind="lora", rank=4, objective=Objective, accelerator=None):
    return adapt(model, TrainConfig(adapter=kind, adapter_rank=rank), objective, accelerator or Accelerator(cpu=True))


def train(model, num_steps=3, **settings):
    """Train for a few large steps on a meaningless loss."""
    optimizer, average = build_optimizer(model, OptimConfig(lr=0.03, **settings)), Merged(model)
    for step in range(num_steps):
        model(*inputs()).square().mean().backward()
        optimizer.step()
        yield step, average
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Cascade"])
def test_frozen_weights_stay_and_the_merged_backbone_is_the_adapted_one(name, kind):
    """Outputs agree to 1e-5 in float32; frozen weights are bitwise equal, in the average too."""
    model = wake(small(name))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = EMA(model, 0.5)
    adapted(model, kind)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    for step, average in train(model, muon_lr=0.1 if kind == "lora" else None):
        ema.update(average, step)
    after, plain = model.state_dict(), Merged(model).state_dict()
    assert all(torch.equal(after[name], before[name.replace(".base_layer.", ".")]) for name in frozen)
    assert plain.keys() == before.keys() == ema.tensors.keys()
    moved = {name for name, value in plain.items() if not torch.equal(value, before[name])}
    still = {name for name in frozen if ".base_layer." not in name}
    assert not moved & still
    assert all(torch.equal(ema.tensors[name], before[name]) for name in still)
    assert any(name.endswith("qkv.weight") for name in moved) is (kind == "lora")
    assert any(name.endswith("bias") for name in moved)

    merged = small(name).eval()
    merged.load_state_dict(plain)
    with torch.no_grad():
        out, before_it = merged(*inputs()), small(name).eval()
        before_it.load_state_dict(before)
        assert (out - before_it(*inputs())).abs().max() > 1e-3
        torch.testing.assert_close(out, model.eval()(*inputs()), rtol=1e-5, atol=1e-5)


def test_an_adapter_begins_by_its_seed_whatever_was_drawn_before():
    """Other random numbers are, for example, the weights of an extractor, which is only built for scores during
    training."""
    begun = []
    for drawn in (0, 7):
        model = small("DiT")
        torch.rand(drawn)
        state = torch.get_rng_state()
        adapted(model)
        assert torch.equal(torch.get_rng_state(), state)
        begun.append({name: value for name, value in model.state_dict().items() if ".lora_A." in name})
    assert begun[0]
    assert all(torch.equal(value, begun[1][name]) for name, value in begun[0].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["XSwin", "DiT-S/2", "DiT-XL/2", "UViT-S/2"])
def test_adapters_train_less_than_a_fiftieth_of_a_published_size(name, kind):
    model = ModelSpec(name, {}, (32, 32), 4, 8, 101).build_on_meta()
    total, labels = sum(weight.numel() for weight in model.parameters()), model.cond.label.weight.numel()
    words = adapted(model, kind)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) - labels
    assert 0.0005 < trained / total < 0.02
    assert (
        f"trains {trained / 1e6:.2f}M weights, {trained / total:.1%} of {total / 1e6:.1f}M and {labels / 1e6:.2f}M"
        in words
    )
    assert sum(w.numel() for group in build_optimizer(model, OptimConfig()).param_groups for w in group["params"]) == (
        trained + labels
    )


def test_adapters_have_no_effect_at_initialisation():
    model = wake(small("DiT-S/2")).eval()
    with torch.no_grad():
        before = model(*inputs())
        adapted(model)
        torch.testing.assert_close(model(*inputs()), before, rtol=0, atol=0)


@pytest.fixture(scope="module")
def tuned(folder):
    """A run on two other classes, fine-tuned from the finished run with LoRA and a new label table."""
    for name in ("circle", "other"):
        (folder / "tuned-on" / name).mkdir(parents=True, exist_ok=True)
        for number in range(10):
            Image.new("RGB", (32, 32), (20 * number, 90, 30)).save(folder / "tuned-on" / name / f"{number}.png")
    flags = ("--data.path", "tuned-on", "--init_from", "runs/tiny", "--name", "tuned", "--train.adapter", "lora")
    flags += ("--train.ema_decay", 0.0, "--sampling.guidance_checkpoint", "runs/tiny")
    told = run("train.py", "--config", "tiny.yaml", *flags, "--sampling.guidance_unlabelled", "true", cwd=folder)
    return folder, told.stdout


def test_a_fine_tuned_run_is_a_checkpoint_like_any(tuned):
    """Its weights are those of a plain backbone, in which only labels and adapted linears have changed. It is sampled
    with guidance away from the pretrained model, with which it shares one class."""
    folder, told = tuned
    assert "; 1 of 2 classes keep their label embeddings" in told
    assert "--train.adapter lora: trains " in told
    pretrained, merged = weights(folder, "tiny"), weights(folder, "tuned")
    assert merged.keys() == pretrained.keys()
    moved = {name for name in merged if name != "cond.label.weight" and not torch.equal(merged[name], pretrained[name])}
    assert {"encoder.0.blocks.0.attention.qkv.weight", "middle.0.attention.qkv.weight", "head.bias"} <= moved
    assert not moved & {"patch.weight", "head.weight", "merges.0.reduction.weight", "cond.time.mlp.0.weight"}
    assert merged["cond.label.weight"].shape[0] == 3
    state = weights(folder, "tuned", file="state/model.safetensors")
    frozen = {name for name in state if name.endswith("base_layer.weight")}
    assert frozen
    assert all(torch.equal(state[name], pretrained[name.replace(".base_layer.", ".")]) for name in frozen)
    run("sample.py", "--checkpoint", "runs/tuned", "--num_per_class", 1, "--output", "tuned.png", cwd=folder)
    run(
        "sample.py",
        "--checkpoint",
        "runs/tuned",
        "--num_per_class",
        1,
        "--guidance_scale",
        3,
        "--output",
        "more.png",
        cwd=folder,
    )
    assert (folder / "tuned.png").read_bytes() != (folder / "more.png").read_bytes()


def test_a_resumed_fine_tuning_equals_the_uninterrupted_one(tuned):
    folder, _ = tuned
    shutil.copytree(folder / "runs" / "tuned", folder / "runs" / "cut_tuned")
    shutil.rmtree(folder / "runs" / "cut_tuned" / "checkpoints" / "00000004")
    run("train.py", "--resume", "runs/cut_tuned", cwd=folder)
    assert_same_training(folder, "tuned", "cut_tuned")
    losses = [[e["loss"] for e in log(folder, name) if "loss" in e] for name in ("tuned", "cut_tuned")]
    assert losses[0] == losses[1]
    other = run("train.py", "--resume", "runs/cut_tuned", "--train.adapter_rank", 2, cwd=folder, check=False)
    assert other.returncode == 2
    assert "--train.adapter_rank 2: runs/cut_tuned was trained with 4" in other.stderr


def test_an_adapter_of_random_weights_is_refused(folder):
    with pytest.raises(ValueError, match=r"--train.adapter lora: .* would be random; give --init_from"):
        check_settings(ExperimentConfig(train=TrainConfig(adapter="lora")))
    wider = {"dim": 16, "depths": [1, 2], "num_heads": [2, 4], "num_global_blocks": 1, "conv_norm": "group"}
    deeper, same = (
        ModelSpec("XSwin", {**wider, "depths": depths}, (4, 4), 4, 8, 7).build() for depths in ([1, 2], [1, 1])
    )
    with pytest.raises(
        CheckpointError, match=r"--train.adapter: --init_from .*tiny has no decoder.0.blocks.0.* random"
    ):
        warm_start(deeper, str(folder / "runs" / "tiny"), whole=True)
    assert "of another shape: cond.label.weight" in warm_start(same, str(folder / "runs" / "tiny"), whole=True)


def test_what_cannot_be_adapted_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"--train.adapter lora: this --diffusion.kind trains its backbone in parts"):
        adapted(small("Cascade"), objective=CascadeObjective)
    sharded = Mock(spec=Accelerator, distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"--train.adapter biases: FSDP's parts are not merged"):
        adapted(small("DiT-S/2"), "biases", accelerator=sharded)
    with pytest.raises(
        ValueError, match=r"the blocks of Plain have no linear of rank above 4; .*--train.adapter biases"
    ):
        adapted(as_backbone(Plain)(**SIZES))
    with pytest.raises(ValueError, match=r"the blocks of DiT have no linear of rank above 500"):
        adapted(small("DiT-S/2"), rank=500)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ValueError, match=r"--train.adapter lora: peft is not installed; pip install -e '.\[finetune\]'"
    ):
        adapted(small("DiT-S/2"))
