"""Every command in the documents and on top of the configurations is one that its program accepts."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from processes import ROOT, script

from experiment.cli import parse

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> dict[str, list[list[str]]]:
    """Arguments of all documented commands, by program."""
    text = [block for path in DOCUMENTS for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)]
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        head = re.match(r"(?:#.*\n)+", path.read_text())
        text.append(re.sub(r"^# *", "", head[0], flags=re.MULTILINE) if head else "")
    found: dict[str, set[tuple[str, ...]]] = {}
    lines = "\n".join(text).replace("\\\n", " ").splitlines()
    for number, line in enumerate(lines):
        start = re.match(r"(?:python|.* (?:launch|torchrun) .*?) ?((?:scripts/)?\w+\.py)\b(.*)", line.strip())
        if start and (ROOT / start[1]).is_file():
            words = split(start[2], lines[number + 1 : number + 4])
            end = next((number for number, word in enumerate(words) if word in ("&", "|", ";", ">", "&&")), None)
            kept = (word for word in words[:end] if word != "..." and not word.startswith("$"))
            found.setdefault(start[1], set()).add(tuple(kept))
    return {program: [list(arguments) for arguments in sorted(found[program])] for program in sorted(found)}


def split(line: str, following: list[str]) -> list[str]:
    """Split a command into words; a quoted word may go on in the lines that follow."""
    line = re.split(r"  +\(", line)[0]
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return split(f"{line} {following[0]}", following[1:])


COMMANDS = commands()
PARSER = re.compile(r'run_main\(.*, (\w+Config)\b(?:, first="(\w+)")?')
PARSERS = {name: PARSER.search((ROOT / name).read_text()) for name in COMMANDS}


def test_the_documents_have_commands():
    assert sum(map(len, COMMANDS.values())) > 200


@pytest.mark.parametrize("program", [*filter(PARSERS.get, COMMANDS)])  # flags of the others are arguments of functions
def test_documented_commands_are_accepted(program, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    module, parser = script(program), PARSERS[program]
    for arguments in COMMANDS[program]:
        own = [value for flag, value in pairwise(arguments) if flag == "--config"]
        if "--imports" in arguments or not all(Path(path).is_file() for path in own):
            continue  # files of the reader
        if program == "scripts/import_checkpoint.py":
            arguments = module.as_list(arguments)
        try:
            parse(getattr(module, parser[1]), arguments, first=parser[2] or "")
        except SystemExit:
            pytest.fail(f"{program} {shlex.join(arguments)}: {capsys.readouterr().err}")
