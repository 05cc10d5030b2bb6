"""Free memory of a process, and which caches are loaded into memory."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from autoencoders.codec import PixelCodec
from data.latents import num_bytes
from data.shapes import ShapesDataset
from data.shards import Rows
from experiment.build import open_cache
from experiment.config import DataConfig
from machine import memory
from machine.memory import free_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ({"memory.max": "max", "jobs/memory.max": "5000", "jobs/7/memory.max": "max"}, 2500),
        ({"jobs/memory.max": "9000", "jobs/7/memory.max": "6000"}, 3000),
        ({"memory/jobs/memory.limit_in_bytes": "3000"}, 1500),
        ({"memory/memory.limit_in_bytes": "4000"}, 2000),
        ({"other/memory.max": "100", "cpu/jobs/memory.limit_in_bytes": "100"}, 4000),
        ({}, 4000),
    ],
)
def test_free_memory_respects_control_groups_and_is_shared_by_processes(tmp_path, monkeypatch, groups, free):
    for name, limit in groups.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    (tmp_path / "own").write_text("4:memory:/jobs/7\n1:cpu:/jobs\n0::/jobs/7\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    assert free_memory(CPU, num_processes=2) == free


def test_a_cuda_device_has_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 8000))
    assert free_memory(torch.device("cuda"), num_processes=2) == 3000


def test_a_cache_is_loaded_if_it_needs_less_than_a_quarter_of_free_memory(tmp_path, monkeypatch):
    config, images, accelerator = (
        DataConfig(cache=str(tmp_path)),
        ShapesDataset(30, image_size=8),
        Accelerator(cpu=True),
    )

    def stored(free):
        monkeypatch.setattr("experiment.build.free_memory", lambda *_: free)
        return open_cache(config, PixelCodec(), images, accelerator, flips=True).stored

    assert isinstance(stored(1 << 40), torch.Tensor)
    (folder,) = tmp_path.iterdir()
    assert isinstance(stored(4 * num_bytes(folder) + 4), torch.Tensor)
    assert isinstance(stored(4 * num_bytes(folder)), Rows)
