"""docs/results.yaml names figures in docs/results.md and commands that run today; its program compares them."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from processes import ROOT, script

from ablation.identity import code_hashes_of_command
from evaluation import reproduction
from evaluation.reproduction import DOCUMENT, arguments, documented_values, read_index, section
from experiment.cli import parse
from experiment.config import ExperimentConfig

SCRIPT, IMPORT = script("scripts/reproduce.py"), script("scripts/import_checkpoint.py")
FILES, TABLES = read_index()
CONFIGS = {
    "train.py": ExperimentConfig,
    "sample.py": script("sample.py").SampleConfig,
    "evaluate.py": script("evaluate.py").EvaluateConfig,
    "recognise.py": script("scripts/recognise.py").RecogniseConfig,
    "import_checkpoint.py": IMPORT.ImportConfig,
}


def in_one_line(text):
    return " ".join(text.replace("\\\n", " ").split())


@pytest.mark.parametrize("name", TABLES)
def test_figures_of_the_index_are_found_in_the_document(name):
    table = TABLES[name]
    text = section(table.document.read_text(), table.section)
    assert table.commit is None or table.commit in text
    for figure in table.figures:
        value = documented_values(figure, text)
        assert not any("agreement" in str(step) for step in figure.key) or 0 <= value <= 1, "a share, as in its file"
        assert figure.file or figure.printed
        assert figure.why
    if table.commit and table.commands:
        assert any(command in in_one_line(text) for command in table.commands), "no command as the document has it"
    assert table.commands or table.superseded


def test_every_section_with_figures_in_a_table_is_indexed():
    parts = re.split(r"^#{2,} +(.+)$", DOCUMENT.read_text(), flags=re.MULTILINE)
    tables = {title for title, body in zip(parts[1::2], parts[2::2], strict=True) if "\n|---" in body}
    assert tables - {table.section for table in TABLES.values()} == set()


@pytest.mark.parametrize("name", [name for name, table in TABLES.items() if table.commands])
def test_commands_are_ones_that_todays_programs_take(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in TABLES[name].commands:
        words = arguments(command, {})
        assert words[1] == "-m" or Path(words[1]).is_file()
        if config := CONFIGS.get(Path(words[1]).name):
            assert parse(config, IMPORT.as_list(words[2:]))


def test_names_in_a_command_are_replaced_by_files():
    files = {"a.zip": "/data/some a.zip", "net.pt": "/data/net.pt"}
    command = "python scripts/x.py configs/c.yaml --set '{data.path: a.zip, e: net.pt}' --other b-a.zip runs/net.pt"
    words = arguments(command, files)
    assert words[1:3] == [str(ROOT / "scripts/x.py"), str(ROOT / "configs/c.yaml")]
    assert words[4:] == ["{data.path: /data/some a.zip, e: /data/net.pt}", "--other", "b-a.zip", "runs/net.pt"]


TEXT = """# Results

## Mine

Measured at abc1234; it is right in **99.5% of
cases**.

| row | kind | score |
|---|---|---|
| first | a | 1.50 ± 0.10 |
| first | b | -1,234.5 |
| second \\| other | a | 0.5, 0.7 |
| third | a | 29.3 ± 2.6% |

## Other

| row | score |
|---|---|
| first | 7 |
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An index with one table, whose first command needs a file."""
    (tmp_path / "results.md").write_text(TEXT)
    write = "import json, sys; json.dump({'rows': [{'name': 'x', 'value': 1.52}]}, open('out.json', 'w'))"
    entry = {
        "section": "Mine",
        "cost": "nothing",
        "commit": "abc1234",
        "commands": [f'python -c "{write}" images.zip', "python -c \"print('right in 99.4% of all')\""],
        "file": "out.json",
        "why": "rounding",
        "values": [
            {"cell": ["first", "a", "score"], "key": ["rows", "x", "value"], "within": 0.05},
            {"text": "right in **{} of cases", "printed": "right in {} of", "within": 0.002},
        ],
    }
    index = {"files": {"images.zip": "a zip of your own"}, "tables": {"mine": entry}}
    (tmp_path / "results.yaml").write_text(yaml.safe_dump(index))
    (tmp_path / "images.zip").touch()
    monkeypatch.setattr(SCRIPT, "read_index", lambda: reproduction.read_index(tmp_path / "results.yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reproduce(**settings):
    return SCRIPT.main(SCRIPT.ReproduceConfig(**settings))


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_it_runs_a_table_once_and_compares(folder, capfd):
    assert reproduce(table="mine") == 0
    assert "1.52" in capfd.readouterr().out
    assert reproduce(table="mine") == 0
    said = capfd.readouterr().out
    assert said.count("done before, at commit ") == 2
    assert "NO" not in said
    replace(folder / "results.md", "1.50 ±", "1.40 ±")
    assert reproduce(table="mine", only="check") == 1
    assert re.search(r"first, a, score +\| 1.4 +\| 1.52 +\| 0.05 +\| NO", capfd.readouterr().out)
    (folder / "runs/reproduce/mine/out.json").unlink()
    assert reproduce(table="mine", only="check") == 1


def test_a_command_was_done_by_the_code_with_which_it_began(folder, monkeypatch):
    ran = []
    monkeypatch.setattr(SCRIPT.children, "run_process", lambda words, **_: ran.append(words))
    monkeypatch.setattr("checkpoints.checkpoint.current_commit", lambda: f"after {len(ran)}")
    reproduce(table="mine")
    done = json.loads((folder / "runs/reproduce/mine/journal.json").read_text())
    assert [entry["commit"] for entry in done.values()] == ["after 0", "after 1"]


def test_nothing_is_compared_before_anything_was_run(folder):
    with pytest.raises(ValueError, match=r"--only check: nothing has been run in runs/reproduce/mine; leave it out"):
        reproduce(table="mine", only="check")


def test_what_was_done_on_other_files_is_done_again(folder, capfd):
    assert reproduce(table="mine") == 0
    (folder / "other.zip").touch()
    assert reproduce(table="mine", files={"images.zip": "other.zip"}) == 0
    assert capfd.readouterr().out.count("done before") == 1  # the command that reads no file


def test_results_of_other_code_or_files_are_refused_unless_accepted(folder, capfd, monkeypatch):
    """--any_code accepts them."""
    assert reproduce(table="mine") == 0
    journal = folder / "runs/reproduce/mine/journal.json"
    refused = r"--output runs/reproduce/mine: what is there was done at commit .*give another --output, or --any_code"
    (folder / "images.zip").write_text("others")
    with pytest.raises(ValueError, match=refused):
        reproduce(table="mine")
    assert reproduce(table="mine", any_code=True) == 0
    (folder / "images.zip").write_text("")
    assert reproduce(table="mine") == 0
    done = journal.read_text()
    journal.write_text(json.dumps(dict.fromkeys(json.loads(done), "abc")))  # as they were before
    with pytest.raises(ValueError, match="done at commit abc"):
        reproduce(table="mine")
    journal.write_text(done)
    monkeypatch.setattr("ablation.identity.code_hashes_of_command", lambda words: {"train.py": "edited"})
    with pytest.raises(ValueError, match=refused):
        reproduce(table="mine")
    capfd.readouterr()


def test_a_commands_code_is_what_it_may_start_and_the_configurations_that_it_names():
    root = SCRIPT.Path(SCRIPT.__file__).parents[1]
    words = [sys.executable, str(root / "scripts/ablate.py"), "--x", str(root / "configs/quickstart.yaml")]
    code = code_hashes_of_command(words)
    assert code.keys() >= {"scripts/ablate.py", "ablation/runner.py", "evaluate.py", "configs/quickstart.yaml"}
    assert not any(name.startswith(("tests/", "docs/")) for name in code)
    assert code_hashes_of_command([sys.executable, "-c", "print()"]) == {}


def test_reproduce_stops_at_a_failed_command_and_resumes_there(folder, capfd):
    replace(folder / "results.yaml", "print('right in 99.4% of all')", "print('bad news'); raise SystemExit(75)")
    with pytest.raises(SystemExit) as ended:
        reproduce(table="mine")
    assert ended.value.code == 75
    assert "status 75: bad news" in capfd.readouterr().err
    replace(folder / "results.yaml", "print('bad news'); raise SystemExit(75)", "print('right in 99.4% of all')")
    assert reproduce(table="mine") == 0


def test_lists_and_plans_start_nothing(folder, capsys):
    assert reproduce() == reproduce(table="mine", only="plan") == 0
    said = capsys.readouterr().out
    assert "abc1234" in said
    assert "images.zip" in said
    assert not (folder / "runs").exists()


def test_mistakes_are_told_in_words(folder):
    with pytest.raises(ValueError, match="--table yours: no such table, choose from mine"):
        reproduce(table="yours")
    with pytest.raises(ValueError, match=r"--files photos\.zip: no table names it"):
        reproduce(table="mine", files={"photos.zip": "x"})
    (folder / "images.zip").unlink()
    with pytest.raises(ValueError, match=r"images\.zip is a zip of your own; give --files '\{images\.zip: PATH\}'"):
        reproduce(table="mine")


def test_figures_are_read_from_their_cell_or_sentence():
    text = section(TEXT, "Mine")

    def figure(**place):
        return reproduction.Figure(within=0.0, why="", **place)

    assert documented_values(figure(cell=("first", "b", "score")), text) == -1234.5
    assert documented_values(figure(cell=("second | other", "score"), number=1), text) == 0.7
    assert documented_values(figure(text="it is right in **{} of cases"), text) == 0.995
    assert documented_values(figure(cell=("third", "score")), text) == 0.293
    for place in ({"cell": ("first", "score")}, {"cell": ("fourth", "score")}, {"text": "wrong in {} of cases"}):
        with pytest.raises(ValueError, match="places of its section, not in one"):
            documented_values(figure(**place), text)
    with pytest.raises(ValueError, match="has no number 2"):
        documented_values(figure(cell=("second | other", "score"), number=2), text)
    with pytest.raises(ValueError, match="0 sections are called 'Nobody'"):
        section(TEXT, "Nobody")
