"""Equal cost: the width at which a backbone costs what another one does."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from models import ModelSpec, model_arguments


@dataclass(frozen=True)
class Resized:
    """A backbone at another width: `unlike` says how little its heads are like the original's."""

    spec: ModelSpec
    width: int
    unlike: float


def resized(spec: ModelSpec, target: float, cost_of: Callable[[ModelSpec], float], tolerance: float) -> ModelSpec:
    """The same backbone, wider or narrower, at a cost within `tolerance` of `target`; depth stays.

    Of the widths within the tolerance that one is taken whose heads are most like the original's, then the nearest.

    Raises:
        ValueError: for a backbone without a width, or where no legal width comes so near.
    """
    if abs(cost_of(spec) / target - 1) <= tolerance:
        return spec
    # The cost goes about as the square of the width: two guesses, then all widths near the second.
    guess = float(_width(spec))
    for _ in range(2):
        near = at_width(spec, 4 * round(guess / 4)) or at_width(spec, 8 * round(guess / 8))
        guess *= math.sqrt(target / cost_of(near.spec)) if near else 1.0
    reach = 2 + math.ceil(guess * tolerance)

    nearest = (math.inf, 0)
    fitting: list[tuple[float, float, ModelSpec]] = []
    for width in range(2 * round((guess - reach) / 2), round(guess + reach) + 1, 2):
        choice = at_width(spec, width)
        try:
            off = abs(cost_of(choice.spec) / target - 1) if choice else math.inf
        except ValueError:  # of no legal width
            continue
        nearest = min(nearest, (off, width))
        if choice and off <= tolerance:
            fitting.append((choice.unlike, off, choice.spec))
    if not fitting:
        raise ValueError(
            f"match: no width of {spec.name} comes within {tolerance:g} of the cost; the nearest, dim={nearest[1]}, is "
            f"{nearest[0]:.3f} off; raise match.tolerance"
        )
    return min(fitting, key=lambda choice: choice[:2])[2]


def at_width(spec: ModelSpec, width: int) -> Resized | None:
    """The backbone at this width, with heads as like its own as divide it (of half to twice their size); or None."""
    heads: Any = model_arguments(spec.name, **spec.args)["num_heads"]
    many = isinstance(heads, list | tuple)
    first = heads[0] if many else heads
    size = _width(spec) / first
    legal = [width // n for n in range(1, width // 2) if width % n == 0 and size / 2 <= width / n <= 2 * size]
    if not legal:
        return None
    best = min(legal, key=lambda head_width: _unlike(head_width, size))
    number = width // best
    args = {"dim": width, "num_heads": [number * count // first for count in heads] if many else number}
    return Resized(replace(spec, args={**spec.args, **args}), width, _unlike(best, size))


def _width(spec: ModelSpec) -> int:
    arguments: Any = model_arguments(spec.name, **spec.args)
    if "dim" not in arguments or "num_heads" not in arguments:
        raise ValueError(f"match: {spec.name} has no width (dim) to change; leave it out of an ablation with match")
    return arguments["dim"]


def _unlike(size: int, original: float) -> float:
    """By the ratio of the sizes of heads, and more so where 8 does not divide them."""
    return abs(math.log(size / original)) + (0.5 if size % 8 else 0.0)
