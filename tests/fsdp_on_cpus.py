"""Run SCRIPT under FSDP2 on CPU processes: `torchrun tests/fsdp_on_cpus.py SCRIPT ARGUMENTS`.

Torch can shard over gloo, and Accelerate's FSDP code works with it, but Accelerate turns FSDP on for accelerators only.
This removes that condition, so that train.py's sharded path is tested without a GPU.
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

initialise = AcceleratorState.__init__


def initialise_for_fsdp(self, *arguments, fsdp_plugin=None, **options):
    is_first = not self.initialized
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if is_first and fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = initialise_for_fsdp
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
