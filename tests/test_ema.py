"""Weight averages against closed forms, and averages of any length from snapshots of two."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from processes import TINY, script
from safetensors.torch import load_file
from torch import nn

from checkpoints.averages import EMA, Average, gamma_from_sigma_rel, power_decay, reconstruction_weights
from checkpoints.checkpoint import make_metadata, open_checkpoint, read_metadata
from checkpoints.training_state import TrainingState, copy_checkpoint, list_snapshots
from experiment.cli import parse_run
from experiment.config import ExperimentConfig
from machine.checkpoint_folder import CheckpointError, list_checkpoints
from models import ModelSpec
from training.resumption import discard_later_results, start_or_resume


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def trajectory(step):
    """Weights that change in such a way that an average depends on its length."""
    return torch.tensor([step / 100 + torch.sin(torch.tensor(step / 30.0)).item()])


@pytest.mark.parametrize(("gamma", "sigma_rel"), [(6.94, 0.10), (16.97, 0.05)])
def test_gamma_of_sigma_rel_equals_edm2s(gamma, sigma_rel):
    assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=0.01)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.5, -1.0])
def test_ema_lengths_out_of_range_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"--train.ema_profiles .*: lengths lie between"):
        gamma_from_sigma_rel(sigma_rel)


def test_average_follows_its_formula_parameters_and_buffers():
    model = torch.nn.BatchNorm1d(2)
    ema = EMA(model, 0.5)
    expected, steps = model.running_mean.clone(), torch.tensor([[1.0, 2.0], [3.0, 5.0], [4.0, 4.0]])
    for step, value in enumerate(steps):
        model.running_mean.copy_(value)
        model.num_batches_tracked.fill_(step)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(ema.model.running_mean, expected)
    assert ema.model.num_batches_tracked == 2
    assert not ema.model.training


def test_tensors_are_looked_up_without_making_a_dictionary_of_them_at_each_step(monkeypatch):
    """Also tensors that were replaced are, and another model's."""
    made, state_dict = [], nn.Module.state_dict

    def counted(module, *args, **kwargs):
        made.append(module)
        return state_dict(module, *args, **kwargs)

    model, other = (nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)) for _ in range(2))
    ema, expected = EMA(model, 0.5, [0.1]), model[0].weight.detach().clone()
    monkeypatch.setattr(nn.Module, "state_dict", counted)
    for step, source in enumerate((model, model, model, other, other)):
        source[0].weight = nn.Parameter(torch.full((2, 2), float(step)))
        source[1].running_var = torch.full((2,), float(step))
        ema.update(source, step)
        expected.lerp_(source[0].weight.detach(), 1 - min(0.5, (1 + step) / (10 + step)))
    assert torch.equal(ema.tensors["0.weight"], expected)
    assert torch.equal(ema.tensors["1.running_var"], ema.tensors["1.running_var"].mean().expand(2))
    assert 0 < ema.tensors["1.running_var"][0] < 4
    assert [module for module in made if isinstance(module, nn.Sequential)] == [model, model, other, other]


def test_averages_of_a_model_to_be_sharded_hold_no_weights():
    model = torch.nn.BatchNorm1d(2)
    ema = EMA(model, 0.5, [0.1], sharded=True)
    for average in (ema, *ema.profiles.values()):
        assert average.tensors.keys() == model.state_dict().keys()
        assert not any(tensor.numel() for tensor in average.tensors.values())
    assert model.weight.tolist() == [1, 1]


def test_average_needs_a_decay_below_one():
    with pytest.raises(ValueError, match=r"--train.ema_decay 1.0 must lie in"):
        EMA(torch.nn.Linear(1, 1), 1.0)


def test_power_average_is_the_weighted_mean_of_its_definition():
    """Of T steps, step t has a weight proportional to t^gamma."""
    model, num_steps = Scalar(), 3000
    average, gamma = Average(model, power_decay(0.1)), gamma_from_sigma_rel(0.1)
    for step in range(num_steps):
        model.weight.data.copy_(trajectory(step))
        average.update(model, step)
    t = torch.arange(1, num_steps + 1, dtype=torch.float64)
    shares = t**gamma / (t**gamma).sum()
    expected = sum((share * trajectory(step)).item() for step, share in enumerate(shares.tolist()))
    assert average.model.weight.item() == pytest.approx(expected, rel=2e-3)


def test_snapshots_of_two_lengths_give_any_other():
    model, num_steps, every = Scalar(), 1600, 100
    kept = EMA(model, 0.9, [0.05, 0.1])
    direct = {sigma_rel: Average(model, power_decay(sigma_rel)) for sigma_rel in (0.06, 0.08, 0.15)}
    snapshots, values = [], []
    for step in range(num_steps):
        model.weight.data.copy_(trajectory(step))
        for average in (kept, *direct.values()):
            average.update(model, step)
        if (step + 1) % every == 0:
            for sigma_rel, average in kept.profiles.items():
                snapshots.append((step + 1, gamma_from_sigma_rel(sigma_rel)))
                values.append(average.model.weight.item())
    for sigma_rel, average in direct.items():
        weights = reconstruction_weights(snapshots, (num_steps, gamma_from_sigma_rel(sigma_rel)))
        found = sum(weight * value for weight, value in zip(weights, values, strict=True))
        assert found == pytest.approx(average.model.weight.item(), rel=5e-3)
        assert abs(values[-1] - found) > abs(found - average.model.weight.item())


class InStages(nn.Module):
    """A model with a first stage, and a second that is trained later and has batch statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Scalar(), nn.BatchNorm1d(1)


def test_averages_of_a_stage_that_is_trained_late_forget_its_initialisation(tmp_path):
    """Also after resuming, and in an average made of snapshots. When the second stage was averaged by the steps of the
    whole training, 39% of its initial weights remained after the last tenth, and all of them once the decay had reached
    its limit."""
    torch.manual_seed(0)
    spec = ModelSpec("DiT", {"dim": 16, "depth": 1, "num_heads": 2}, (4, 4), 4, 8, 0)
    model, num_steps = InStages(), 1000
    ema = EMA(model, 0.9999, [0.05, 0.1])
    training = TrainingState({"model": model}, {}, ema)
    alone = EMA(Scalar(), 0.9999, [0.15])
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
        if (step + 1) % 20 == 0 and step > 600:
            metadata = make_metadata(ExperimentConfig(), step + 1, spec=spec, classes=[])
            copy_checkpoint(tmp_path / "checkpoints", step + 1, training, metadata, training.progress())()
    for name in ("weight", "running_var"):
        assert ema.tensors[f"second.{name}"].item() == pytest.approx(alone.tensors["weight"].item(), rel=1e-6)
    program = script("scripts/reconstruct_ema.py")
    program.main(program.ReconstructConfig(tmp_path, 0.15))
    made = load_file(tmp_path / "ema-0.15.safetensors")
    assert made["second.weight"].item() == pytest.approx(alone.profiles[0.15].tensors["weight"].item(), rel=1e-2)


def test_reconstruct_ema_makes_an_average_from_a_runs_snapshots(tmp_path, capsys, monkeypatch):
    spec = ModelSpec("DiT", {"dim": 16, "depth": 1, "num_heads": 2}, (4, 4), 4, 8, 0)
    torch.manual_seed(0)
    model = spec.build()
    ema = EMA(model, 0.9, [0.05, 0.1])
    for step in (1, 2):
        with torch.no_grad():
            model.patch.weight.fill_(step)
        ema.update(model, step - 1)
        metadata = make_metadata(ExperimentConfig(), step, spec=spec, classes=[])
        training = TrainingState({"model": model}, {}, ema)
        copy_checkpoint(tmp_path / "checkpoints", step, training, metadata, training.progress())()

    program = script("scripts/reconstruct_ema.py")
    program.main(program.ReconstructConfig(tmp_path, 0.08))
    assert "sigma_rel 0.08 up to step 2, from 4 snapshots" in capsys.readouterr().out
    made = open_checkpoint(tmp_path / "ema-0.08.safetensors")
    shorter, longer = (average.model.patch.weight.max() for average in ema.profiles.values())
    assert made.step == 2
    assert read_metadata(made.path)["sigma_rel"] == "0.08"
    assert longer < made.load_model().patch.weight.mean() < shorter

    def disk_full(*_):
        raise OSError("No space left on device")

    before = (tmp_path / "ema-0.08.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", disk_full)
        with pytest.raises(OSError, match="No space"):
            program.main(program.ReconstructConfig(tmp_path, 0.08))
    program.main(program.ReconstructConfig(tmp_path, 0.08, step=1))
    assert open_checkpoint(tmp_path / "ema-0.08-1.safetensors").step == 1
    assert (tmp_path / "ema-0.08.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))

    first = tmp_path / "snapshots" / "00000001.safetensors"
    first.write_bytes(first.read_bytes()[:-1] + bytes([first.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="its weights have another checksum"):
        program.main(program.ReconstructConfig(tmp_path, 0.08))


@pytest.mark.parametrize(("num", "sigmas"), [(4, (0.05, 0.1)), (1, (0.05,)), (1, (0.05, 0.1))])
def test_weights_of_snapshots_sum_to_one_however_few(num, sigmas):
    snapshots = [(100 * (number + 1), gamma_from_sigma_rel(sigma)) for number in range(num) for sigma in sigmas]
    weights = reconstruction_weights(snapshots, (100 * num, gamma_from_sigma_rel(0.25)))
    assert sum(weights) == pytest.approx(1, abs=1e-9)


def test_snapshots_belong_to_a_single_course_of_training(tmp_path, monkeypatch, capsys):
    """A run that resumes from an earlier checkpoint writes its steps again; a new run keeps nothing of another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    checkpoints, snapshots = (tmp_path / "runs" / "tiny" / name for name in ("checkpoints", "snapshots"))

    def train(*flags):
        script("train.py").main(parse_run(ExperimentConfig, [*flags, "--log.validate_every", "0"]))

    fresh = ["--config", "tiny.yaml", "--train.ema_profiles", "[0.05, 0.1]", "--log.trackers", "[]"]
    train(*fresh, "--train.num_steps", "2", "--log.checkpoint_every", "1", "--sampling.num_steps", "1")
    assert [*list_snapshots(snapshots.parent)] == [1, 2]
    shutil.rmtree(checkpoints / "00000002")
    train("--resume", "runs/tiny", "--train.num_steps", "3", "--log.checkpoint_every", "3")
    assert [*list_snapshots(snapshots.parent)] == [1, 3]

    shutil.rmtree(checkpoints)
    (snapshots.parent / "tracking").mkdir()
    start_or_resume(parse_run(ExperimentConfig, fresh), print)
    assert list_snapshots(snapshots.parent) == {}
    assert f"{Path('runs/tiny/snapshots')} is of an earlier training, and is now" in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / "tiny").glob("snapshots.before-*/*.safetensors"))) == 2
    (log,) = (tmp_path / "runs" / "tiny").glob("log.jsonl.before-*")  # which a fresh training would have emptied
    assert len(log.read_text().splitlines()) == 3
    assert not {"log.jsonl", "tracking"} & {path.name for path in snapshots.parent.iterdir()}

    (tmp_path / "runs" / "tiny" / "ema.safetensors").touch()  # imported: readers would take it for the training's
    with pytest.raises(FileExistsError, match=r"holds weights already, ema.safetensors: give another --name"):
        start_or_resume(parse_run(ExperimentConfig, fresh), print)


def test_files_of_steps_after_the_resumed_checkpoint_are_moved_away(tmp_path):
    """The newest checkpoint is damaged, so the training resumes from the one before."""
    for step in (2, 4):
        for file in ("checkpoints/{}/ema.safetensors", "samples/{}.png", "snapshots/{}.safetensors"):
            path = tmp_path / file.format(f"{step:08d}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    said = []
    discard_later_results(tmp_path, 2, said.append)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["00000002"]
    assert (tmp_path / "checkpoints" / said[0].rpartition("/")[2] / "ema.safetensors").exists()
    assert [path.stem for name in ("samples", "snapshots") for path in (tmp_path / name).iterdir()] == ["00000002"] * 2
