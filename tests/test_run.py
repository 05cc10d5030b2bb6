"""The scaffold of both trainings, around a single layer."""

import errno
import json
import os
import shutil
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from processes import log
from safetensors.torch import load_file

from autoencoders.codec import create_codec
from checkpoints.averages import EMA
from checkpoints.training_state import TrainingState
from experiment.config import ExperimentConfig, LogConfig, TrainConfig
from machine.checkpoint_folder import Best, find_damage, list_checkpoints
from metrics.extractors import ExtractorError
from training import run as run_module
from training.guard import Guard
from training.run import open_run


class Killed(Exception):
    """A kill, after which nothing can be saved."""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train for six steps, or until a kill, with the given gradient norms; returns the run."""
    monkeypatch.chdir(tmp_path)
    logged = LogConfig(every=1, checkpoint_every=2, keep_checkpoints=1, keep_every=2, trackers=[])
    config = ExperimentConfig(name="run", log=logged, train=TrainConfig(precision="fp32", max_hours=None))

    def training(norm_of, *, looks={}, resume=None, **written):  # noqa: B006
        def due(step, num_steps):
            look = looks.get(step)
            return [look] if callable(look) else [lambda step: {"score": look}] if look else []

        with open_run(replace(config, resume=resume, log=replace(logged, **written))) as run:
            layer = torch.nn.Linear(1, 1)
            optimizer, guard = torch.optim.AdamW(layer.parameters()), Guard(patience=2)
            state = TrainingState({"model": layer}, {"optimizer": optimizer}, EMA(layer, 0.9))
            run.begin(state, {"model": guard}, due, 6, best=Best("score"))
            for step in run.steps():
                if guard.passes(norm_of(run, step)):
                    layer.weight.data += 1
                else:
                    run.skip(guard, [step])
        return run

    return training


def test_a_rollback_is_remembered_after_a_kill(train):
    def diverges_twice(run, step):
        if run.rollbacks == 1 and step == 3:
            raise Killed
        return float("nan") if step >= 2 and not run.rollbacks else 1.0

    with pytest.raises(Killed):
        train(diverges_twice)
    orders = []
    train(lambda run, step: orders.append((step, run.rollbacks)) or 1.0, resume="runs/run")
    assert orders == [(2, 1), (3, 1), (4, 1), (5, 1)]


def test_a_configuration_that_is_there_is_kept(train, tmp_path):
    """One that a user wrote, or that of a training whose checkpoints are deleted, whose log is kept too."""
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").write_text("model: XSwin  # my notes\n")
    run = train(lambda run, step: 1.0)
    (kept,) = run.folder.glob("config.yaml.before-*")
    assert kept.read_text() == "model: XSwin  # my notes\n"
    train(lambda run, step: 1.0, resume="runs/run", keep_checkpoints=2)  # which checkpoints record
    assert [*run.folder.glob("config.yaml.before-*")] == [kept]


def test_a_rollback_leaves_no_step_twice_in_the_log(train, tmp_path):
    def diverges_once(run, step):
        run.log.write(step + 1, loss=run.rollbacks)
        return float("nan") if step >= 3 and not run.rollbacks else 1.0

    train(diverges_once)
    events = [json.loads(line) for line in (tmp_path / "runs" / "run" / "log.jsonl").read_text().splitlines()]
    losses = [(event["step"], event["loss"]) for event in events if "loss" in event]
    assert losses == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert [event["step"] for event in events if "skipped" in event] == [4, 5]


def test_steps_skipped_before_a_rollback_stay_in_the_log_after_a_kill(train, tmp_path):
    def diverges(run, step):
        if run.rollbacks and step == 3:
            raise Killed
        return float("nan") if step >= 2 and not run.rollbacks else 1.0

    with pytest.raises(Killed):
        train(diverges)
    skipped = [event for event in log(tmp_path, "run") if "skipped" in event]
    assert [(event["step"], event["source_indices"]) for event in skipped] == [(3, [2]), (4, [3])]
    train(lambda run, step: float("nan") if step == 3 else 1.0, resume="runs/run")
    again = [event for event in log(tmp_path, "run") if "skipped" in event]
    assert again[:2] == skipped
    assert [(event["step"], event["rollbacks"]) for event in again[2:]] == [(4, 1)]


def test_samples_or_features_that_are_not_finite_do_not_end_a_training(train, capsys):
    def draw(step):
        return create_codec("pixel").decode(torch.full((1, 3, 2, 2), torch.nan))

    def score(step):
        raise ExtractorError("--extractor mine: not finite on 1 of 2 images")

    assert train(lambda run, step: 1.0, looks={2: draw, 4: score}).step == 6
    said = capsys.readouterr().out
    assert "step 2: nothing to draw: images are not finite" in said
    assert "step 4: nothing to score: --extractor mine: not finite on 1 of 2 images" in said


def test_the_best_is_one_that_is_still_there(train, tmp_path):
    """After checkpoints are lost, older ones may name a best checkpoint that has been deleted since."""
    run, folder = (
        train(lambda run, step: 1.0, looks={2: 3.0, 4: 1.0, 6: 2.0}),
        tmp_path / "runs" / "run" / "checkpoints",
    )
    assert (folder / "best").resolve() == folder / "00000004"
    shutil.rmtree(folder / "00000004")
    run = train(lambda run, step: 1.0, looks={}, resume="runs/run")
    assert not (folder / "best").is_symlink()
    assert run.best.value is None


def test_a_best_checkpoint_where_there_are_no_links_is_refused_before_the_first_step(train, tmp_path, monkeypatch):
    """The training ended at the first one, which may be hours later."""
    monkeypatch.setattr(os, "symlink", Mock(side_effect=OSError(errno.EPERM, "not permitted")))
    steps, refused = [], r"--log.best: it is a link, and runs/run takes none \(not permitted\)"
    with pytest.raises(ValueError, match=refused):
        train(lambda run, step: steps.append(step) or 1.0, looks={2: 3.0})
    assert not steps
    assert not list((tmp_path / "runs" / "run").glob(".*"))


def test_a_copy_of_a_run_that_has_a_folder_for_the_link_to_the_best_resumes(train, tmp_path, capsys):
    """As programs make it that follow links; what is in the folder is kept."""
    train(lambda run, step: 1.0, looks={2: 3.0, 4: 1.0})
    folder = tmp_path / "runs" / "run" / "checkpoints"
    (folder / "best").unlink()
    shutil.copytree(folder / "00000004", folder / "best")
    train(lambda run, step: 1.0, looks={}, resume="runs/run")
    assert (folder / "best").is_symlink()
    assert (folder / "best").resolve() == folder / "00000004"
    (kept,) = folder.glob("best.before-*")
    assert f"{folder / 'best'} was no link, and is now {kept}".replace(f"{tmp_path}/", "") in capsys.readouterr().out
    assert find_damage(kept) is None


def test_a_resumed_run_makes_up_for_a_missed_inspection_only_once(train, tmp_path):
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
def test_the_loss_curve_is_drawn_at_intervals_and_at_the_end(train, monkeypatch, seconds, times):
    drawn = []
    monkeypatch.setattr("training.run.SECONDS_BETWEEN_CURVES", seconds)
    monkeypatch.setattr("training.run.draw_curve", drawn.append)
    train(lambda run, step: 1.0)
    assert len(drawn) == times


@pytest.fixture
def writing(monkeypatch):
    """Delay the writing of checkpoints until an event is set, or make it fail."""
    gate = SimpleNamespace(may_end=threading.Event(), began=threading.Event(), error=None, most=0, now=0)
    write = run_module.copy_checkpoint

    def slowly(*arguments, **options):
        job = write(*arguments, **options)

        def run():
            gate.now += 1
            gate.most = max(gate.most, gate.now)
            gate.began.set()
            assert gate.may_end.wait(60)
            if gate.error:
                raise gate.error
            job()
            gate.now -= 1

        return run

    monkeypatch.setattr(run_module, "copy_checkpoint", slowly)
    return gate


def weight_of(checkpoint):
    return load_file(checkpoint / "state" / "model.safetensors")["weight"].item()


def test_training_continues_while_a_checkpoint_is_written(train, writing, tmp_path):
    """The checkpoint is that of the step at which it began; the next one, and the end, wait for it."""
    folder, weights, seen = tmp_path / "runs/run/checkpoints", {}, {}

    def norm_of(run, step):
        weights[step] = run.training.networks["model"].weight.item()
        seen[step] = [path.name for path in list_checkpoints(folder)]
        if step == 3:  # the next save is at the end of this step
            assert writing.began.is_set()
            writing.may_end.set()
        return 1.0

    train(norm_of)
    assert (seen[2], seen[3], writing.most) == ([], [], 1)
    assert [path.name for path in list_checkpoints(folder)] == ["00000002", "00000004", "00000006"]
    for step in (2, 4):
        assert weight_of(folder / f"{step:08d}") == weights[step]
        assert find_damage(folder / f"{step:08d}") is None


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(train, writing):
    steps = []

    def norm_of(run, step):
        steps.append(step)
        if step == 2:
            writing.error = OSError("checkpoint X could not be written")
            writing.may_end.set()
            run.writing._newest.join()
        return 1.0

    with pytest.raises(OSError, match="checkpoint X could not be written"):
        train(norm_of)
    assert steps == [0, 1, 2]


listed: list[int] = []  # steps in which a folder was listed
step_now: list[int] = []  # the step, while one is watched


def watch(event, arguments):
    if event in ("os.listdir", "os.scandir") and step_now:
        listed.append(step_now[0])


def test_no_folder_is_listed_between_steps_that_save_nothing(train):
    """On the disk of a cluster that would take milliseconds at each step."""
    sys.addaudithook(watch)

    def norm_of(run, step):
        if run.writing._newest is not None:
            run.writing._newest.join()  # what the thread lists belongs to the step that saved
        step_now[:] = [step]
        return 1.0

    try:
        train(norm_of, checkpoint_every=3, keep_every=0)
    finally:
        step_now.clear()
    assert set(listed) == {2, 5}  # after which it saves


@pytest.mark.parametrize("ends", ["diverges", "stopped", "killed"])
def test_a_checkpoint_is_completed_whatever_ends_the_run(train, writing, tmp_path, ends):
    """A rollback returns to it and a stop saves after it; any other error leaves it complete."""
    gone_back = []

    def norm_of(run, step):
        threading.Timer(0.2, writing.may_end.set).start()
        if ends == "stopped":
            run.interruption.deadline = 0.0 if step == 2 else None
        elif ends == "killed" and step == 2:
            raise Killed
        elif run.rollbacks:
            gone_back.append(step)
        return float("nan") if ends == "diverges" and step in (2, 3) and not run.rollbacks else 1.0

    expected = {"diverges": None, "stopped": SystemExit, "killed": Killed}[ends]
    with pytest.raises(expected) if expected else nullcontext():
        train(norm_of)
    kept = {"diverges": [2, 4, 6], "stopped": [2, 3], "killed": [2]}[ends]
    assert [int(path.name) for path in list_checkpoints(tmp_path / "runs/run/checkpoints")] == kept
    assert gone_back == ([2, 3, 4, 5] if ends == "diverges" else [])


def test_checkpoints_are_written_every_quarter_of_an_hour(train, monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))

    def norm_of(run, step):
        now[0] += 60 * (14 if step in (0, 1, 4) else 1)  # since the last save 14, 28; 1, 2, 16; 1
        return run.synchronize(torch.ones(1))[0]

    train(norm_of, checkpoint_every=0, keep_every=0, keep_checkpoints=9)
    assert [int(path.name) for path in list_checkpoints(tmp_path / "runs/run/checkpoints")] == [2, 5, 6]
