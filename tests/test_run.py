"""The scaffold under both trainings, around a layer that learns nothing much."""

import shutil
from dataclasses import replace

import pytest
import torch
from processes import log

from checkpoints.averages import EMA
from checkpoints.training_state import TrainingState
from experiment.config import ExperimentConfig, LogConfig, TrainConfig
from training.guard import Guard
from training.run import open_run


class Killed(Exception):
    """By nobody who lets anything be saved."""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Six steps, or those up to one that is killed, with these gradient norms; gives the run."""
    monkeypatch.chdir(tmp_path)
    logged = LogConfig(every=1, checkpoint_every=2, keep_checkpoints=1, keep_every=2, trackers=[])
    config = ExperimentConfig(name="run", log=logged, train=TrainConfig(precision="fp32", max_hours=None))

    def training(norm_of, *, looks={}, resume=None):  # noqa: B006
        def due(step, num_steps):
            return [lambda step: {"score": looks[step]}] if step in looks else []

        with open_run(replace(config, resume=resume)) as run:
            layer = torch.nn.Linear(1, 1)
            optimizer, guard = torch.optim.AdamW(layer.parameters()), Guard(patience=2)
            state = TrainingState({"model": layer}, {"optimizer": optimizer}, EMA(layer, 0.9))
            run.begin(state, {"model": guard}, due, 6, best="score", keep_every=2)
            for step in run.steps():
                if guard.passes(norm_of(run, step)):
                    layer.weight.data += 1
                else:
                    run.skip(guard, [step])
        return run

    return training


def test_a_kill_does_not_forget_that_training_went_back(train):
    def diverges_twice(run, step):
        if run.rollbacks == 1 and step == 3:
            raise Killed
        return float("nan") if step >= 2 and not run.rollbacks else 1.0

    with pytest.raises(Killed):
        train(diverges_twice)
    orders = []
    train(lambda run, step: orders.append((step, run.rollbacks)) or 1.0, resume="runs/run")
    assert orders == [(2, 1), (3, 1), (4, 1), (5, 1)]


def test_the_best_is_one_that_is_still_there(train, tmp_path):
    """After checkpoints are lost, those before may know of a best that made room for another since."""
    run, folder = (
        train(lambda run, step: 1.0, looks={2: 3.0, 4: 1.0, 6: 2.0}),
        tmp_path / "runs" / "run" / "checkpoints",
    )
    assert (folder / "best").resolve() == folder / "00000004"
    shutil.rmtree(folder / "00000004")
    run = train(lambda run, step: 1.0, looks={}, resume="runs/run")
    assert not (folder / "best").is_symlink()
    assert run.best.value is None


def test_a_look_that_a_resumed_run_has_made_up_for_is_not_taken_again(train, tmp_path):
    def stopped(run, step):
        run.interruption.deadline = 0.0 if step == 1 else None
        return 1.0

    def killed(run, step):
        raise Killed

    with pytest.raises(SystemExit, match="75"):
        train(stopped, looks={2: 1.0})
    with pytest.raises(Killed):
        train(killed, looks={2: 1.0}, resume="runs/run")
    train(lambda run, step: 1.0, looks={2: 1.0}, resume="runs/run")
    assert [event["step"] for event in log(tmp_path, "run") if "score" in event] == [2]


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 4), (600.0, 1)], ids=["at each save", "short"])
def test_the_curve_is_drawn_now_and_then_and_at_the_end(train, monkeypatch, seconds, times):
    drawn = []
    monkeypatch.setattr("training.run.SECONDS_BETWEEN_CURVES", seconds)
    monkeypatch.setattr("training.run.draw_curve", drawn.append)
    train(lambda run, step: 1.0)
    assert len(drawn) == times
