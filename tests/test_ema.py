"""Averages in the course of a training, and what another training has left."""

import json

import pytest
import torch
from torch import nn

from checkpoints.averages import EMA
from experiment.config import ExperimentConfig
from training.resumption import start_or_go_on


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def trajectory(step):
    """Weights that wander: what an average makes of them depends on its length."""
    return torch.tensor([step / 100 + torch.sin(torch.tensor(step / 30.0)).item()])


class InStages(nn.Module):
    """A first stage, and one that is trained later, with a layer's statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Scalar(), nn.BatchNorm1d(1)


def test_a_stage_that_is_trained_late_keeps_nothing_of_its_initialisation():
    """Nor after a resumption. By the steps of the whole training 39% of it stayed in the last tenth, and all of it
    where the decay had reached its end."""
    torch.manual_seed(0)
    model, num_steps = InStages(), 1000
    ema, alone = EMA(model, 0.9999), EMA(Scalar(), 0.9999)
    late = [*model.second.parameters(), model.second.running_var]
    for step in range(num_steps):
        is_late = step >= 900
        model.first.weight.grad = None if is_late else torch.ones(1)
        for parameter in model.second.parameters():
            parameter.grad = torch.ones(1) if is_late else None
        if is_late:
            for tensor in late:
                tensor.data.copy_(trajectory(step))
            other = Scalar()
            other.weight.data.copy_(trajectory(step))
            alone.update(other, step - 900)
        ema.update(model, step)
        if step == 949:  # as train.py does
            began = json.loads(json.dumps(ema.state()))
            assert began == {"second.bias": 900, "second.weight": 900}
            ema.restore(None)
            ema.restore(began)
    for name in ("weight", "running_var"):
        assert ema.tensors[f"second.{name}"].item() == pytest.approx(alone.tensors["weight"].item(), rel=1e-6)


def test_a_fresh_training_has_nothing_of_another(tmp_path, monkeypatch, capsys):
    """Whose checkpoints are gone: a fresh training would have emptied its log."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    for name in ("log.jsonl", "scores.json", "config.yaml"):
        (run / name).write_text("of before")
    start_or_go_on(ExperimentConfig(name="tiny"), print)
    assert "runs/tiny/log.jsonl is of an earlier training, and is now" in capsys.readouterr().out
    (log,) = run.glob("log.jsonl.before-*")
    assert log.read_text() == "of before"
    assert len(list(run.glob("scores.json.before-*"))) == 1
    assert not {path.name for path in run.iterdir()} & {"log.jsonl", "scores.json"}
    assert (run / "config.yaml").exists()  # which the training writes anew
