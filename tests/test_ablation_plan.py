"""The plan of an ablation: its YAML, equal cost, and what is refused before anything starts."""

import json
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from ablations import BASE
from processes import ROOT, TINY, script

from ablation.costs import Speed, resize_to_cost, with_width
from ablation.plan import make_plan, plan_to_dict
from ablation.progress import format_plan, read_progress, remaining_seconds
from ablation.runner import group_into_jobs
from ablation.study import (
    AblationConfig,
    MatchConfig,
    PicturesConfig,
    ScoringConfig,
    deep_merge,
    expand_runs,
    read_ablation,
)
from experiment.cli import parse_mapping
from experiment.config import ExperimentConfig
from machine.accelerator import open_accelerator
from metrics.cost import Cost, cost
from models import ModelSpec

pytestmark = pytest.mark.usefixtures("here")

SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_ablation_builds(path, monkeypatch):
    shapes = {"data.path": "shapes", "data.exclude_classes": [], "autoencoder": "embedded"}
    ablation = read_ablation(path, shapes)
    grid = {key: values for key, values in ablation.grid.items() if key != "data.train_fraction"}  # shapes take none
    ablation = replace(ablation, grid=grid)
    runs = expand_runs(ablation, path.stem)
    assert len(runs) >= 3
    labelled = runs[0].config.data.use_labels
    assert len(ablation.pictures.classes) == 8 * labelled
    assert path.name in path.read_text().split("\ntitle:")[0]
    ablation = replace(ablation, match=None, pictures=replace(ablation.pictures, classes=["star"] * labelled))
    monkeypatch.setattr(
        "ablation.costs.count_cost", lambda spec: Cost(len([spec.build_on_meta()]), 1.0)
    )  # seconds each
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
    runs = expand_runs(ablation, "a")
    ablation = replace(ablation, match=None, pictures=replace(ablation.pictures, classes=["star"]))
    plan = make_plan(ablation, runs, Path("runs/a"), open_accelerator("fp32"), timed=False, any_code=False)
    names = list(dict.fromkeys(planned.run.variant for planned in plan))
    rates = [f"{skip} lr={lr}" for skip in ("localized", "none") for lr in (0.0001, 0.0004)]
    assert names == (rates if "optim.lr" in text else ["localized", "concat"])
    assert len(plan) == 3 * len(names)
    assert json.loads(Path("runs/a/plan.json").read_text())["ablation"]["baseline"] == names[0]


def test_the_variants_of_guidance_share_trainings():
    ablation = read_ablation(ROOT / "configs" / "ablations" / "guidance.yaml", {"data": {"path": "shapes"}})
    ablation = replace(ablation, pictures=replace(ablation.pictures, classes=[]))
    ablation = replace(ablation, set={**ablation.set, "data.exclude_classes": []})
    plan = make_plan(
        ablation, expand_runs(ablation, "g"), Path("runs/g"), open_accelerator("fp32"), timed=False, any_code=False
    )
    assert [len(job) for job in group_into_jobs(plan)] == [7, 1, 1]
    assert [planned.trains for planned in plan].count(True) == 3


def test_names_grids_and_seeds_make_runs():
    ablation = AblationConfig(
        base={**TINY, "model_args": {}},
        set={"train.num_steps": 7},
        grid={"model": ["XSwin", "DiT"], "optim.lr": [1e-3, 1e-4], "seed": [3, 4]},
    )
    runs = expand_runs(ablation, "grid")
    assert [run.variant for run in runs[::2]] == ["XSwin lr=0.001", "XSwin lr=0.0001", "DiT lr=0.001", "DiT lr=0.0001"]
    assert [run.config.train.seed for run in runs] == [3, 4] * 4
    assert {run.config.train.num_steps for run in runs} == {7}
    assert runs[5].folder == Path("runs/grid/DiT-lr=0.001/seed4")
    assert len({run.folder for run in runs}) == 8


def test_dotted_and_nested_settings_are_the_same():
    values = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert deep_merge(values, {"a.c.d": 5, "a.f": 6}) == deep_merge(values, {"a": {"c": {"d": 5}, "f": 6}})
    assert values == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def planned(path):
    ablation = read_ablation(path, {})
    runs = expand_runs(ablation, path.stem)
    return make_plan(ablation, runs, Path("runs/a"), open_accelerator("fp32"), timed=False, any_code=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: {a: {}, b: {}, a: {}}", "a stands twice"),
        ("variants: {a b: {}, a-b: {}}", "variants a b, seed 0 and a-b, seed 0 have the same name"),
        (
            "variants: {a: {model_arg.dim: 3}}",
            r"variant a: Option 'model_arg.dim' is not accepted; did you mean model_args\?",
        ),
        ("variants: {a: {optim.lr: fast}}", "variant a: .*optim.lr"),
        ("variants: {a: {}}\nmach: {by: flops}", r"Option .mach.by. is not accepted; did you mean match\?"),
        ("variants: {a: {model_args.window: 3}}", "variant a: --model_args.window: XSwin has no such argument"),
        ("variants: {a: {model_args.num_heads: [3, 4]}}", "variant a: num_heads=3 must divide the width 16"),
        ("variants: {a: {sampling.sampler: dppm}}", "variant a: --sampling.sampler dppm: unknown"),
        ("variants: {a: {}}\npictures: {classes: [strr]}", "variant a: --classes strr: no such class"),
        (
            "variants: {a: {evaluation.metrics: [fid]}}\nscoring: {memorisation: true}",
            "variant a: scoring.memorisation: it looks at images one by one; give --metrics one that does",
        ),
        ("variants: {a: {}}\nbaseline: b", "baseline b: no such variant; there are a"),
        ("variants: {a: {}, b: {}}\nclaims: {a wins: [a, c]}", "claims, a wins: no variant c; there are a, b"),
        ("variants: {a: {}, b: {}}\nclaims: {a wins: [a]}", "claims, a wins: name two variants, the one claimed"),
        ("variants: {}", "variants and grid are empty"),
        ("variants: {a: {train.seed: 1}, b: {}}", "variant a: train.seed: every variant has the same; .* grid: seed"),
        ("variants: {a: {}}\ngrid: {train.seed: [1, 2]}", "variant a seed=1: train.seed: every variant has the same"),
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
        found = resize_to_cost(spec, wanted, cost_of, 0.05)
        assert abs(cost_of(found) / wanted - 1) <= 0.05
        assert found.args.get("depth") == spec.args.get("depth")
        assert found.args.get("depths") == spec.args.get("depths")
        assert resize_to_cost(found, wanted, cost_of, 0.05) == found


def test_heads_stay_legal_and_alike():
    for width in range(100, 400, 4):
        choice = with_width(small("DiT"), width)
        if choice is not None:
            heads = choice.spec.args["num_heads"]
            assert width % heads == 0
            assert 32 <= width / heads <= 128  # 64, halved or doubled at the utmost
    assert with_width(small("DiT"), 768).spec.args == {"dim": 768, "num_heads": 12}
    assert with_width(small("XSwin"), 96).spec.args == {"dim": 96, "num_heads": [3, 6]}


def test_what_cannot_be_matched_is_told():
    with pytest.raises(ValueError, match=r"match: no width of DiT comes within 0\.0001 of the cost; the nearest, dim="):
        resize_to_cost(small("DiT", depth=2), 1.1 * gflops(small("DiT", depth=2)), gflops, 0.0001)
    with pytest.raises(ValueError, match="match: UNet-Mini has no width"):
        resize_to_cost(small("UNet-Mini"), 1.0, gflops, 0.03)


def test_a_plan_is_matched_timed_and_remembered():
    grid = {"optim.lr": [1e-3]}  # which makes other names
    variants = {"XSwin": {"model_args": TINY["model_args"]}, "DiT": {"model": "DiT", "model_args.depth": 4}}
    ablation = AblationConfig(
        base={**BASE, "model_args": {}}, variants=variants, match=MatchConfig("XSwin", "params", 0.2), grid=grid
    )
    where = (expand_runs(ablation, "m"), Path("runs/m"), open_accelerator("fp32"))
    plan = partial(make_plan, ablation, *where, timed=True, any_code=False)
    first = plan()
    assert first[1].spec.args["dim"] < 100
    assert 0.8 < first[1].cost.parameters / first[0].cost.parameters < 1.2
    assert first[0].speed.training > 0
    before = Path("runs/m/measured.json").read_text()
    assert [planned.speed for planned in plan()] == [planned.speed for planned in first]
    assert Path("runs/m/measured.json").read_text() == before
    assert "about" in format_plan(first)


def plan_of(variants, match, grid=None):
    ablation = AblationConfig(base={**BASE, "model_args": {}}, variants=variants, match=match, grid=grid or {})
    where = (expand_runs(ablation, "m"), Path("runs/m"), open_accelerator("fp32"))
    return make_plan(ablation, *where, timed=False, any_code=False)


def test_each_value_of_a_grid_is_matched_by_itself(monkeypatch):
    def count(spec):
        return Cost(1, spec.input_size[0] ** 2 * spec.args["dim"] ** 2 * spec.args.get("depth", 6) / 1e9)

    monkeypatch.setattr("ablation.costs.count_cost", count)
    variants = {"XSwin": {"model_args": {**TINY["model_args"], "dim": 96}}}
    variants |= {"DiT": {"model": "DiT", "model_args": {"dim": 96, "num_heads": 3, "depth": 4}}}
    grid = {"data.image_size": [32, 64]}
    plan = plan_of(variants, MatchConfig("XSwin", "flops", 0.1), grid)
    costs = {planned.run.variant: planned.cost.gflops for planned in plan}
    assert costs["XSwin image_size=64"] == 4 * costs["XSwin image_size=32"]
    for size in grid["data.image_size"]:
        assert costs[f"DiT image_size={size}"] == pytest.approx(costs[f"XSwin image_size={size}"], rel=0.1)
    to_one = plan_of(variants, MatchConfig("XSwin image_size=32", "flops", 0.1), grid)
    assert [planned.cost.gflops for planned in to_one] == [pytest.approx(costs["XSwin image_size=32"], rel=0.1)] * 4


def test_a_variant_whose_steps_take_longer_is_narrowed_to_equal_time(monkeypatch):
    def speed(measurements, spec, config, codec):
        calls = {"flow": 1, "meanflow": 3}[config.diffusion.kind]
        return Speed(1e6 / calls / spec.args["dim"] ** 2, 1.0, 1.0)

    monkeypatch.setattr("ablation.plan.Measurements.speed", speed)
    dit = {"model": "DiT", "model_args": {"dim": 384, "depth": 2, "num_heads": 6}}
    kinds = {kind: {**dit, "diffusion.kind": kind} for kind in ("flow", "meanflow")}
    flow, meanflow = plan_of(kinds, MatchConfig("flow", "time", 0.1))
    assert flow.spec.args["dim"] == 384
    assert meanflow.spec.args["dim"] == pytest.approx(384 / 3**0.5, rel=0.1)


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
    assert capsys.readouterr().err == "stopped; repeat the command to continue\n"


def test_an_estimate_has_all_that_a_run_does():
    settings = {"log.validate_every": 2, "log.sample_every": 2, "log.evaluate_every": 4, "log.num_validation": 5}
    ablation = AblationConfig(base=BASE, variants={"a": settings}, scoring=ScoringConfig(trials=2))
    where = (expand_runs(ablation, "t"), Path("runs/t"), open_accelerator("fp32"))
    (planned,) = make_plan(ablation, *where, timed=False, any_code=False, start=100.0)
    planned = replace(planned, speed=Speed(training=16.0, calls=10.0, decoding=5.0))
    image = 2 * 3 / 10 + 1 / 5  # guided, three steps
    grids, scored, pictures = 3 * 40 * image, 12 * image, 8 * 8 * image
    assert remaining_seconds(planned, read_progress(planned)) == pytest.approx(
        300 + 4 * 8 / 16 + 2 * 5 / 10 + grids + 3 * scored + pictures
    )


def test_held_out_losses_compare_on_the_same_images_alone(monkeypatch):
    monkeypatch.setattr("ablation.costs.count_cost", lambda spec: Cost(1, 1.0))
    unlabelled, fewer = {"data.use_labels": False, "sampling.guidance_scale": 1.0}, {"log.num_validation": 5}
    variants = {"all": {}, "more than all": {"log.num_validation": 500}, "all, unlabelled": unlabelled, "fewer": fewer}
    variants |= {"fewer, of no class": {**unlabelled, **fewer}, "others": {"data.num_images": 60}}
    ablation = AblationConfig(base=TINY, variants=variants, pictures=PicturesConfig(num_per_class=0))
    where = (expand_runs(ablation, "x"), Path("runs/x"), open_accelerator("fp32"))
    kinds = [run["loss_of"] for run in plan_to_dict(make_plan(ablation, *where, timed=False, any_code=False))["runs"]]
    assert [kinds.index(kind) for kind in kinds] == [0, 0, 0, 3, 4, 5]


def test_baselines_are_scored_once_for_each_autoencoder():
    grid = {"autoencoder": ["embedded", "pixel"], "seed": [0, 1]}
    ablation = AblationConfig(base=TINY, variants={"a": {}, "b": {"sampling.num_steps": 2}}, grid=grid)
    runs, accelerator = expand_runs(ablation, "x"), open_accelerator("fp32")
    plan = make_plan(ablation, runs, Path("runs/x"), accelerator, timed=False, any_code=False)
    first = [planned.run for planned in plan if planned.scores_baselines]
    assert [(run.point["variant"], run.config.autoencoder, run.seed) for run in first] == [
        ("a", "embedded", 0),
        ("a", "pixel", 0),
    ]
