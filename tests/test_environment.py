"""Settings of a shell, a notebook or a launcher's configuration do not silently change a run."""

import subprocess
import sys

import pytest
import wandb
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DynamoBackend
from processes import ROOT
from wandb.errors import UsageError

from experiment.config import ExperimentConfig, LogConfig
from machine.accelerator import open_accelerator
from training import run
from training.log import Log

STATES = [PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state]


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate's state as in a new process."""
    before = [dict(state) for state in STATES]
    for state in STATES:
        state.clear()
    yield
    for state, values in zip(STATES, before, strict=True):
        state.clear()
        state.update(values)


def test_what_is_compiled_and_accumulated_is_the_configurations(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = open_accelerator("fp32", grad_accumulation=2)
    assert getattr(accelerator.state.dynamo_plugin, "backend", None) == DynamoBackend.NO
    assert accelerator.gradient_accumulation_steps == 2


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "get_available_trackers", lambda: ["tensorboard"])
    config = ExperimentConfig(resume=str(tmp_path), log=LogConfig(trackers=["wandb"]))
    with pytest.raises(ValueError, match=r"--log.trackers wandb: not installed; there are tensorboard"):
        run.open_run(config).__enter__()


def test_wandb_has_a_project_and_says_what_it_wants(tmp_path, monkeypatch):
    asked = []

    def refuse(**options):
        asked.append(options)
        raise UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    accelerator = open_accelerator("fp32", log_with=["wandb"], project_dir=tmp_path)
    with pytest.raises(ValueError, match=r"--log.trackers \['wandb'\]: api_key not configured .*; wandb login, set"):
        Log(tmp_path / "mine", accelerator, {"log": {"trackers": ["wandb"]}})
    assert asked == [{"project": "latent-diffusion-backbones", "name": "mine"}]


def test_windows_is_refused_at_the_first_line():
    imported = "import sys; sys.platform = 'win32'; import experiment.cli"
    done = subprocess.run([sys.executable, "-c", imported], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Windows itself is not supported: use its Linux (wsl --install), GPUs included\n"
