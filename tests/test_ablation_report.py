"""The report of an ablation: its statistics, its tables and its figures."""

import csv
import io
import json
import math
import re
from dataclasses import asdict, replace
from statistics import fmean, stdev

import numpy as np
import pytest
from finished_ablation import SEEDS, TRIALS, VARIANTS, finished_ablation, score
from PIL import Image
from processes import run
from scipy import stats

from ablation.figures import _panels_by_setting
from ablation.pictures import Pictures, read_pictures, save_side_by_side, side_by_side
from ablation.report import format_claims, format_facts, format_findings, format_notes
from ablation.results import VariantResult, holm, mean_and_interval, read_results
from ablation.study import AblationConfig
from ablation.tables import as_markdown, as_tex, check_columns, cross_tabulate, header_cells, variant_cells
from evaluation.plots import color, legend_columns, make_figure, marker
from evaluation.table import markdown, terminal

TITLES = ["Fréchet ↓", "precision ↑", "held-out loss ↓"]


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    return finished_ablation(tmp_path_factory.mktemp("work"))


def test_each_autoencoder_has_its_own_ceiling(ablation):
    """The first run provides floor and ceiling for all runs that are decoded and scored alike."""
    results = read_results(ablation)
    assert list(results.references) == ["training images (floor)", "reconstructions (ceiling)"]
    last = results.variants[-1].runs[-1].record
    last["samples"]["autoencoder"] = {"sha256": "another"}
    assert list(results.references) == ["training images (floor)", "reconstructions (ceiling of DiT)"]
    name = results.variants[-1].name
    last["rows"].append({"name": "reconstructions", "scores": {}, "trials": []})
    ceilings = ["reconstructions (ceiling of DiT)", f"reconstructions (ceiling of {name})"]
    assert list(results.references) == ["training images (floor)", *ceilings]
    last["samples"]["labels"] = "random"
    floor, *others = results.references
    assert (floor, others) == ("training images (floor of DiT)", ceilings)


def values_of(ablation, variant, metric):
    """Values of a metric in all trials by seed, read from the runs' own JSON."""
    found = {}
    for one in json.loads((ablation / "plan.json").read_text())["runs"]:
        path = ablation / one["folder"] / "scores.json"
        if one["variant"] == variant and path.is_file():
            trials = json.loads(path.read_text())["rows"][0]["trials"]
            found[one["seed"]] = [trial[metric]["value"] for trial in trials]
    return found


def test_the_table_is_of_the_runs_own_numbers(ablation):
    results = read_results(ablation)
    metric = "frechet_distance[colors]"
    assert header_cells(results) == ["model", "parameters", "GFLOPs", "img/s", "GB", *TITLES]
    baseline = {seed: fmean(values) for seed, values in values_of(ablation, "DiT", metric).items()}
    uncorrected = {}
    for variant, row in zip(VARIANTS, variant_cells(results), strict=True):
        by_seed = values_of(ablation, variant, metric)
        values = [value for trials in by_seed.values() for value in trials]
        assert row[5].value == pytest.approx(fmean(values))
        assert row[5].text == f"{fmean(values):.2f} ± {stdev(values):.2f}"
        seeds = sorted(by_seed)  # the baseline has all of them
        pairs = [fmean(by_seed[seed]) for seed in seeds], [baseline[seed] for seed in seeds]
        uncorrected[variant] = stats.ttest_rel(*pairs).pvalue
    names = list(VARIANTS)[1:]
    shown = [row[5].p for row in variant_cells(results)]
    assert shown == [None, *(pytest.approx(p, abs=1e-5) for p in holm([uncorrected[name] for name in names]))]
    assert [row[3].text for row in variant_cells(results)] == ["50.0", "51.0", "52.0", "53.0"]


def test_an_unfinished_run_is_named_and_left_out(ablation):
    assert read_results(ablation).missing == ["UViT, seed 2"]
    for name in ("report.md", "report.html"):
        assert "Not finished, and not in this report: UViT, seed 2." in (ablation / name).read_text()


def test_the_csv_has_every_trial_in_full(ablation):
    rows = list(csv.DictReader(io.StringIO((ablation / "results.csv").read_text())))
    assert len(rows) == (len(VARIANTS) * len(SEEDS) - 1) * TRIALS
    for row in rows:
        trials = values_of(ablation, row["variant"], "precision")[int(row["seed"])]
        assert float(row["precision"]) == trials[int(row["trial"])]


def test_the_tex_table_is_whole(ablation):
    tex = as_tex(read_results(ablation))
    rows = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 2 + len(VARIANTS)
    assert {line.count("&") for line in rows} == {7}
    assert tex.count("{") == tex.count("}")
    assert tex.count("$") % 2 == 0
    assert r"\mathbf{" in tex
    assert not re.search(r"(?<!\\)[_%#]", tex)


def test_the_tex_table_has_the_columns_asked_for(ablation):
    results = read_results(ablation)
    assert as_tex(results, ["GFLOPs", "fid"]).splitlines()[2] == r"model & GFLOPs & Fréchet $\downarrow$ \\"
    no_memory = replace(
        results,
        variants=[
            replace(variant, runs=[replace(run, events=[]) for run in variant.runs]) for variant in results.variants
        ],
    )
    assert as_tex(no_memory).splitlines()[2].startswith("model & parameters & GFLOPs & Fréchet")
    with pytest.raises(ValueError, match="columns FID: choose from parameters, GFLOPs, img/s, GB, fid"):
        check_columns(["FID"])


def test_what_is_not_as_usual_or_does_not_compare_is_said(ablation):
    results, of_losses = read_results(ablation), "Losses of different objectives"
    assert header_cells(results)[-1] == "held-out loss ↓"
    usual = "ddim, 9 steps, guidance 2.0"
    assert format_facts(results)["sampling"] == usual
    assert of_losses not in "".join(format_notes(results))
    results.runs[-1].record["samples"]["guidance_checkpoint"] = "runs/worse"
    results.runs[-1].plan["loss_of"] = {"autoencoder": "pixel"}
    assert format_facts(results)["sampling"] == f"{usual}, guidance_checkpoint None, runs/worse"
    assert of_losses in "".join(format_notes(results))
    assert "left out" not in "".join(format_notes(results))
    last = read_results(ablation).variants[-1].runs[-1]
    last.record["rows"][0]["trials"][-1]["precision"] = score(None)  # beside trials and seeds that have one
    results = replace(results, variants=[*results.variants[:-1], VariantResult("XSwin", [*results.runs[-2:-1], last])])
    assert "are left out of the means of XSwin." in "".join(format_notes(results))


def test_a_held_out_loss_that_is_no_number_is_no_score(ablation):
    """In a test it would upset the order of all p-values."""
    run = replace(read_results(ablation).runs[0], events=[{"step": 1, "validation_loss": math.nan}])
    assert run.trials[0]["validation_loss"] is None


def test_steps_that_somebody_trained_a_run_beyond_its_plan_are_not_in_the_report(ablation):
    log = ablation / "0" / "seed0" / "log.jsonl"
    before, planned = log.read_text(), read_results(ablation)
    log.write_text(f"{before}\n" + json.dumps({"step": 300, "validation_loss": 0.01, "images_per_second": 1e6}))
    results = read_results(ablation)
    log.write_text(before)
    assert results == planned
    assert variant_cells(results) == variant_cells(planned)


def test_bold_is_what_is_decidedly_better_than_every_other(ablation):
    results = read_results(ablation)
    metric, (first, *_) = "frechet_distance[colors]", results.variants

    def moved(name, gains):
        """The first variant's scores, improved by a gain for each seed."""
        runs = []
        for one, gain in zip(first.runs, gains, strict=True):
            trials = [{metric: score(trial[metric] - gain)} for trial in one.trials]
            runs.append(replace(one, record={**one.record, "rows": [{"name": name, "scores": {}, "trials": trials}]}))
        return replace(first, name=name, runs=runs)

    def bold(*variants):
        return [one.name for one in variants if replace(results, variants=list(variants)).is_best(one, metric)]

    better, alike = moved("better", [9.0, 9.1, 9.2]), moved("alike", [8.0, 10.5, 9.0])
    assert bold(first, better) == ["better"]
    assert bold(first, better, alike) == []
    assert bold(better) == []


def test_the_report_says_what_is_decided(ablation):
    found = format_findings(read_results(ablation))
    assert list(found) == TITLES[:2]  # the losses are all equal, which tests nothing
    assert [len(sentences) for sentences in found.values()] == [3, 3]
    sentence = found["Fréchet ↓"][-1]
    assert sentence.startswith("XSwin with a long name is better than DiT by ")
    for name in ("report.md", "report.html"):
        assert sentence in (ablation / name).read_text()


def test_each_claim_is_answered_by_the_pair_that_it_names(ablation):
    """Of the made-up scores, XSwin's are 9 better than DiT's, and USwin's 1 better than UViT's, with a noise of 0.6."""
    results, metric = read_results(ablation), "frechet_distance[colors]"
    found = format_claims(results)
    assert list(found) == TITLES
    untested = "XSwin with a long name and DiT have no two seeds in common whose differences vary"
    assert found["held-out loss ↓"][0] == f"skips help: undecided. {untested}"  # the made-up losses are all equal
    yes, no, undecided = found["Fréchet ↓"]
    assert yes.startswith("skips help: yes. XSwin with a long name is better than DiT by ")
    assert no.startswith("tokens win: no. DiT is worse than USwin by ")
    assert undecided.startswith("two are alike: undecided. UViT against USwin is undecided: ")
    scores = {name: values_of(ablation, name, metric) for name in ("UViT", "USwin")}
    pairs = [[fmean(by_seed[seed]) for seed in scores["UViT"]] for by_seed in scores.values()]
    last = results.differences_of_claims(metric)["two are alike"]
    assert last.num_seeds == 2
    assert last.p == pytest.approx(stats.ttest_rel(*pairs).pvalue)  # the largest of three p-values is not corrected
    for name in ("report.md", "report.html"):
        text = (ablation / name).read_text()
        assert text.index("What is claimed") < text.index(yes) < text.index("What is decided")


PARTS = {"base": "b.yaml", "variants": {"DiT": {}, "UViT": {"model": "UViT"}}, "set": {"data.path": "a.zip"}}


def test_a_report_is_of_the_baseline_that_the_edited_yaml_names(ablation):
    """With --only report the baseline was that of the last plan; other changes have to be planned."""
    path = ablation / "plan.json"
    plan = json.loads(path.read_text())
    planned = AblationConfig(**{**PARTS, "set": {**PARTS["set"], "train.num_steps": 9}})
    other = path.with_name("edited") / path.name
    other.parent.mkdir()
    other.write_text(json.dumps({**plan, "ablation": asdict(planned)}))
    claims = {"tokens win": ["UViT", "DiT"]}
    results = read_results(other.parent, AblationConfig(**PARTS, baseline="UViT", title="edited", claims=claims))
    assert (results.baseline.name, results.plan["ablation"]["title"], results.claims) == ("UViT", "edited", claims)
    assert read_results(other.parent, AblationConfig(**PARTS)).baseline.name == "DiT"
    edits = {"variants": {"UViT": {"model": "UViT"}, "DiT": {}}, "set": {"data.path": "b.zip"}, "grid": {"seed": [1]}}
    for part, value in edits.items():
        with pytest.raises(ValueError, match=f"^{part}: the YAML was edited"):
            read_results(other.parent, AblationConfig(**{**PARTS, part: value}))


def test_facts_that_differ_among_runs_are_all_told(ablation):
    """The first run's version and seed stood for all."""
    results = read_results(ablation)
    results.runs[-1].record["versions"] = {"torch": "3"}
    results.runs[-1].record["samples"]["seed"] = 5
    facts = format_facts(results)
    assert facts["versions"] == "torch 2, 3"
    assert facts["samples"].endswith("seed 0, 5 and on")


def test_a_tie_has_no_best(ablation):
    results = read_results(ablation)
    first, *_ = results.variants
    twins = replace(results, variants=[first, replace(first, name="twin")])
    assert not any(cell.best for row in variant_cells(twins) for cell in row)


def test_two_factors_have_a_table_of_one_against_the_other(ablation):
    results = read_results(ablation)
    assert cross_tabulate(results) == []
    points = [{"model": model, "optim.lr": lr} for model in ("DiT", "UViT") for lr in (1, 2)]
    variants = [
        replace(variant, runs=[replace(run, plan={**run.plan, "point": point}) for run in variant.runs])
        for variant, point in zip(results.variants, points, strict=True)
    ]
    (title, rows), *_ = cross_tabulate(replace(results, variants=variants))
    shown = [row[5].text for row in variant_cells(results)]
    assert title == "Fréchet ↓"
    assert rows == [["model, optim.lr", "1", "2"], ["DiT", *shown[:2]], ["UViT", *shown[2:]]]
    assert "-" in cross_tabulate(replace(results, variants=variants[:3]))[0][1][2]  # one is not finished


def test_a_number_in_the_grid_is_drawn_with_intervals_over_seeds(ablation):
    results = read_results(ablation)
    assert not _panels_by_setting(results)
    points = [{"variant": "DiT", "data.train_fraction": fraction} for fraction in (0.05, 0.5, 1.0)]
    variants = [
        replace(variant, runs=[replace(run, plan={**run.plan, "point": point}) for run in variant.runs])
        for variant, point in zip(results.variants, points, strict=False)
    ]
    gridded = replace(results, variants=variants)
    panels = _panels_by_setting(gridded)
    assert [*panels] == ["fid-by-setting", "precision-by-setting", "validation_loss-by-setting"]
    axes = make_figure(lambda axes: panels["fid-by-setting"][0](gridded, axes)).axes[0]
    (line, _, (bars,)), *others = axes.containers
    assert not others
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "data.train_fraction")
    drawn = dict(zip(line.get_xdata(), zip(line.get_ydata(), bars.get_segments(), strict=True), strict=True))
    for variant, point in zip(results.variants, points, strict=False):
        values = [*variant.by_seed("frechet_distance[colors]").values()]
        mean, segment = drawn[point["data.train_fraction"]]
        test = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert [mean, *segment[:, 1]] == pytest.approx([fmean(values), test.low, test.high])
    assert mean_and_interval([2.0]) == pytest.approx((2.0, math.nan), nan_ok=True)  # one seed draws no bar


def test_memorisation_is_a_column_of_the_table(ablation):
    results = read_results(ablation)
    run = results.runs[0]
    share = {"closer_to_training_than_held_out": 0.61}
    variant = replace(results.variants[0], runs=[replace(run, record={**run.record, "memorisation": share})])
    with_share = replace(results, variants=[variant])
    assert header_cells(with_share)[-1].startswith("closer to training images")
    assert variant_cells(with_share)[0][-1].text.startswith("0.61")


NAMES = r"""a|b \ 50% {x} ~ ^ & # $ <script> `c` *d* _e_ [f](g) "h" """


def test_names_that_users_choose_are_text_in_every_table(ablation):
    results = read_results(ablation)
    named = replace(results, variants=[replace(results.variants[0], name=NAMES), *results.variants[1:]])
    row = next(line for line in as_tex(named).splitlines() if line.startswith("a"))
    assert row.startswith(
        r"a\textbar{}b \textbackslash{} 50\% \{x\} \textasciitilde{} \textasciicircum{} \& \# \$ "
        r"\textless{}script\textgreater{} `c` *d* \_e\_ [f](g) ''h'' &"
    )
    row = next(line for line in as_markdown(named).splitlines() if line.startswith("| a"))
    assert row.startswith(r"| a\|b \\ 50% {x} \~ ^ \& \# $ \<script\> \`c\` \*d\* \_e\_ \[f\](g)" + ' "h" |')
    assert len(re.findall(r"(?<!\\)\|", row)) == len(header_cells(results)) + 1
    assert markdown([["a"], ["b\nc"]]).count("\n") == terminal([["a"], ["b\nc"]]).count("\n") == 2


def test_floor_and_ceiling_stand_above_every_model(ablation):
    names = ["training images (floor)", "reconstructions (ceiling)", *VARIANTS]
    starts = {"report.md": "| {} ", "table.tex": "\n{} &", "report.html": "<td>{}</td>"}
    for file, start in starts.items():
        text = (ablation / file).read_text()
        places = [text.index(start.format(name)) for name in names]
        assert places == sorted(places), file
    assert re.search(r"reconstructions \(ceiling\) +(\| +)*\| - +\| 0.7000", (ablation / "report.md").read_text())
    tex = (ablation / "table.tex").read_text()
    assert tex.index(names[1]) < tex.rindex(r"\midrule") < tex.index("\nDiT &")


def test_pictures_of_another_plan_are_not_shown_under_this_ones_names(ablation):
    results = read_results(ablation)
    assert len(read_pictures(results)) == len(results.variants)
    results.variants[0].plan["keys"]["draw"] = "of other classes"
    assert [one.variant for one in read_pictures(results)] == [one.name for one in results.variants[1:]]


def test_pictures_of_models_are_compared_only_for_shared_classes():
    """Variants may be trained on other images, or on images without classes."""
    images = np.stack([np.full((4, 8, 8, 3), number, np.uint8) for number in range(2)])
    one, other = Pictures("one", ["cat", "dog"], images), Pictures("other", ["ant", "cat"], images)
    assert [(name, [int(block.max()) for block in of]) for name, of in side_by_side([one, other])] == [("cat", [0, 1])]
    assert side_by_side([one, Pictures("unlabelled", [""], images[:1])]) == side_by_side([]) == []


def test_figures_are_left_for_papers(ablation):
    names = {path.name for path in (ablation / "figures").iterdir()}
    panels = {"loss", "validation", "score-by-compute", "score-by-parameters", "per-class"}
    assert names >= {f"{panel}.{kind}" for panel in panels for kind in ("pdf", "png")}
    assert "models.png" in names


def test_many_variants_can_be_told_apart_and_named_within_the_figure():
    assert len({(color(number), marker(number)) for number in range(40)}) == 40
    assert legend_columns(["DiT", "UViT", "USwin", "XSwin"]) == 4
    assert legend_columns(["none coarse=diffusion upsampler=pixelshuffle"] * 18) == 1


@pytest.mark.parametrize(("name", "rows"), [("DiT", 2), ("no skips, windows of eight", 3)])
def test_models_with_long_names_are_rows_and_others_columns(tmp_path, name, rows):
    images = np.zeros((2, 4, 16, 16, 3), np.uint8)
    save_side_by_side([Pictures(name, ["cat", "dog"], images)] * 3, tmp_path / "models.png")
    with Image.open(tmp_path / "models.png") as picture:
        assert picture.height == 36 + 80 * rows


def test_scores_against_different_references_are_told_apart(ablation):
    results = read_results(ablation)
    assert not any("different references" in note for note in format_notes(results))
    results.runs[1].record["reference"]["source_hash"] = "of other images"
    assert any("against 2 different references" in note for note in format_notes(results))
    assert not any("different samples" in note for note in format_notes(results))
    results.runs[1].record["num_samples"] = 7  # whose distances are larger for that alone
    assert any("with different samples (" in note and "; 7, labels " in note for note in format_notes(results))


def test_a_report_without_finished_runs_is_refused_in_one_line(tmp_path):
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    (tmp_path / "a.yaml").write_text("base: {}\nvariants: {a: {}}\n")
    flags = ("--only", "report", "--name", "empty")
    done = run("scripts/ablate.py", "a.yaml", *flags, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("error: runs/empty holds no ablation: there is no runs/empty/plan.json")
    plan = {"runs": [{"variant": "a", "seed": 0, "folder": str(tmp_path / "x"), "keys": {"score": "k"}}]}
    (tmp_path / "runs" / "empty" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"no run is finished, there is nothing to report yet \(1 to go\)$"):
        read_results(tmp_path / "runs" / "empty")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match="; results of other code count if it is planned with --any_code true"):
        read_results(tmp_path / "runs" / "empty")
