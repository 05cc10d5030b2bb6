"""Aliases may repeat what was written, not explode."""

import pytest
import yaml

from experiment.cli import parse
from experiment.config import ExperimentConfig
from experiment.mappings import StrictLoader

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)


def test_few_aliases_are_read():
    text = "a: &a [1, 2]\nb: *a\nc: {<<: &d {e: 3}, f: *a}"
    assert yaml.load(text, StrictLoader) == {"a": [1, 2], "b": [1, 2], "c": {"e": 3, "f": [1, 2]}}
    assert yaml.load("", StrictLoader) is None


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (
            "a: &a {classes: [007, no]}\nb: {<<: *a, lr: 1}",
            {"a": {"classes": ["007", "no"]}, "b": {"classes": ["007", "no"], "lr": 1}},
        ),
        ("yes: {classes: [on]}\n2: {n: 1}", {True: {"classes": ["on"]}, 2: {"n": 1}}),
        ("yes: {classes: [on]}\ntrue: {n: 1}", {True: {"n": 1}}),
    ],
)
def test_names_in_yaml_stay_text_below_merges_and_odd_keys(text, read):
    assert yaml.load(text, StrictLoader) == read


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "a: &a {b: {c: *a}}"])
def test_bombs_and_loops_are_refused_by_line(text):
    with pytest.raises(yaml.YAMLError, match=r"aliases unfold into more than 100000 values"):
        yaml.load(text, StrictLoader)


def test_configurations_are_no_bombs(tmp_path, capsys):
    (tmp_path / "bomb.yaml").write_text("model_args:\n  " + BOMB.replace("\na", "\n  a"))
    with pytest.raises(SystemExit):
        parse(ExperimentConfig, ["--config", str(tmp_path / "bomb.yaml")])
    assert "aliases unfold into more than 100000 values" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(ExperimentConfig, ["--model_args", f"{{{BOMB.strip()}}}".replace("\n", ", ")])
