"""Execution of an ablation's runs: what counts as done, what still runs, and how it stops."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ablations import execute, plan_of
from processes import ROOT

from ablation import identity, runner
from ablation.identity import done_stages, is_scored, mark_done
from ablation.plan import make_plan
from ablation.progress import describe_state, read_progress, refuse_changed
from ablation.runner import Runner, group_into_jobs, last_line, submit
from ablation.study import ScoringConfig, deep_merge
from checkpoints.checkpoint import WEIGHTS, make_metadata, save_tensors
from experiment.cli import parse, parse_mapping
from experiment.config import ExperimentConfig
from machine.accelerator import open_accelerator
from machine.cluster import ClusterConfig
from machine.lock import Lock

pytestmark = pytest.mark.usefixtures("here")


def test_keys_ignore_settings_that_cannot_change_a_result():
    plan = plan_of(
        {
            "a": {},
            "logged": {"log.every": 7, "data.cache": "elsewhere", "train.max_hours": 1.0},
            "sampled": {"sampling.num_steps": 2},
            "scored": {"evaluation.seed": 5},
            "trained": {"optim.lr": 5e-4},
        }
    )
    a, logged, sampled, scored, trained = (planned.keys for planned in plan)
    assert logged["train"] == a["train"]
    assert sampled["train"] == a["train"]
    assert {sampled["score"], sampled["draw"]}.isdisjoint({a["score"], a["draw"]})
    assert (scored["train"], scored["draw"]) == (a["train"], a["draw"])
    assert scored["score"] != a["score"]
    assert all(trained[stage] != a[stage] for stage in a)


def test_keys_change_with_the_content_of_files_that_settings_name():
    """For example, a guide that was trained again, or another network under the same name."""
    config = parse_mapping(
        ExperimentConfig,
        {
            "auxiliary": [{"kind": "perceptual", "weight": 0.1, "network": "net.pt"}],
            "evaluation": {"extractor": "judge.pt"},
            "sampling": {"guidance_checkpoint": "guide", "spacing": "levels.txt"},
        },
    )

    def changed(write, content):
        before = identity.stage_keys(config, {}, {})
        write(content)
        return {stage for stage, key in identity.stage_keys(config, {}, {}).items() if key != before[stage]}

    def train_guide(value):
        Path("guide").mkdir(exist_ok=True)
        weights = {"weight": torch.tensor([value])}
        save_tensors(weights, Path("guide") / WEIGHTS, make_metadata(ExperimentConfig(), 1))

    for value in (0.0, 1.0):
        assert changed(train_guide, value) == {"score", "draw"}
        assert changed(train_guide, value) == set()
        assert changed(Path("judge.pt").write_text, f"{value}") == {"score"}
        assert changed(Path("levels.txt").write_text, f"{value} 1 2") == {"score", "draw"}
        assert changed(Path("net.pt").write_text, f"{value}") == {"train", "score", "draw"}


def state_of(planned):
    return describe_state(planned, read_progress(planned))


@pytest.fixture
def changed_code(monkeypatch):
    """Pretend that one file of the stages' code has changed."""

    def change(name):
        now = {stage: identity.code_hashes(stage) for stage in identity.PROGRAMS}
        other = {stage: {**code, name: "other"} if name in code else code for stage, code in now.items()}
        monkeypatch.setattr(identity, "code_hashes", other.__getitem__)

    return change


def test_a_changed_file_of_the_code_makes_its_stages_run_again(scripted, changed_code):
    (planned,) = plan_of({"a": {}})
    execute([planned])

    def now():
        scoring = {**asdict(planned.ablation.scoring), "baselines": True}
        pictures = asdict(planned.ablation.pictures)
        return replace(planned, keys=identity.stage_keys(planned.run.config, scoring, pictures))

    changed_code("conversion/diffusers_pipeline.py")
    assert state_of(now()) == "done"
    changed_code("metrics/reference.py")
    assert (read_progress(now()).done & {"train", "draw", "score"}, state_of(now())) == ({"train", "draw"}, "trained")
    changed_code("training/objective.py")
    assert state_of(now()) == "of other training/objective.py"
    with pytest.raises(ValueError, match=r"seed0: training/objective\.py: --redo true keeps the old runs"):
        refuse_changed([now()])


def test_any_code_accepts_results_of_other_code():
    (planned,) = plan_of({"a": {}})
    older = {name: f"{key.partition('-')[0]}-older" for name, key in planned.keys.items()}
    mark_done(planned.run.folder, began=older["train"], **older)
    assert not read_progress(planned).done
    where = {"folder": Path("runs/t"), "accelerator": open_accelerator("fp32"), "timed": False}
    again = partial(make_plan, planned.ablation, **where)
    (accepted,) = again([planned.run], any_code=True)
    assert read_progress(accepted).done == {"train", "score", "draw"}
    assert state_of(accepted) == "done"
    steps = replace(planned.run.config.sampling, num_steps=2)
    other = replace(planned.run, variant="b", config=replace(planned.run.config, name="t/b", sampling=steps))
    (_, sharing) = again(
        [planned.run, other], any_code=True
    )  # a variant that was added since has no training of its own
    assert sharing.trained_in == planned.run.folder


def test_scores_that_were_overwritten_by_hand_do_not_count_as_done():
    """`evaluate.py --samples RUN` also writes to the run's `scores.json`."""
    (planned,) = plan_of({"a": {}})
    folder = planned.run.folder
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text('{"num_samples": 50000}')
    mark_done(folder, began=planned.keys["train"], **planned.keys)
    assert state_of(planned) == "done"
    (folder / "scores.json").write_text('{"num_samples": 10}')
    assert (read_progress(planned).done, is_scored(folder, planned.keys["score"])) == ({"train", "draw"}, False)


# The runner, with scripts in the place of the three commands.

SCRIPT = """
import json, os, pathlib, signal, sys, time
name, folder = sys.argv[1:3]
with open("calls.txt", "a") as file: file.write(f"{name} {pathlib.Path(folder).parent.name}\\n")
if name == "train" and "bad" in folder: sys.exit("train.py: error: no such luck")
if name == "train" and "slow" in folder:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    pathlib.Path("waiting").touch()
    time.sleep(600)
if name == "train" and "pair" in folder:
    pathlib.Path(pathlib.Path(folder).parent.name).write_text(str(sorted(os.sched_getaffinity(0))))
    until = time.monotonic() + 300
    while len(list(pathlib.Path().glob("pair*"))) < 2 and time.monotonic() < until: time.sleep(0.02)
    if time.monotonic() > until: sys.exit("nobody came")
"""


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def command(stage, planned):
        return [str(tmp_path / "script.py"), stage, str(planned.run.folder)]

    for stage in runner.STAGES:
        monkeypatch.setitem(runner.STAGES, stage, partial(command, stage))


def calls():
    return Path("calls.txt").read_text().splitlines() if Path("calls.txt").exists() else []


def test_a_failed_variant_does_not_affect_others_and_is_retried(scripted):
    found = execute(plan_of({"a": {}, "bad": {"optim.lr": 5e-4}, "c": {"optim.lr": 6e-4}}))
    assert found["a"] == found["c"] == ("done", "")
    assert found["bad"] == ("failed", "train: train.py: error: no such luck")
    assert calls() == ["train a", "score a", "draw a", "train bad", "train c", "score c", "draw c"]
    found = execute(plan_of({"a": {}, "bad": {"optim.lr": 5e-4}, "c": {"optim.lr": 6e-4}}))
    assert calls()[7:] == ["train bad"]
    assert found["a"] == ("done", "before")


def test_a_stage_whose_files_were_replaced_since_the_plan_does_not_run(scripted):
    """Variants would begin from other weights, or be measured by another extractor, under one plan."""
    plan = plan_of({"a": {}, "b": {"evaluation.extractor": "other.pt"}})
    Path("colors.pt").write_text("trained anew")
    found = execute(plan)
    assert found["b"] == ("done", "")
    assert found["a"][0] == "failed"
    assert found["a"][1].startswith("score: files that its settings name have changed since it was planned; ")
    assert "score a" not in calls()
    assert execute(plan_of({"a": {}}))["a"] == ("done", "")


@pytest.fixture
def cores():
    """All cores of the machine, where a worker of pytest is pinned to one."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, own)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_workers_run_side_by_side_and_share_the_cores(scripted, cores):
    found = execute(plan_of({"pair1": {}, "pair2": {"optim.lr": 6e-4}}), workers=2)
    assert found == {"pair1": ("done", ""), "pair2": ("done", "")}
    half = len(cores) // 2
    found = {Path(name).read_text() for name in ("pair1", "pair2")}
    assert found == {str(cores[:half]), str(cores[half : 2 * half])}
    with pytest.raises(ValueError, match="--workers 999: there are"):
        execute(plan_of({"c": {"optim.lr": 7e-4}}), workers=999)


def test_variants_that_share_a_training_are_scored_from_it(scripted):
    plan = plan_of({"a": {}, "b": {"sampling.num_steps": 2}})
    assert {status for status, _ in execute(plan).values()} == {"done"}
    assert calls() == ["train a", "score a", "draw a", "score b", "draw b"]
    again = plan_of({"a": {}, "b": {"sampling.num_steps": 2}})
    assert [state_of(planned) for planned in again] == ["done", "done"]


def test_a_changed_configuration_trains_anew_and_backs_up_the_old_run(scripted):
    execute(plan_of({"a": {}}))
    (Path("runs/t/a/seed0") / "checkpoints").mkdir()
    plan = plan_of({"a": {"optim.lr": 5e-4}})
    assert state_of(plan[0]) == "of other optim.lr"
    with pytest.raises(ValueError, match=r"trained before with other runs/t/a/seed0: optim\.lr: --redo true keeps"):
        refuse_changed(plan)
    execute(plan)
    assert calls() == ["train a", "score a", "draw a"] * 2
    (kept,) = Path("runs/t/a").glob("seed0.before-*")
    assert (kept / "checkpoints").is_dir()
    assert not Path("runs/t/a/seed0/checkpoints").exists()


def trained(planned, *, step=4, **changes):
    """Write the files of a finished training that a plan reads."""
    weights = planned.run.folder / "checkpoints" / f"{step:08d}" / WEIGHTS
    weights.parent.mkdir(parents=True)
    config = parse_mapping(ExperimentConfig, deep_merge(planned.run.config.to_dict(), changes))
    metadata = make_metadata(config, step, planned.identity, spec=planned.spec, classes=list(planned.classes))
    save_tensors({"x": torch.zeros(1)}, weights, metadata)


def test_a_training_on_other_images_is_refused_and_redone(scripted):
    variants = {"a": {}, "b": {"sampling.num_steps": 2}}
    plan = plan_of(variants)
    execute(plan)
    trained(plan[0])
    assert [state_of(planned) for planned in plan] == ["done", "done"]
    identity = {**plan[0].identity, "train": {**plan[0].identity["train"], "source_hash": "of other images"}}
    plan = [replace(planned, identity=identity) for planned in plan]
    assert [state_of(planned) for planned in plan] == ["of other content of --data.path"] * 2
    with pytest.raises(ValueError, match=r"a/seed0: content of --data\.path; runs/t/b/seed0: content of"):
        refuse_changed(plan)
    execute(plan)
    assert calls() == ["train a", "score a", "draw a", "score b", "draw b"] * 2
    assert len([*Path("runs/t").glob("*/seed0.before-*/stages.json")]) == 2


def test_a_training_that_was_continued_by_hand_with_other_settings_is_refused(scripted):
    (planned,) = plan_of({"a": {}})
    execute([planned])
    trained(planned, step=8, **{"train.num_steps": 8, "sampling.num_steps": 2, "log.every": 7})
    assert state_of(planned) == "of other train.num_steps"


def test_reordering_variants_keeps_their_shared_training(scripted):
    execute(plan_of({"a": {}, "b": {"sampling.num_steps": 2}}))
    plan = plan_of({"b": {"sampling.num_steps": 2}, "a": {}}, scoring=ScoringConfig(baselines=False))
    assert execute(plan) == {"a": ("done", ""), "b": ("done", "before")}
    assert calls()[5:] == ["score a"]  # without the baselines now
    variants = {"b": {"sampling.num_steps": 2}}  # without the one that has trained
    plan = plan_of(variants, scoring=ScoringConfig(baselines=False))
    assert execute(plan)["b"] == ("done", "")
    assert calls()[6:] == ["train b", "score b", "draw b"]


def test_code_that_changes_after_planning_is_refused(scripted):
    plan = plan_of({"a": {}})
    (outcome,) = Runner(code=dict.fromkeys(runner.STAGES, "older"))(plan)
    assert (outcome.status, outcome.why.partition(":")[0]) == ("failed", "train")
    assert calls() == []
    assert not done_stages(plan[0].run.folder)


def test_a_training_that_no_ablation_began_is_left_alone(scripted):
    Path("runs/t/a/seed0/checkpoints").mkdir(parents=True)
    assert execute(plan_of({"a": {}}))["a"][1].endswith("holds a training run that no ablation started; move it away")
    assert calls() == []


def test_a_stop_lets_the_training_save_and_the_rest_wait(scripted):
    def stop():
        while not Path("waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    found = execute(plan_of({"slow": {}, "c": {"optim.lr": 6e-4}}))
    assert found == {"slow": ("stopped", "SIGTERM"), "c": ("stopped", "SIGTERM")}
    assert "train" not in done_stages(Path("runs/t/slow/seed0"))


def test_nothing_starts_when_the_time_is_over(scripted):
    assert execute(plan_of({"a": {}}), deadline=time.time() - 1)["a"] == ("stopped", "the time is over")
    assert calls() == []


def test_submitit_does_the_same_in_a_process_of_its_own():
    plan = plan_of({"a": {}})
    mark_done(plan[0].run.folder, began=plan[0].keys["train"], **plan[0].keys)
    outcomes = submit(group_into_jobs(plan), Runner(), ClusterConfig(gpus=0), Path("jobs"), "local")
    assert [(outcome.status, outcome.why) for outcome in outcomes] == [("done", "before")]


def test_a_training_that_a_launcher_says_has_failed_may_have_stopped(monkeypatch):
    def launched(runner, command, output, lock, environment):
        (output.parent / "stopped").write_text("SIGUSR1: stopped after 3 of 4 steps")
        return 1

    monkeypatch.setattr(Runner, "_process", launched)
    plan = plan_of({"a": {}})
    assert [outcome.status for outcome in Runner()(plan)] == ["stopped"]


def test_two_runners_share_a_study(scripted):
    variants = {"a": {}, "scored": {"sampling.num_steps": 2}, "c": {"optim.lr": 6e-4}}
    with Lock(Path("runs/t/a/seed0/lock")):  # of the other runner
        found = execute(plan_of(variants))
    assert found["a"][0] == found["scored"][0] == "elsewhere"
    assert "in use by process" in found["a"][1]
    assert found["c"] == ("done", "")
    assert calls() == ["train c", "score c", "draw c"]
    assert {status for status, _ in execute(plan_of(variants)).values()} == {"done"}


def test_two_runners_do_not_share_a_folder(tmp_path):
    message = rf"x is in use by process {os.getpid()} on .* since"
    with Lock(tmp_path / "x" / "lock"), pytest.raises(ValueError, match=message):
        Lock(tmp_path / "x" / "lock")
    with Lock(tmp_path / "x" / "lock"):
        pass


def test_a_training_that_outlives_its_runner_keeps_its_folder(tmp_path):
    lock = Lock(tmp_path / "lock")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.file.fileno(),))
    lock.file.close()
    with pytest.raises(ValueError, match="in use by process"):
        Lock(tmp_path / "lock")
    child.communicate(b"\n")
    Lock(tmp_path / "lock").file.close()


def test_the_last_line_of_an_output_is_its_error(tmp_path):
    (tmp_path / "a.txt").write_text("x:   0%|   | 0/4\rx:  50%|##  | 2/4 [00:01, 2.0it/s]\ntrain.py: error: no\n\n")
    assert last_line(tmp_path / "a.txt") == "train.py: error: no"


def test_the_commands_are_ones_that_their_scripts_accept():
    sys.path.insert(0, str(ROOT))
    from evaluate import EvaluateConfig
    from sample import SampleConfig

    asked = {"sampler": "ddim", "sampler_args": {"eta": 0.5}, "guidance_interval": [0.2, 5.0], "clip": math.inf}
    planned, unguided = plan_of({"a": {"sampling": asked}, "b": {"train.label_dropout": 0.0}})
    scoring = parse(EvaluateConfig, runner.score_command(planned)[1:])
    expected = {**asdict(planned.run.config.sampling), "spacing": "uniform"}
    assert (asdict(scoring.sampling), scoring.num_samples) == (expected, 12)  # null too
    assert (scoring.baselines, scoring.per_class, scoring.metrics) == (True, True, ["fid", "precision"])
    drawing = parse(SampleConfig, runner.draw_command(planned)[1:])
    assert drawing.classes == list(planned.classes[:8])
    assert drawing.output == "runs/t/a/seed0/pictures.npz"
    assert parse(SampleConfig, runner.draw_command(unguided)[1:]).sampling.guidance_scale == 1.0
