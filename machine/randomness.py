"""Seeds and generators that only depend on a key, such as (seed, purpose, step)."""

import numpy as np
import torch


def seed_for(*key: int | str) -> int:
    """A 64-bit seed that is a function of the key."""
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "little") for part in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator_for(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of the key."""
    return torch.Generator(device).manual_seed(seed_for(*key))
