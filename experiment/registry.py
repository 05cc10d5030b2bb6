"""Registration of backbones, samplers and so on from files outside this repository.

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
from models import class_of

T = TypeVar("T")

TABLES = {  # module and name of each kind's table; the module is imported on registration
    "backbone": ("models", "BACKBONES"),
    "sampler": ("diffusion.samplers", "SAMPLERS"),
    "diffusion": ("diffusion.presets", "DIFFUSIONS"),
    "dataset": ("data", "DATASETS"),
    "codec": ("autoencoders.codec", "CODECS"),
    "auxiliary": ("training.objective", "AUXILIARY"),
    "metric": ("metrics.scores", "METRICS"),
}
# What makes the row of a kind that takes arguments.
ROWS: dict[str, Any] = {"backbone": lambda thing, **arguments: (thing, arguments), "metric": Metric}


def register(kind: str, name: str, **arguments: Any) -> Callable[[T], T]:
    """Decorator that adds a class or function to the table of its kind.

    Args:
        kind: a key of `TABLES`
        name: by which configurations select it; a name that is taken raises ValueError
        arguments: for a backbone, arguments of its constructor; for a metric, those of `metrics.scores.Metric`, such as
            `better="lower"`
    """
    if kind not in TABLES:
        raise ValueError(f"register({kind!r}, {name!r}): no such kind, choose from {', '.join(TABLES)}")
    if arguments and kind not in ROWS:
        raise ValueError(f"register({kind!r}, {name!r}): a {kind} takes no arguments, leave out {', '.join(arguments)}")
    module, table = TABLES[kind]

    def add(thing: Any) -> Any:
        rows: dict[str, Any] = getattr(import_module(module), table)
        if name in rows:
            taken = class_of(name) if kind == "backbone" else getattr(rows[name], "compute", rows[name])
            owner = f"{getattr(taken, '__module__', '')}.{getattr(taken, '__qualname__', taken)}"
            raise ValueError(f"register({kind!r}, {name!r}): the name is taken, by {owner}; choose another")
        rows[name] = ROWS[kind](thing, **arguments) if kind in ROWS else thing
        if kind == "diffusion":
            open_section(DiffusionConfig, rows)  # so that its parameters become flags
        return thing

    return add
