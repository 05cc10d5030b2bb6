"""What a program that `processes.run` starts finds imported: the libraries, and what entry points import of ours."""

import gc
import importlib
import sys

from processes import LIBRARIES, ROOMS, ROOT

OURS = {"experiment", "autoencoders", "checkpoints", "data", "diffusion", "evaluation", "machine", "metrics", "models"}
OURS |= {"sampling", "settings", "training"}

gc.disable()  # nothing that is imported goes
sys.dont_write_bytecode = False  # as programs find it, see `processes.environment_of`
for name in LIBRARIES:
    importlib.import_module(name)
for room in sorted(OURS & set(ROOMS)):
    for path in sorted((ROOT / room).rglob("*.py")):
        if path.stem != "timm_models":  # imports timm, which few use
            parts = path.relative_to(ROOT).with_suffix("").parts
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
gc.freeze()  # nor is looked through by each of the programs
gc.enable()
