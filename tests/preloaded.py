"""Modules that the fork server of `processes.run` imports in advance: libraries, and rooms that entry points import."""

import gc
import importlib
import io
import sys

from processes import LIBRARIES, ROOMS, ROOT

IMPORTED = {"experiment", "autoencoders", "checkpoints", "data", "diffusion", "evaluation", "machine", "metrics"}
IMPORTED |= {"models", "sampling", "settings", "studies", "training"}

gc.disable()  # imports leave no garbage
sys.dont_write_bytecode = False  # write compiled files, which the programs use
for name in LIBRARIES:
    importlib.import_module(name)
for room in sorted(IMPORTED & set(ROOMS)):
    for path in sorted((ROOT / room).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
cli, config = (importlib.import_module(f"experiment.{name}") for name in ("cli", "config"))
cli.build_parser(*cli.constructors(config.ExperimentConfig))  # cached
figure = importlib.import_module("matplotlib.figure").Figure()
figure.subplots().set_xlabel("step")
figure.savefig(io.BytesIO())  # so that fonts are found once
gc.freeze()  # so that the programs' collections skip these modules
gc.enable()
