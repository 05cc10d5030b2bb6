"""The tables of docs/results.md again: their commands, what they give, and whether it agrees with what stands there.

python scripts/reproduce.py                                 (all tables: cost, commit, what is superseded)
python scripts/reproduce.py demo --only plan                (its commands)
python scripts/reproduce.py demo                            (runs them in runs/reproduce/demo; what was cut goes on)
python scripts/reproduce.py autoencoders --files '{caltech101.zip: photos.zip, mobilenet_v2.pt: mobilenet_v2.pt}'
"""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.reproduction import Table, arguments, compare, read_index
from evaluation.table import terminal
from experiment.cli import one_line_errors, parse
from machine import children
from machine.lock import Lock
from machine.whole_files import write_whole


@dataclass(frozen=True)
class ReproduceConfig:
    """Run a table's commands and compare; exit status 1 where a figure does not agree.

    Args:
        table: its name in docs/results.yaml; the flag's name may be left out; null lists all
        files: where the data lie that the commands name, such as '{caltech101.zip: /data/photos.zip}'; by default here
        only: 'plan' shows the commands; 'check' compares what earlier ones left; null does it all
        output: its folder; by default runs/reproduce/TABLE. What is done there, by the same code on the same files, is
            not done again
        any_code: take for done what was done by other code too, or on other contents of the files
    """

    table: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    only: Literal["plan", "check"] | None = None
    output: Path | None = None
    any_code: bool = False


def main(config: ReproduceConfig) -> int:
    """List, plan, or run and compare; returns the exit status."""
    known, tables = read_index()
    if config.table is None:
        print(listed(tables))
        return 0
    if config.table not in tables:
        raise ValueError(f"--table {config.table}: no such table, choose from {', '.join(tables)}")
    if unknown := sorted(config.files.keys() - known.keys()):
        raise ValueError(f"--files {unknown[0]}: no table names it, choose from {', '.join(known)}")
    table = tables[config.table]
    folder = config.output or Path("runs", "reproduce", table.name)
    if not table.commands:
        raise ValueError(f"--table {table.name}: it cannot be run again ({table.superseded})")
    measured = f"measured at {table.commit}" if table.commit else "published, not measured here"
    print(f"{table.name} ({table.document.name}: {table.section}), {measured}; {table.cost}")
    if table.superseded:
        print(f"superseded: {table.superseded}; what stands there will not come out again")
    if config.only == "plan":
        print("\n".join(table.commands))
        return 0
    if config.only is None:
        needed = {name: config.files.get(name, name) for name in known if name in " ".join(table.commands)}
        for name, path in needed.items():
            if not Path(path).exists():
                raise ValueError(
                    f"--files: {path}: no such file; {name} is {known[name]}; give --files '{{{name}: PATH}}'"
                )
        with Lock(folder / "lock"):
            files = {name: str(Path(path).resolve()) for name, path in needed.items()}
            run(table, files, folder, any_code=config.any_code)
    elif not (folder / "output.txt").is_file():
        raise ValueError(f"--only check: nothing has been run in {folder}; leave it out, or give --output")
    if not table.figures:
        print(f"nothing to compare by number; what came out is in {folder}")
        return 0
    compared, agrees = compare(table, folder)
    print(compared)
    print("\n".join(dict.fromkeys(f"may differ: {figure.why}" for figure in table.figures)))
    return 0 if agrees else 1


def listed(tables: dict[str, Table]) -> str:
    """A row a table, those that today's code does not give last."""
    lines = [["table", "section", "commit", "cost", "superseded by"]]
    for table in sorted(tables.values(), key=lambda table: table.superseded is not None):
        lines.append([table.name, table.section, table.commit or "published", table.cost, table.superseded or ""])
    return terminal(lines)


def run(table: Table, files: dict[str, str], folder: Path, *, any_code: bool) -> None:
    """The commands, but for those that ended well before; a SystemExit where one fails or is stopped, a ValueError
    where one was done by other code or on other contents."""
    from checkpoints.checkpoint import current_commit

    folder.mkdir(parents=True, exist_ok=True)
    journal, output = folder / "journal.json", folder / "output.txt"
    done = json.loads(journal.read_text()) if journal.is_file() else {}  # commit and hash, by commands on these files
    done = {line: value if isinstance(value, dict) else {"commit": value} for line, value in done.items()}
    every = {command: arguments(command, files) for command in table.commands}
    keys = {command: key_of(words, files) for command, words in every.items()}
    for command, words in every.items():
        before = done.get(shlex.join(words), {"of": keys[command]})
        if before.get("of") != keys[command] and not any_code:
            commit = before["commit"][:9] or "unknown"
            raise ValueError(
                f"--output {folder}: what is there was done at commit {commit}, by other code or on other contents of "
                f"the files: {command}; give another --output, or --any_code true to take it"
            )
    for command, words in every.items():
        if (line := shlex.join(words)) in done:
            print(f"done before, at commit {done[line]['commit'][:9] or 'unknown'}: {command}")
            continue
        if words[1].endswith("/train.py") and "--resume" not in words:
            words += ["--resume", "auto"]  # or begin
        print(f"{command}\n    in {folder}; its words go to {output.name}", flush=True)
        began = time.time()
        with output.open("a") as said:
            print(f"$ {shlex.join(words)}", file=said, flush=True)
            try:
                children.run(words, cwd=folder, stdout=said, stderr=subprocess.STDOUT)
            except SystemExit as ended:
                last = output.read_text(errors="replace").strip().splitlines()[-1]
                print(f"ended with status {ended.code}: {last}\nthe same command goes on", file=sys.stderr)
                raise
        print(f"    {time.time() - began:.0f} s", flush=True)
        done[line] = {"commit": current_commit(), "of": keys[command]}
        write_whole(journal, json.dumps(done, indent=2) + "\n")


def key_of(words: list[str], files: dict[str, str]) -> str:
    """A hash of the code of a command and of the files that it names; of a folder the names and sizes in it."""
    from ablation.identity import code_of_command
    from machine.whole_files import sha256_of

    contents: dict[str, object] = {}
    for name, path in files.items():
        if path in " ".join(words):
            inside = sorted(Path(path).rglob("*")) if Path(path).is_dir() else []
            contents[name] = [(each.as_posix(), each.stat().st_size) for each in inside] or sha256_of(Path(path))
    return hashlib.sha256(json.dumps([code_of_command(words), contents]).encode()).hexdigest()


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(main(parse(ReproduceConfig, first="table")))
