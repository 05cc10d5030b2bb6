"""`--imports`: the user's own modules, loaded for what they register.

Code runs on the user's word alone. The word is given by a flag, or by a configuration that the user passes; it is kept
outside every run, in `$XDG_STATE_HOME/latent-diffusion-backbones/imports`: of a module its name, of a file the hash of
its content. What a checkpoint or a run's own configuration names is loaded only where that word was given before.
"""

import hashlib
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_loaded: dict[str, str] = {}  # as they were given, by name without folders


def load_imports(names: Sequence[str], *, stored_in: Path | str | None = None) -> None:
    """Import modules by name from Python's path, and .py files.

    `stored_in` is the run or checkpoint that names them, None where the user does. What such a one names is taken for
    loaded where the user has already given a file of the same name, wherever that lies.

    Raises:
        ValueError: for one that is missing, fails, or is named by a checkpoint and was never given by the user.
    """
    for name in names:
        file = Path(name).expanduser() if name.endswith(".py") else None
        if stored_in is not None and (file.name if file else name) in _loaded:
            continue
        if file and not file.is_file():
            named = f"{stored_in} names it, and it is not here" if stored_in else "no such file"
            raise ValueError(f"--imports {name}: {named}; give --imports the path of {file.name}")
        source = file.read_bytes() if file else None
        word = name if source is None else hashlib.sha256(source).hexdigest()
        if stored_in is None:
            _remember(word)
        elif word not in _words():
            raise ValueError(
                f"--imports {name}: {stored_in} names it, and its code was not given here before; if you trust it, "
                f"repeat the command with --imports {name}"
            )
        _load(name, source, word)
        _loaded[file.name if file else name] = name


def imported_files() -> dict[str, Path]:
    """The Python files of what was loaded: of a package all of them, each by a name without its place on the disk."""
    files: dict[str, Path] = {}
    for name in _loaded.values():
        if name.endswith(".py"):
            files[Path(name).name] = Path(name).expanduser()
            continue
        spec = importlib.util.find_spec(name.partition(".")[0])
        for folder in (spec and spec.submodule_search_locations) or ():
            files |= {f"{Path(folder).name}/{file.relative_to(folder)}": file for file in Path(folder).rglob("*.py")}
        if spec and spec.origin and not spec.submodule_search_locations:
            files[Path(spec.origin).name] = Path(spec.origin)
    return files


def _load(name: str, source: bytes | None, word: str) -> None:
    key = name if source is None else f"imported_{Path(name).stem}_{word[:12]}"
    if key in sys.modules:
        return
    try:
        if source is None:
            importlib.import_module(name)
            return
        module = sys.modules[key] = types.ModuleType(key)
        module.__file__ = name
        exec(compile(source, name, "exec"), vars(module))  # what was hashed, and no __pycache__ that lies beside it
    except Exception as error:  # whatever a user's module raises
        sys.modules.pop(key, None)
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"--imports {name}: no such module; give a .py file, or put its folder on PYTHONPATH"
            ) from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"--imports {name}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno}); "
            "TRACEBACK=1 shows how it came there"
        ) from error


def _record() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", "latent-diffusion-backbones/imports")


def _words() -> set[str]:
    with suppress(OSError):
        return set(_record().read_text().split())
    return set()


def _remember(word: str) -> None:
    with suppress(OSError):  # where nothing can be kept, the flag has to be given each time
        if word not in _words():
            _record().parent.mkdir(parents=True, exist_ok=True)
            with _record().open("a") as file:
                file.write(f"{word}\n")
