"""Reproduce tables of docs/results.md: run their commands and compare the results with the document.

python scripts/reproduce.py                                 (list all tables with their costs and commits)
python scripts/reproduce.py demo --only plan                (show the commands)
python scripts/reproduce.py demo                            (run them in runs/reproduce/demo; repeat to continue)
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
from experiment.cli import run_main
from machine import children
from machine.atomic_files import write_atomic
from machine.lock import Lock


@dataclass(frozen=True)
class ReproduceConfig:
    """Run a table's commands and compare the results; the exit status is 1 if a figure disagrees.

    Args:
        table: name in docs/results.yaml; the flag's name may be left out; null lists all
        files: paths of the files that the commands name, such as '{caltech101.zip: /data/photos.zip}'; by default in
            the current folder
        only: 'plan' shows the commands; 'check' compares earlier results; null does everything
        output: folder for the results; by default runs/reproduce/TABLE. Commands that finished there, with the same
            code and files, are skipped
        any_code: also skip commands that finished with other code or other contents of the files
    """

    table: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    only: Literal["plan", "check"] | None = None
    output: Path | None = None
    any_code: bool = False


def main(config: ReproduceConfig) -> int:
    """List, plan, or run and compare; return the exit status."""
    known, tables = read_index()
    if config.table is None:
        print(format_tables(tables))
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


def format_tables(tables: dict[str, Table]) -> str:
    lines = [["table", "section", "commit", "cost", "superseded by"]]
    for table in sorted(tables.values(), key=lambda table: table.superseded is not None):
        lines.append([table.name, table.section, table.commit or "published", table.cost, table.superseded or ""])
    return terminal(lines)


def run(table: Table, files: dict[str, str], folder: Path, *, any_code: bool) -> None:
    """Run the commands that have not finished before. Raises SystemExit if one fails or is stopped, and ValueError if
    one finished with other code or other contents of the files."""
    from checkpoints.checkpoint import current_commit

    folder.mkdir(parents=True, exist_ok=True)
    journal, output = folder / "journal.json", folder / "output.txt"
    done = json.loads(journal.read_text()) if journal.is_file() else {}  # commit and hash by command line
    done = {line: value if isinstance(value, dict) else {"commit": value} for line, value in done.items()}
    all_words = {command: arguments(command, files) for command in table.commands}
    keys = {command: key_of(words, files) for command, words in all_words.items()}
    for command, words in all_words.items():
        finished = done.get(shlex.join(words), {"of": keys[command]})
        if finished.get("of") != keys[command] and not any_code:
            commit = finished["commit"][:9] or "unknown"
            raise ValueError(
                f"--output {folder}: what is there was done at commit {commit}, by other code or on other contents of "
                f"the files: {command}; give another --output, or --any_code true to take it"
            )
    for command, words in all_words.items():
        if (line := shlex.join(words)) in done:
            print(f"done before, at commit {done[line]['commit'][:9] or 'unknown'}: {command}")
            continue
        if words[1].endswith("/train.py") and "--resume" not in words:
            words += ["--resume", "auto"]
        print(f"{command}\n    in {folder}; its words go to {output.name}", flush=True)
        start, commit = time.time(), current_commit()
        with output.open("a") as file:
            print(f"$ {shlex.join(words)}", file=file, flush=True)
            try:
                children.run_process(words, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
            except SystemExit as error:
                last_line = output.read_text(errors="replace").strip().splitlines()[-1]
                print(f"ended with status {error.code}: {last_line}\nrepeat the command to continue", file=sys.stderr)
                raise
        print(f"    {time.time() - start:.0f} s", flush=True)
        done[line] = {"commit": commit, "of": keys[command]}
        write_atomic(journal, json.dumps(done, indent=2) + "\n")


def key_of(words: list[str], files: dict[str, str]) -> str:
    """Hash the code of a command and the files that it names; for a folder, the names and sizes of its files."""
    from ablation.identity import code_hashes_of_command
    from machine.atomic_files import sha256_of

    contents: dict[str, object] = {}
    for name, path in files.items():
        if path in " ".join(words):
            inner = sorted(Path(path).rglob("*")) if Path(path).is_dir() else []
            contents[name] = [(file.as_posix(), file.stat().st_size) for file in inner] or sha256_of(Path(path))
    return hashlib.sha256(json.dumps([code_hashes_of_command(words), contents]).encode()).hexdigest()


if __name__ == "__main__":
    run_main(main, ReproduceConfig, first="table")
