"""`torchrun tests/fsdp_on_cpus.py SCRIPT ARGUMENTS`: runs SCRIPT under FSDP2 on CPU processes.

Torch shards over gloo, and Accelerate's FSDP code would run on it, but Accelerate turns FSDP on for accelerators alone.
This lifts that one condition, so that train.py's sharded path is tested where there is no GPU.
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

initialise = AcceleratorState.__init__


def initialise_for_fsdp(self, *arguments, fsdp_plugin=None, **options):
    first = not self.initialized
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if first and fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = initialise_for_fsdp
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
