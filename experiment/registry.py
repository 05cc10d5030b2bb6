"""Open tables: a file outside this repository adds a backbone, a sampler, ... under a name of its own.

    from experiment.registry import register

    @register("backbone", "Mine-S", depth=4)
    class Mine(nn.Module): ...

`--imports my_file.py` loads such files before names are looked up; docs/extending.md shows one of each kind.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from experiment.config import DiffusionConfig
from experiment.open_section import open_section
from metrics.scores import Metric

T = TypeVar("T")

TABLES = {  # of each kind: its table's module and name; the module is imported when something is added
    "backbone": ("models", "BACKBONES"),
    "sampler": ("diffusion.samplers", "SAMPLERS"),
    "diffusion": ("diffusion.presets", "DIFFUSIONS"),
    "dataset": ("data", "DATASETS"),
    "codec": ("autoencoders.codec", "CODECS"),
    "auxiliary": ("training.objective", "AUXILIARY"),
    "metric": ("metrics.scores", "METRICS"),
}


def register(kind: str, name: str, **arguments: Any) -> Callable[[T], T]:
    """A decorator that adds a class or function to its kind's table by a `name` that is not taken. A backbone takes
    `arguments` of its constructor along, a metric those of `metrics.scores.Metric`, such as `better="lower"`."""
    if kind not in TABLES:
        raise ValueError(f"register({kind!r}, {name!r}): no such kind, choose from {', '.join(TABLES)}")
    if arguments and kind not in ("backbone", "metric"):
        raise ValueError(f"register({kind!r}, {name!r}): a {kind} takes no arguments, leave out {', '.join(arguments)}")
    module, table = TABLES[kind]

    def add(thing: Any) -> Any:
        rows: dict[str, Any] = getattr(import_module(module), table)
        if name in rows:
            taken = rows[name][0] if kind == "backbone" else getattr(rows[name], "compute", rows[name])
            owner = f"{getattr(taken, '__module__', '')}.{getattr(taken, '__qualname__', taken)}"
            raise ValueError(f"register({kind!r}, {name!r}): the name is taken, by {owner}; choose another")
        if kind == "metric":
            rows[name] = Metric(thing, **arguments)
        else:
            rows[name] = (thing, arguments) if kind == "backbone" else thing
        if kind == "diffusion":
            open_section(DiffusionConfig, rows)  # its parameters are flags from now on
        return thing

    return add
