"""Every number of every configuration has a range, and values outside it are refused in one line."""

import ast
import contextlib
import re
import runpy
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from processes import ROOT, script

from ablation.study import AblationConfig, read_ablation
from autoencoder_training.autoencoder_config import AutoencodingConfig
from evaluation.sources import sweep
from experiment.cli import parse, parse_mapping
from experiment.config import ExperimentConfig
from settings import check_settings, set_values

PROGRAMS = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")])
    if "run_main(" in path.read_text()
]


def numbers(kind):
    """Whether a type contains numbers."""
    return kind in (int, float) or (str not in get_args(kind) and any(map(numbers, get_args(kind))))


def configurations():
    """All classes that a command line or YAML is read into, nested ones included."""
    found = [ExperimentConfig, AutoencodingConfig, AblationConfig]
    for program in PROGRAMS:
        module = script(program)
        name = next(
            node.args[1].id
            for node in ast.walk(ast.parse((ROOT / program).read_text()))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_main"
        )
        found.append(getattr(module, name))
    for each in found:
        for kind in get_type_hints(each).values():
            parts = [kind, *get_args(kind)]
            found += [part for part in parts if is_dataclass(part) and part not in found]
    return found


SCRIPTS = [path for path in sorted((ROOT / "scripts").glob("*.py")) if "run_program(" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_tells_a_mistake_in_two_lines(path, monkeypatch, capsys):
    arguments = ["--otuput", "1"]
    monkeypatch.setattr("sys.argv", [path.name, *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(path.name)
    assert len(told) == 2


def test_no_script_reads_its_flags_in_another_way():
    assert not [path.name for path in (ROOT / "scripts").glob("*.py") if "auto_cli" in path.read_text()]


def test_every_number_has_its_range():
    without = [
        f"{config.__name__}.{each.name}"
        for config in configurations()
        for each in fields(config)
        if numbers(get_type_hints(config)[each.name]) and "interval" not in each.metadata
    ]
    assert without == []


@pytest.mark.parametrize(
    ("flag", "value", "interval"),
    [
        ("data.image_size", "0", "[1, 16384]"),
        ("data.test_fraction", "1.0", "(0, 1)"),
        ("diffusion.P_mean", "nan", "(-inf, inf)"),
        ("diffusion.forcing", "[[0.9, 2.0], [0.1, 0.0]]", "[0, 1]"),
        ("optim.lr", "0.0", "(0, inf)"),
        ("optim.lr", "inf", "(0, inf)"),
        ("optim.betas", "(0.9, 1.0)", "[0, 1)"),
        ("optim.grad_clip", "-1.0", "[0, inf)"),
        ("train.label_dropout", "2.0", "[0, 1]"),
        ("train.num_steps", "0", "[1, inf)"),
        ("train.seed", "-1", "[0, 4294967295]"),
        ("sampling.guidance_rescale", "5.0", "[0, 1]"),
        ("log.num_validation", "0", "[1, inf)"),
        ("log.keep_checkpoints", "-1", "[1, inf)"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_flag(flag, value, interval):
    given = value.replace("nan", ".nan").replace("inf", ".inf").replace("(", "[").replace(")", "]")
    with pytest.raises(ValueError, match=re.escape(f"--{flag} {value}: must lie in {interval}")):
        parse(ExperimentConfig, [f"--{flag}", given])


def test_ranges_hold_in_every_configuration():
    with pytest.raises(ValueError, match=re.escape("--auxiliary.weight -1.0: must lie in (0, inf)")):
        parse(ExperimentConfig, ["--auxiliary", "[{kind: perceptual, weight: -1}]"])
    with pytest.raises(ValueError, match=re.escape("--architecture.channels [8, 0]: must lie in [1, inf)")):
        parse(AutoencodingConfig, ["--architecture.channels", "[8, 0]"])
    with pytest.raises(ValueError, match=re.escape("scoring.trials 0: must lie in [1, inf)")):
        parse_mapping(AblationConfig, {"base": "x.yaml", "scoring": {"trials": 0}})
    with pytest.raises(ValueError, match=re.escape("--seed -1: must lie in [0, 4294967295]")):
        parse(script("sample.py").SampleConfig, ["--checkpoint", "x", "--seed", "-1"])
    check_settings(ExperimentConfig())


def test_settings_of_sampling_have_a_short_spelling_and_may_be_several(capsys):
    flags = ["--guidance_scale", "1,1.5", "--sampler=ddim,heun", "--sampler_args.eta", "0.5", "--clip", "1"]
    rows = sweep(parse(script("evaluate.py").EvaluateConfig, ["--samples", "x", *flags]).sampling)
    rows = [(row["sampler"], row["guidance_scale"], row["sampler_args"], row["clip"]) for row in rows]
    assert rows == [(name, scale, {"eta": 0.5}, 1.0) for name in ("ddim", "heun") for scale in (1.0, 1.5)]
    sample = script("sample.py").SampleConfig
    flags = ["--checkpoint", "x", "--num_steps", "7", "--sampling.guidance_interval", "[0, 2]"]
    assert set_values(parse(sample, flags).sampling) == {"num_steps": 7, "guidance_interval": [0.0, 2.0]}
    for mistake, words in {"--num_steps=many": "Expected an int", "--eta=1": "--eta=1"}.items():
        with pytest.raises(SystemExit):
            parse(sample, ["--checkpoint", "x", mistake])
        assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match=re.escape("--sampling.clip 0.0: must lie in (0, inf]")):
        parse(sample, ["--checkpoint", "x", "--clip", "0"])


def test_help_needs_nothing_that_takes_long_to_import():
    asked = """
import contextlib, io, runpy, sys
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(program, run_name="__main__")
    print(program, *{"torch", "diffusers", "matplotlib"} & sys.modules.keys())
"""
    command = [sys.executable, "-c", asked, *PROGRAMS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == PROGRAMS


def test_num_epochs_and_num_steps_exclude_each_other(tmp_path):
    (tmp_path / "x.yaml").write_text("train: {num_steps: 500}")
    flags = ["--config", str(tmp_path / "x.yaml"), "--train.num_epochs", "3"]
    with pytest.raises(ValueError, match=r"--train.num_epochs 3 and --train.num_steps 500: give only one of them"):
        parse(ExperimentConfig, flags)
    assert parse(ExperimentConfig, [*flags, "--train.num_steps", "null"]).train.num_epochs == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.num_image", "3"], "unrecognized arguments: --data.num_image 3; did you mean --data.num_images?"),
        (["--train.num_epoch=3"], "--train.num_epoch=3; did you mean --train.num_epochs?"),  # no abbreviations
        (["--lr", "1"], "did you mean --optim.lr?"),
        (["--ema-decay", "1"], "did you mean --train.ema_decay?"),
        (["--data-path", "x"], "did you mean --data.path?"),  # as in DiT
        (["--global-batch-size", "8"], "did you mean --train.batch_size"),
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3"),
        (["--optim.lr", "fast"], "--optim.lr: Expected a float. Got value: fast"),
        (["--data.difficulty", "brutal"], "--data.difficulty: Expected a Literal['easy', 'medium', 'hard']"),
        (["--train.seed", "null"], "--train.seed: Expected an int"),
        (["--train.max_hours", "a"], "--train.max_hours: Expected float; given a\n"),  # which may be unset
        (["--config", "none.yaml"], "--config: File does not exist"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line_or_two(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(ExperimentConfig, arguments)
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in told
    assert len(told.splitlines()) <= 3


def test_help_is_headed_by_what_its_groups_are(capsys):
    with pytest.raises(SystemExit):
        parse(ExperimentConfig, ["--help"])
    told = capsys.readouterr().out
    assert "see below" not in told
    assert "optimizer and learning rate:" in told
    assert len(told.split("options:")[0].splitlines()) < 8  # no list of all flags above the list of all flags


def test_names_stay_as_they_are_written(tmp_path):
    names = ["007", "7", "no", "null", "1e3", "a b"]
    flags = parse(ExperimentConfig, ["--data.exclude_classes", f"[{', '.join(names)}]"])
    (tmp_path / "x.yaml").write_text(f"data:\n  exclude_classes: [{', '.join(names)}]\n")
    file = parse(ExperimentConfig, ["--config", str(tmp_path / "x.yaml")])
    assert flags.data.exclude_classes == file.data.exclude_classes == names
    sampling = script("sample.py").SampleConfig
    for given, expected in {"[007, no]": ["007", "no"], "null": ["null"], "7": ["7"], "[]": []}.items():
        assert parse(sampling, ["--checkpoint", "x", "--classes", given]).classes == expected
        assert parse(sampling, ["--checkpoint", "x", f"--classes={given}"]).classes == expected
    (tmp_path / "ablation.yaml").write_text(
        "base: x.yaml\nset: {data.exclude_classes: [007]}\npictures: {classes: [no]}"
    )
    ablation = read_ablation(tmp_path / "ablation.yaml", {})
    assert (ablation.set["data.exclude_classes"], ablation.pictures.classes) == (["007"], ["no"])


def test_the_home_folder_is_found_where_no_shell_expands_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("data: {path: ~/images}")
    for flags in (["--data.path=~/images"], ["--config", str(tmp_path / "x.yaml")]):
        assert parse(ExperimentConfig, flags).data.path == str(tmp_path / "images")


@pytest.mark.parametrize("name", ["..", ".", "../x", "/x", "a/../../x"])
def test_a_run_name_cannot_lead_out_of_runs(name):
    for config in (ExperimentConfig, AutoencodingConfig):
        with pytest.raises(ValueError, match=r"--name: the name .* leads out of runs"):
            _ = config(name=name).folder
    assert ExperimentConfig(name="study/one").folder.as_posix() == "runs/study/one"


def test_flags_are_completed_behind_python_and_launchers(tmp_path):
    with pytest.raises(SystemExit), (tmp_path / "script").open("w") as file, contextlib.redirect_stdout(file):
        parse(ExperimentConfig, ["--print_completion", "shtab-bash"])
    text = (tmp_path / "script").read_text()
    name = re.search(r"complete .* -F (_shtab_\w+) (\S+)", text)
    assert name
    typed = f"COMP_WORDS=(accelerate launch ./{name[2]} --train.num_) COMP_CWORD=3"
    bash = f"source {tmp_path / 'script'}; {typed}; _behind_launcher; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", bash], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["--train.num_epochs", "--train.num_steps"]


def test_full_label_dropout_with_labels_is_refused():
    with pytest.raises(ValueError, match=r"--train.label_dropout 1: no class .* or --data.use_labels false"):
        parse(ExperimentConfig, ["--train.label_dropout", "1.0"])
    assert parse(ExperimentConfig, ["--train.label_dropout", "1.0", "--data.use_labels", "false"])
