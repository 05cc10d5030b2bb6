"""Random numbers that depend on what they are for, and on nothing else."""

import numpy as np
import torch


def seed_for(*key: int | str) -> int:
    """A seed of 64 bits that depends on the key alone."""
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "little") for part in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator_for(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on the key alone: (seed, purpose, step), say."""
    return torch.Generator(device).manual_seed(seed_for(*key))
