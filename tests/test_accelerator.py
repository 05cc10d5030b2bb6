"""What several processes are told when they begin."""

import pytest
import torch
from processes import run

from machine import accelerator as module

OPENED = """
from datetime import timedelta
import torch
from machine.accelerator import open_accelerator

accelerator = open_accelerator("fp32", in_parts={in_parts})
options = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options
assert options._timeout == timedelta(hours=2), options._timeout
model = accelerator.prepare(torch.nn.Linear(2, 2))
assert model.gradient_as_bucket_view
assert model.broadcast_buffers
assert model.find_unused_parameters == {in_parts}
assert not model.static_graph
"""


@pytest.mark.parametrize("in_parts", [False, True])
def test_processes_wait_for_hours_and_gradients_are_not_copied(tmp_path, in_parts):
    """While one scores or encodes, the others wait; torch gives up after 10 minutes with NCCL, 30 with gloo."""
    (tmp_path / "opened.py").write_text(OPENED.format(in_parts=in_parts))
    run(tmp_path / "opened.py", cwd=tmp_path, processes=2)


def test_on_gpus_whose_batch_norms_are_synchronised_no_buffer_is_broadcast(monkeypatch):
    given = {}
    monkeypatch.setattr(module, "Accelerator", lambda **options: given.update(options) or 1 / 0)
    monkeypatch.setattr(module, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(module, "choose_precision", lambda *_: "fp32")
    with pytest.raises(ZeroDivisionError):
        module.open_accelerator("fp32")
    assert not given["kwargs_handlers"][0].broadcast_buffers
