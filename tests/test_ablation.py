"""Ablations: their YAML, equal cost, what counts as done, the runner, and a real one from beginning to end."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from processes import ROOT, TINY, run, script

from ablation import identity, stages
from ablation.costs import Speed
from ablation.executors import EXECUTORS, jobs_of
from ablation.match import at_width, resized
from ablation.plan import make_plan, refuse_changed, table
from ablation.runner import Runner, last_line
from ablation.stages import done_stages, mark
from ablation.study import AblationConfig, ClusterConfig, MatchConfig, ScoringConfig, read_ablation
from ablation.variants import expand, merged
from checkpoints.checkpoint import WEIGHTS, metadata_of, save_tensors
from experiment.cli import parse, parse_mapping
from experiment.config import ExperimentConfig
from machine import children
from machine.accelerator import open_accelerator
from machine.lock import Lock
from metrics.cost import Cost, cost
from models.spec import ModelSpec

SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
BASE = {**TINY, "evaluation": {"extractor": "colors.pt", "num_samples": 12, "metrics": ["fid", "precision"]}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs lie below the working folder."""
    monkeypatch.chdir(tmp_path)


def plan_of(variants, **settings):
    ablation = AblationConfig(base=BASE, variants=variants, **settings)
    folder = Path("runs/t")
    runs = expand(ablation, "t")
    return ablation, make_plan(ablation, runs, folder, open_accelerator("fp32"), timed=False, any_code=False)


# The YAML.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_ablation_builds(path, monkeypatch):
    shapes = {"data.path": "shapes", "data.exclude_classes": [], "autoencoder": "embedded"}
    ablation = read_ablation(path, shapes)
    labelled = expand(ablation, path.stem)[0].config.data.use_labels
    assert len(ablation.pictures.classes) == 8 * labelled
    assert path.name in path.read_text().split("\ntitle:")[0]
    ablation = replace(ablation, match=None, pictures=replace(ablation.pictures, classes=["star"] * labelled))
    runs = expand(ablation, path.stem)
    assert len(runs) >= 3
    monkeypatch.setattr("ablation.costs.count", lambda spec: Cost(1, 1.0))  # seconds each
    plan = make_plan(ablation, runs, Path("runs/x"), open_accelerator("fp32"), timed=False, any_code=False)
    assert len({json.dumps(planned.keys) for planned in plan}) == len(plan)  # no two variants are the same


BLOCKS = [
    block
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL)
]


@pytest.mark.parametrize("text", BLOCKS)
def test_every_ablation_in_the_documents_is_planned_as_it_stands(text):
    Path("a.yaml").write_text(text)
    smaller = {"data": {**TINY["data"], "exclude_classes": []}, "model_args": TINY["model_args"]}
    ablation = read_ablation(Path("a.yaml"), smaller)
    runs = expand(ablation, "a")
    ablation = replace(ablation, match=None, pictures=replace(ablation.pictures, classes=["star"]))
    plan = make_plan(ablation, runs, Path("runs/a"), open_accelerator("fp32"), timed=False, any_code=False)
    names = [f"{skip} lr={lr}" for skip in ("localized", "none") for lr in (0.0001, 0.0004)]
    assert [planned.run.variant for planned in plan[::3]] == names
    assert json.loads(Path("runs/a/plan.json").read_text())["ablation"]["baseline"] == names[0]


def test_the_variants_of_guidance_share_trainings():
    ablation = read_ablation(ROOT / "configs" / "ablations" / "guidance.yaml", {"data": {"path": "shapes"}})
    ablation = replace(ablation, pictures=replace(ablation.pictures, classes=[]))
    ablation = replace(ablation, set={**ablation.set, "data.exclude_classes": []})
    plan = make_plan(
        ablation, expand(ablation, "g"), Path("runs/g"), open_accelerator("fp32"), timed=False, any_code=False
    )
    assert [len(job) for job in jobs_of(plan)] == [7, 1, 1]
    assert [planned.trains for planned in plan].count(True) == 3


def test_names_grids_and_seeds_make_runs():
    ablation = AblationConfig(
        base={**TINY, "model_args": {}},
        set={"train.num_steps": 7},
        grid={"model": ["XSwin", "DiT"], "optim.lr": [1e-3, 1e-4], "seed": [3, 4]},
    )
    runs = expand(ablation, "grid")
    assert [run.variant for run in runs[::2]] == ["XSwin lr=0.001", "XSwin lr=0.0001", "DiT lr=0.001", "DiT lr=0.0001"]
    assert [run.config.train.seed for run in runs] == [3, 4] * 4
    assert {run.config.train.num_steps for run in runs} == {7}
    assert runs[5].folder == Path("runs/grid/DiT-lr=0.001/seed4")
    assert len({run.folder for run in runs}) == 8


def test_dotted_and_nested_settings_are_the_same():
    values = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merged(values, {"a.c.d": 5, "a.f": 6}) == merged(values, {"a": {"c": {"d": 5}, "f": 6}})
    assert values == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def planned(path):
    ablation = read_ablation(path, {})
    runs = expand(ablation, path.stem)
    return make_plan(ablation, runs, Path("runs/a"), open_accelerator("fp32"), timed=False, any_code=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: {a: {}, b: {}, a: {}}", "a stands twice"),
        ("variants: {a b: {}, a-b: {}}", "variants a b, seed 0 and a-b, seed 0 are of one name"),
        ("variants: {a: {model_arg.dim: 3}}", "variant a: Option 'model_arg.dim' is not accepted"),
        ("variants: {a: {optim.lr: fast}}", "variant a: .*optim.lr"),
        ("variants: {a: {}}\nmach: {by: flops}", "Option .mach.by. is not accepted"),
        ("variants: {a: {model_args.window: 3}}", "variant a: --model_args.window: XSwin has no such argument"),
        ("variants: {a: {model_args.num_heads: [3, 4]}}", "variant a: num_heads=3 must divide the width 16"),
        ("variants: {a: {sampling.sampler: dppm}}", "variant a: --sampling.sampler dppm: unknown"),
        ("variants: {a: {}}\npictures: {classes: [strr]}", "variant a: --classes strr: no such class"),
        ("variants: {a: {}}\nbaseline: b", "baseline b: no such variant; there are a"),
        ("variants: {}", "variants and grid are empty"),
        (
            "variants: {a: {}}\ngrid: {optim.lr: [1, 2]}\nbaseline: b",
            "baseline b: no such variant; there are a lr=1, a lr=2",
        ),
    ],
)
def test_mistakes_are_found_before_anything_starts(text, message):
    Path("a.yaml").write_text(f"base: {json.dumps(BASE)}\n{text}\n")
    with pytest.raises(ValueError, match=message):
        planned(Path("a.yaml"))
    assert not list(Path().rglob("stages.json"))


# Equal cost.


def small(name, **args):
    return ModelSpec(name, args, (8, 8), 4, 8, 10)


def gflops(spec):
    return cost(spec.build_on_meta(), latent_shape=(4, 8, 8), num_classes=10).gflops


def parameters(spec):
    return float(sum(parameter.numel() for parameter in spec.build_on_meta().parameters()))


@pytest.mark.parametrize("cost_of", [gflops, parameters])
def test_widths_are_changed_until_costs_are_equal(cost_of):
    target = small("XSwin", dim=64, depths=[1, 1], num_heads=[2, 4], num_global_blocks=1)
    wanted = cost_of(target)
    for spec in (small("DiT", depth=2), small("UViT-tokens", depth=3), replace(target, name="USwin")):
        found = resized(spec, wanted, cost_of, 0.05)
        assert abs(cost_of(found) / wanted - 1) <= 0.05
        assert found.args.get("depth") == spec.args.get("depth")
        assert found.args.get("depths") == spec.args.get("depths")
        assert resized(found, wanted, cost_of, 0.05) == found


def test_heads_stay_legal_and_alike():
    for width in range(100, 400, 4):
        choice = at_width(small("DiT"), width)
        if choice is not None:
            heads = choice.spec.args["num_heads"]
            assert width % heads == 0
            assert 32 <= width / heads <= 128  # 64, halved or doubled at the utmost
    assert at_width(small("DiT"), 768).spec.args == {"dim": 768, "num_heads": 12}
    assert at_width(small("XSwin"), 96).spec.args == {"dim": 96, "num_heads": [3, 6]}


def test_what_cannot_be_matched_is_told():
    with pytest.raises(ValueError, match=r"match: no width of DiT comes within 0\.0001 of the cost; the nearest, dim="):
        resized(small("DiT", depth=2), 1.1 * gflops(small("DiT", depth=2)), gflops, 0.0001)
    with pytest.raises(ValueError, match="match: UNet-Mini has no width"):
        resized(small("UNet-Mini"), 1.0, gflops, 0.03)


def test_a_plan_is_matched_timed_and_remembered():
    grid = {"optim.lr": [1e-3]}  # which makes other names
    variants = {"XSwin": {"model_args": TINY["model_args"]}, "DiT": {"model": "DiT", "model_args.depth": 4}}
    ablation = AblationConfig(
        base={**BASE, "model_args": {}}, variants=variants, match=MatchConfig("XSwin", "params", 0.2), grid=grid
    )
    where = (expand(ablation, "m"), Path("runs/m"), open_accelerator("fp32"))
    plan = partial(make_plan, ablation, *where, timed=True, any_code=False)
    first = plan()
    assert first[1].spec.args["dim"] < 100
    assert 0.8 < first[1].cost.parameters / first[0].cost.parameters < 1.2
    assert first[0].speed.training > 0
    before = Path("runs/m/measured.json").read_text()
    assert [planned.speed for planned in plan()] == [planned.speed for planned in first]
    assert Path("runs/m/measured.json").read_text() == before
    assert "about" in table(first)


# What counts as done.


def test_a_key_is_of_what_matters():
    _, plan = plan_of(
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


def test_code_counts_by_its_syntax(tmp_path):
    def of(text):
        (tmp_path / "train.py").write_text(text)
        identity.code_of.cache_clear()
        return identity.code_of("train", tmp_path)

    base = of('"""What."""\n\n\ndef f(x):\n    """Why."""\n    return x + 1\n')
    assert of("# said differently\ndef f( x ):\n    return (x + 1)\n") == base
    assert of("def f(x):\n    return x + 2\n") != base
    identity.code_of.cache_clear()


def test_the_code_of_a_training_is_what_it_imports():
    files = identity.code_of("train").keys()
    assert files >= {"train.py", "training/objective.py", "training/phases.py", "models/layers/window.py"}
    assert files.isdisjoint({"published/diffusers_dit.py", "scripts/doctor.py", "training/log.py"})
    assert identity.code_of("score").keys() > {*files, "metrics/reference.py", "evaluation/scoring.py"}
    assert "ablation/results.py" not in identity.code_of("score")


@pytest.fixture
def changed_code(monkeypatch):
    """Another version of one file of a stage's code."""

    def change(name):
        now = {stage: identity.code_of(stage) for stage in identity.PROGRAMS}
        for module in (identity, stages):
            other = {stage: {**code, name: "other"} if name in code else code for stage, code in now.items()}
            monkeypatch.setattr(module, "code_of", other.__getitem__)

    return change


def test_a_changed_file_of_the_code_makes_its_stages_due(scripted, changed_code):
    ablation, (planned,) = plan_of({"a": {}})
    execute(ablation, [planned])

    def now():
        scoring = {**asdict(ablation.scoring), "baselines": True}
        return replace(planned, keys=identity.keys_of(planned.run.config, scoring, asdict(ablation.pictures)))

    changed_code("published/diffusers_dit.py")
    assert now().state == "done"
    changed_code("metrics/reference.py")
    assert (now().done & {"train", "draw", "score"}, now().state) == ({"train", "draw"}, "trained")
    changed_code("training/objective.py")
    assert now().state == "of other training/objective.py"
    with pytest.raises(ValueError, match=r"seed0: training/objective\.py: --redo true keeps that beside them"):
        refuse_changed([now()])


def test_a_study_and_a_training_do_not_share_a_folder(tmp_path):
    ablate, train = script("scripts/ablate.py"), script("train.py")
    Path("a.yaml").write_text(f"base: {json.dumps(BASE)}\nvariants: {{a: {{}}}}\n")
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").touch()
    with pytest.raises(ValueError, match="--name a: runs/a holds a training; give the ablation another name"):
        ablate.main(ablate.AblateConfig("a.yaml"))
    Path("runs/a/plan.json").touch()
    with pytest.raises(FileExistsError, match="runs/a holds an ablation; give another --name"):
        train.main(parse_mapping(ExperimentConfig, {**TINY, "name": "a", "log": {"trackers": []}}))


def test_a_stop_while_an_ablation_prepares_is_one_line(monkeypatch, capsys):
    ablate = script("scripts/ablate.py")
    Path("a.yaml").write_text(f"base: {json.dumps(BASE)}\nvariants: {{a: {{}}}}\n")
    monkeypatch.setattr(ablate, "run", lambda *given: signal.raise_signal(signal.SIGINT))
    assert ablate.main(ablate.AblateConfig("a.yaml")) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


def test_an_estimate_has_all_that_a_run_does():
    settings = {"log.validate_every": 2, "log.sample_every": 2, "log.evaluate_every": 4, "log.num_validation": 5}
    ablation = AblationConfig(base=BASE, variants={"a": settings}, scoring=ScoringConfig(trials=2))
    where = (expand(ablation, "t"), Path("runs/t"), open_accelerator("fp32"))
    (planned,) = make_plan(ablation, *where, timed=False, any_code=False, start=100.0)
    planned = replace(planned, speed=Speed(training=16.0, calls=10.0, decoding=5.0))
    image = 2 * 3 / 10 + 1 / 5  # guided, three steps
    grids, scored, pictures = 3 * 40 * image, 12 * image, 8 * 8 * image
    assert planned.seconds == pytest.approx(300 + 4 * 8 / 16 + 2 * 5 / 10 + grids + 3 * scored + pictures)


def test_results_of_other_code_count_where_that_is_asked_for():
    ablation, (planned,) = plan_of({"a": {}})
    older = {name: f"{key.partition('-')[0]}-older" for name, key in planned.keys.items()}
    mark(planned.run.folder, began=older["train"], **older)
    assert not planned.done
    again = partial(make_plan, ablation, [planned.run], Path("runs/t"), open_accelerator("fp32"), timed=False)
    (accepted,) = again(any_code=True)
    assert accepted.done == {"train", "score", "draw"}
    assert accepted.state == "done"


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

    def command(stage, planned, ablation):
        return [str(tmp_path / "script.py"), stage, str(planned.run.folder)]

    for stage in stages.STAGES:
        monkeypatch.setitem(stages.STAGES, stage, partial(command, stage))


def calls():
    return Path("calls.txt").read_text().splitlines() if Path("calls.txt").exists() else []


def execute(ablation, plan, deadline=None, workers=1):
    runner = Runner(ablation, deadline, workers=workers)
    outcomes = EXECUTORS["local"](jobs_of(plan), runner, ClusterConfig(), Path("jobs"))
    return {outcome.run.partition(",")[0]: (outcome.status, outcome.why) for outcome in outcomes}


def test_a_failed_variant_leaves_the_others_alone_and_is_tried_again(scripted):
    found = execute(*plan_of({"a": {}, "bad": {"optim.lr": 5e-4}, "c": {"optim.lr": 6e-4}}))
    assert found["a"] == found["c"] == ("done", "")
    assert found["bad"] == ("failed", "train: train.py: error: no such luck")
    assert calls() == ["train a", "score a", "draw a", "train bad", "train c", "score c", "draw c"]
    found = execute(*plan_of({"a": {}, "bad": {"optim.lr": 5e-4}, "c": {"optim.lr": 6e-4}}))
    assert calls()[7:] == ["train bad"]
    assert found["a"] == ("done", "before")


@pytest.fixture
def cores():
    """All of the machine's, in place of the one that a worker of pytest keeps to."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, own)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_workers_run_side_by_side_and_share_the_cores(scripted, cores):
    found = execute(*plan_of({"pair1": {}, "pair2": {"optim.lr": 6e-4}}), workers=2)
    assert found == {"pair1": ("done", ""), "pair2": ("done", "")}
    half = len(cores) // 2
    found = {Path(name).read_text() for name in ("pair1", "pair2")}
    assert found == {str(cores[:half]), str(cores[half : 2 * half])}
    with pytest.raises(ValueError, match="--workers 999: there are"):
        execute(*plan_of({"c": {"optim.lr": 7e-4}}), workers=999)


def test_variants_that_share_a_training_are_scored_from_it(scripted):
    ablation, plan = plan_of({"a": {}, "b": {"sampling.num_steps": 2}})
    assert {status for status, _ in execute(ablation, plan).values()} == {"done"}
    assert calls() == ["train a", "score a", "draw a", "score b", "draw b"]
    _, again = plan_of({"a": {}, "b": {"sampling.num_steps": 2}})
    assert [planned.state for planned in again] == ["done", "done"]


def test_another_configuration_of_one_name_trains_anew_and_keeps_the_old(scripted):
    execute(*plan_of({"a": {}}))
    (Path("runs/t/a/seed0") / "checkpoints").mkdir()
    ablation, plan = plan_of({"a": {"optim.lr": 5e-4}})
    assert plan[0].state == "of other optim.lr"
    with pytest.raises(ValueError, match=r"trained before with other runs/t/a/seed0: optim\.lr: --redo true keeps"):
        refuse_changed(plan)
    execute(ablation, plan)
    assert calls() == ["train a", "score a", "draw a"] * 2
    (kept,) = Path("runs/t/a").glob("seed0.before-*")
    assert (kept / "checkpoints").is_dir()
    assert not Path("runs/t/a/seed0/checkpoints").exists()


def trained(planned, *, step=4, **changes):
    """What a training leaves of it, as far as a plan looks."""
    weights = planned.run.folder / "checkpoints" / f"{step:08d}" / WEIGHTS
    weights.parent.mkdir(parents=True)
    config = parse_mapping(ExperimentConfig, merged(planned.run.config.to_dict(), changes))
    metadata = metadata_of(config, planned.spec, list(planned.classes), step, planned.identity)
    save_tensors({"x": torch.zeros(1)}, weights, metadata)


def test_a_training_of_what_lies_there_no_more_is_none_of_the_plans(scripted):
    variants = {"a": {}, "b": {"sampling.num_steps": 2}}
    ablation, plan = plan_of(variants)
    execute(ablation, plan)
    trained(plan[0])
    assert [planned.state for planned in plan] == ["done", "done"]
    identity = {**plan[0].identity, "train": {**plan[0].identity["train"], "source_hash": "of other images"}}
    plan = [replace(planned, identity=identity) for planned in plan]
    assert [planned.state for planned in plan] == ["of other content of --data.path"] * 2
    with pytest.raises(ValueError, match=r"a/seed0: content of --data\.path; runs/t/b/seed0: content of"):
        refuse_changed(plan)
    execute(ablation, plan)
    assert calls() == ["train a", "score a", "draw a", "score b", "draw b"] * 2
    assert len([*Path("runs/t").glob("*/seed0.before-*/stages.json")]) == 2


def test_a_training_that_went_on_by_hand_is_none_of_the_plans(scripted):
    ablation, (planned,) = plan_of({"a": {}})
    execute(ablation, [planned])
    trained(planned, step=8, **{"train.num_steps": 8, "sampling.num_steps": 2, "log.every": 7})
    assert planned.state == "of other train.num_steps"


def test_another_order_of_the_variants_leaves_their_training_where_it_is(scripted):
    execute(*plan_of({"a": {}, "b": {"sampling.num_steps": 2}}))
    ablation, plan = plan_of({"b": {"sampling.num_steps": 2}, "a": {}}, scoring=ScoringConfig(baselines=False))
    assert execute(ablation, plan) == {"a": ("done", ""), "b": ("done", "before")}
    assert calls()[5:] == ["score a"]  # without the baselines now
    variants = {"b": {"sampling.num_steps": 2}}  # without the one that has trained
    ablation, plan = plan_of(variants, scoring=ScoringConfig(baselines=False))
    assert execute(ablation, plan)["b"] == ("done", "")
    assert calls()[6:] == ["train b", "score b", "draw b"]


def test_code_that_changes_after_the_plan_makes_no_result_of_it(scripted):
    ablation, plan = plan_of({"a": {}})
    (outcome,) = Runner(ablation, code=dict.fromkeys(stages.STAGES, "older"))(plan)
    assert (outcome.status, outcome.why.partition(":")[0]) == ("failed", "train")
    assert calls() == []
    assert not done_stages(plan[0].run.folder)


def test_no_foreign_training_is_touched(scripted):
    Path("runs/t/a/seed0/checkpoints").mkdir(parents=True)
    assert execute(*plan_of({"a": {}}))["a"][1].endswith("holds a training that no ablation began; move it away")
    assert calls() == []


def test_a_stop_lets_the_training_save_and_the_rest_wait(scripted):
    def stop():
        while not Path("waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    found = execute(*plan_of({"slow": {}, "c": {"optim.lr": 6e-4}}))
    assert found == {"slow": ("stopped", "SIGTERM"), "c": ("stopped", "SIGTERM")}
    assert "train" not in done_stages(Path("runs/t/slow/seed0"))


def test_nothing_starts_when_the_time_is_over(scripted):
    assert execute(*plan_of({"a": {}}), deadline=time.time() - 1)["a"] == ("stopped", "the time is over")
    assert calls() == []


def test_submitit_does_the_same_in_a_process_of_its_own():
    ablation, plan = plan_of({"a": {}})
    mark(plan[0].run.folder, began=plan[0].keys["train"], **plan[0].keys)
    outcomes = EXECUTORS["submitit"](jobs_of(plan), Runner(ablation), ClusterConfig(gpus=0), Path("jobs"))
    assert [(outcome.status, outcome.why) for outcome in outcomes] == [("done", "before")]


def test_a_training_that_a_launcher_says_has_failed_may_have_stopped(monkeypatch):
    def launched(runner, command, output, lock, environment):
        (output.parent / "stopped").write_text("SIGUSR1: stopped after 3 of 4 steps")
        return 1

    monkeypatch.setattr(Runner, "_process", launched)
    ablation, plan = plan_of({"a": {}})
    assert [outcome.status for outcome in Runner(ablation)(plan)] == ["stopped"]


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

    asked = {"sampling": {"sampler": "ddim", "eta": 0.5, "guidance_interval": [0.2, 5.0], "clip": math.inf}}
    ablation, (planned, unguided) = plan_of({"a": asked, "b": {"train.label_dropout": 0.0}})
    scoring = parse(EvaluateConfig, stages.score(planned, ablation)[1:])
    assert (scoring.sampling, scoring.num_samples) == (asdict(planned.run.config.sampling), 12)  # null too
    assert (scoring.baselines, scoring.per_class, scoring.metrics) == (True, True, ["fid", "precision"])
    drawing = parse(SampleConfig, stages.draw(planned, ablation)[1:])
    assert drawing.classes == list(planned.classes[:8])
    assert drawing.output == "runs/t/a/seed0/pictures.npz"
    assert parse(SampleConfig, stages.draw(unguided, ablation)[1:]).sampling["guidance_scale"] == 1.0


# The whole of it.


def test_a_stopped_and_a_killed_ablation_go_on_and_report_their_runs_numbers(tmp_path):
    from metrics.torchscript import save_torchscript

    class MeanColors(torch.nn.Module):
        def forward(self, images: torch.Tensor):
            means = images.float().mean(dim=(2, 3)) / 255
            return means, torch.softmax(4 * means, dim=1)

    save_torchscript(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / "colors.pt")
    base = {**BASE, "train": {**TINY["train"], "num_steps": 20}, "autoencoder": "pixel"}  # seconds less a process
    base |= {"data": {**TINY["data"], "image_size": 16}, "model_args": {**TINY["model_args"], "patch_size": 4}}
    base["log"] = {**TINY["log"], "validate_every": 0, "checkpoint_every": 5, "trackers": []}
    text = {
        "base": base,
        "variants": {"XSwin": {}, "four steps": {"sampling.num_steps": 4}},  # of one training: seconds less again
        "pictures": {"num_per_class": 0},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(text))
    command = [sys.executable, str(ROOT / "scripts" / "ablate.py"), "two.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}

    folder = Path("runs/two/XSwin/seed0")

    def started(until):
        runner = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        while not (folder / until).exists() or not (folder / until).stat().st_size:
            assert runner.poll() is None
            time.sleep(0.02)
        return runner

    # Stopped by a signal to itself alone: its training saves and ends with it.
    runner = started("log.jsonl")
    training = psutil.Process(runner.pid).children(recursive=True)
    runner.send_signal(signal.SIGTERM)
    output, _ = runner.communicate()
    assert runner.returncode == 75
    assert "stopped: XSwin, seed 0: SIGTERM" in output
    assert training
    assert not psutil.wait_procs(training, timeout=120)[1]
    (saved,) = (folder / "checkpoints").glob("[0-9]*")

    # Killed, its training with it, after the next checkpoint.
    runner = started(f"checkpoints/{5 * (int(saved.name) // 5 + 1):08d}")
    children.kill(runner)
    runner.communicate()
    assert "train" not in done_stages(folder)
    assert not (folder / "checkpoints/00000020").exists()

    # Gone on with, from there.
    done = run("scripts/ablate.py", "two.yaml", cwd=tmp_path)
    assert re.search(r"XSwin, seed 0 +\| 0\.1\dM", done.stdout)
    assert re.search(r"at step (5|10|15) of 20 ", done.stdout)
    assert "report of 2 runs (0 to go)" in done.stdout
    losses = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in losses] == list(range(1, 21))
    for variant in ("XSwin", "four-steps"):
        folder = Path("runs/two") / variant / "seed0"
        record = json.loads((folder / "scores.json").read_text())
        value = record["rows"][0]["trials"][0]["frechet_distance[colors]"]["value"]
        for name in ("results.csv", "report.md", "table.tex", "report.html"):
            shown = str(value) if name == "results.csv" else f"{value:.4f}"
            assert shown in Path("runs/two", name).read_text(), name
