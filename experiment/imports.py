"""`--imports`: load the user's own modules, which register backbones, samplers and so on.

Code runs only with the user's approval, so that a checkpoint from elsewhere cannot run any. Naming a module in a flag,
or in a configuration passed to the command, approves it. Approvals are stored outside of all runs, in
`$XDG_STATE_HOME/latent-diffusion-backbones/imports`: modules by name, files by the hash of their content. Modules that
a checkpoint or a run's stored configuration names are loaded only if they were approved before.
"""

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
import traceback
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

RECORD = "latent-diffusion-backbones/imports"
_loaded: dict[str, str] = {}  # module name or path by key, which is the name without folders
_hashes: dict[str, str] = {}  # hash of all files of a module when it was loaded, by key
_given: set[str] = set()  # keys of those that the user named


def load_imports(
    names: Sequence[str], *, stored_in: Path | str | None = None, contents: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Import modules and .py files, or raise ValueError.

    Args:
        names: module names, and paths of .py files
        stored_in: the run or checkpoint that names them; None if the user does. A file that the user named replaces a
            stored one of the same name.
        contents: hashes of the files that the checkpoint was made with, from `contents_of`
    """
    for name in names:
        file = Path(name).expanduser() if name.endswith(".py") else None
        key = file.name if file else name
        if stored_in is not None and key in _given:
            continue
        if file and not file.is_file():
            problem = f"{stored_in} names it, and it is not here" if stored_in else "no such file"
            raise ValueError(f"--imports {name}: {problem}; give --imports the path of {key}")
        source = file.read_bytes() if file else None
        approval = name if source is None else hashlib.sha256(source).hexdigest()
        record = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", RECORD)
        approvals = set()
        with suppress(OSError):
            approvals = set(record.read_text().split())
        if stored_in is not None and approval not in approvals:
            raise ValueError(
                f"--imports {name}: {stored_in} names it, and its code was not given here before; if you trust it, "
                f"repeat the command with --imports {name}"
            )
        content_hash = _hash_of(name)
        if contents.get(key, content_hash) != content_hash:
            raise ValueError(
                f"--imports {name}: {stored_in} was made with other code of that name; give --imports the file that it "
                "was made with, or this one to take it nevertheless"
            )
        if approval not in approvals:
            with suppress(OSError):  # if approvals cannot be stored, the flag is needed each time
                record.parent.mkdir(parents=True, exist_ok=True)
                with record.open("a") as lines:
                    lines.write(f"{approval}\n")
        _load(name, source, approval)
        _loaded[key], _hashes[key] = name, content_hash
        _given.update({key} if stored_in is None else ())


def contents_of(names: Sequence[str]) -> dict[str, str]:
    """Hashes of loaded modules, by name without folders."""
    keys = [Path(name).name if name.endswith(".py") else name for name in names]
    return {key: _hashes[key] for key in keys if key in _hashes}


def imported_files() -> dict[str, Path]:
    """List all Python files of loaded modules, by names that do not depend on where they lie: every file of a package;
    for a single file also the user's modules that it imports."""
    return {relative: file for name in _loaded.values() for relative, file in _files_of(name).items()}


def _files_of(name: str) -> dict[str, Path]:
    if name.endswith(".py"):
        file = Path(name).expanduser()
        return {file.name: file, **_imported_by(file)}
    spec = importlib.util.find_spec(name.partition(".")[0])
    if spec and spec.origin and not spec.submodule_search_locations:
        return {Path(spec.origin).name: Path(spec.origin)}
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return {f"{folder.name}/{file.relative_to(folder)}": file for folder in folders for file in folder.rglob("*.py")}


def _imported_by(file: Path) -> dict[str, Path]:
    """Find the user's modules that a file imports, directly or not: not installed ones, Python's or this project's."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    rooms = {path.parent.name for path in Path(__file__).parents[1].glob("*/__init__.py")}
    files: dict[str, Path] = {}
    queue = [file]
    while queue:
        nodes: list[ast.AST] = []
        with suppress(SyntaxError):  # reported when the file is loaded
            nodes = list(ast.walk(ast.parse(queue.pop().read_bytes())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        for name in {name.partition(".")[0] for name in names} - {"", *sys.builtin_module_names, *rooms}:
            spec = importlib.util.find_spec(name) if name != "__main__" else None
            candidates = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
            path = next((Path(path).resolve() for path in candidates if path and Path(path).exists()), None)
            if path and not any(path.is_relative_to(folder) for folder in installed):
                new = {name: path for name, path in _files_of(name).items() if name not in files}
                files |= new
                queue += new.values()
    return files


def _hash_of(name: str) -> str:
    digest = hashlib.sha256()
    for relative, file in sorted(_files_of(name).items()):
        digest.update(relative.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _load(name: str, source: bytes | None, approval: str) -> None:
    key = name if source is None else f"imported_{Path(name).stem}_{approval[:12]}"
    if key in sys.modules:
        return
    try:
        if source is None:
            importlib.import_module(name)
            return
        module = sys.modules[key] = types.ModuleType(key)
        module.__file__ = name
        exec(compile(source, name, "exec"), vars(module))  # exactly what was hashed; __pycache__ may hold other code
    except Exception as error:  # a user's module may raise anything
        sys.modules.pop(key, None)
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            remedy = "give a .py file, or put its folder on PYTHONPATH"
            raise ValueError(f"--imports {name}: no such module; {remedy}") from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"--imports {name}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno}); "
            "TRACEBACK=1 shows how it came there"
        ) from error
