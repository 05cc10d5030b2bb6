"""Moving averages of a model's parameters and buffers, in float32."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from machine.sharding import full_tensor, is_sharded, local_shard


class Average:
    """A moving average `average <- decay(step) * average + (1 - decay(step)) * value` of parameters and float buffers.

    Parameters that have no gradient while others do are left out. Their steps count from the first step that trains
    them, so the average of each stage of a model covers the training of that stage. With a sharded model, each process
    averages its own shards; it holds no weights until `shard_like` if it is created `sharded`, so that no full copy is
    made. Updates also apply to the averages in `profiles`.
    """

    def __init__(self, model: nn.Module, decay: Callable[[int], float], *, sharded: bool = False) -> None:
        self.decay = decay
        self.profiles: dict[float, Average] = {}  # further averages of the same weights, by their relative length
        copy = _copy_without_weights(model) if sharded else deepcopy(model)
        self._model = copy.float().eval().requires_grad_(False)
        self.tensors: dict[str, Tensor] = self._model.state_dict()  # averages by name, or their shards
        self._is_sharded, self._is_whole = False, True
        self._places: Places | None = None  # of the tensors of the model that was averaged last
        self._groups: Groups | None = None
        # For each parameter that the first step did not train: the first step that did, or None until then.
        self.began: dict[str, int | None] | None = None

    @property
    def model(self) -> nn.Module:
        """The averaged model in eval mode, until the next update; a collective operation if it is sharded."""
        if not self._is_whole:
            for name, tensor in self._model.state_dict(keep_vars=True).items():
                tensor.data = full_tensor(self.tensors[name])
            self._is_whole = True
        return self._model

    def shard_like(self, model: nn.Module) -> None:
        """Start the averages of a model that has been sharded, if it has, from its shards."""
        for average in (self, *self.profiles.values()) if is_sharded(model) else ():
            values = {name: value.detach().clone() for name, value in model.state_dict().items()}
            average.tensors = {name: v.float() if v.is_floating_point() else v for name, v in values.items()}
            average._is_sharded, average._groups = True, None
            average.free_whole_model()
            average._model.to(next(iter(values.values())).device)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after optimizer step `step` (from 0)."""
        for average in self.profiles.values():
            average.update(model, step)
        self.free_whole_model()
        if self._places is None or self._places.model is not model:
            self._places, self._groups = Places(model), None
        current, parameters = self._places.tensors(), self._places.parameters
        untrained = {name for name in parameters if current[name].grad is None}
        if len(untrained) == len(parameters):  # gradients have been freed: all were trained
            untrained = set()
        if self.began is None:
            self.began = dict.fromkeys(sorted(untrained))
        if starting := [name for name, first in self.began.items() if first is None and name not in untrained]:
            self.began |= dict.fromkeys(starting, step)
            self._groups = None
        if self._groups is None or self._groups.untrained != untrained:
            self._groups = Groups(self.tensors, untrained, self.began)
        for first, averages in self._groups.by_first_step.items():
            values = [local_shard(current[name]).to(average.dtype) for name, average in averages.items()]
            torch._foreach_lerp_([*averages.values()], values, 1 - self.decay(step - first))
        for name, average in self._groups.copied.items():
            average.copy_(current[name])

    def state(self) -> dict[str, int | None] | None:
        """The state that checkpoints save in addition to the tensors."""
        return self.began

    def restore(self, state: dict[str, int | None] | None) -> None:
        """Load the state that `state` returned."""
        for average in (self, *self.profiles.values()):
            average.began, average._groups = state and dict(state), None

    def free_whole_model(self) -> None:
        """Free the unsharded copy of a sharded model, and keep the shards."""
        if self._is_sharded and self._is_whole:
            for tensor in self._model.state_dict(keep_vars=True).values():
                tensor.data = tensor.new_empty(0)
            self._is_whole = False


class Places:
    """Where the tensors of a model's `state_dict` are. They are looked up there at each step, since a dictionary of all
    of them takes long to make. Only a model whose `state_dict` computes tensors makes one at each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, state = model, model.state_dict(keep_vars=True)
        self.parameters = [name for name, value in state.items() if isinstance(value, nn.Parameter)]
        self._owners: list[tuple[str, dict[str, Any], str]] = [
            (f"{path}.{key}".removeprefix("."), owner, key)
            for path, module in model.named_modules(remove_duplicate=False)
            for owner in (module._parameters, module._buffers)
            for key in owner
        ]
        self._owners = [place for place in self._owners if place[0] in state]
        found = {name: owner[key] for name, owner, key in self._owners}
        self._is_computed = state.keys() != found.keys() or any(found[name] is not state[name] for name in state)

    def tensors(self) -> dict[str, Any]:
        if self._is_computed:
            return self.model.state_dict(keep_vars=True)
        return {name: owner[key] for name, owner, key in self._owners}


class Groups:
    """The averages to update, by the first step that trained them, and integers to copy; without the `untrained`."""

    def __init__(self, tensors: Mapping[str, Tensor], untrained: Set[str], began: Mapping[str, int | None]) -> None:
        self.untrained = untrained
        self.by_first_step: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        self.copied: dict[str, Tensor] = {}
        for name, average in tensors.items():
            if name not in untrained and average.is_floating_point():
                self.by_first_step[first_step(name, began)][name] = local_shard(average)
            elif name not in untrained:
                self.copied[name] = average


def _copy_without_weights(model: nn.Module) -> nn.Module:
    """Copy a model with empty tensors in place of what its `state_dict` holds."""
    empty: dict[int, Tensor] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        nothing = torch.empty(0, dtype=tensor.dtype)
        empty[id(tensor)] = nn.Parameter(nothing) if isinstance(tensor, nn.Parameter) else nothing
    return deepcopy(model, empty)


def first_step(name: str, began: Mapping[str, int | None]) -> int:
    """Return the first step that trained a parameter or, for a buffer, a parameter of its layer."""
    if name in began:
        return began[name] or 0
    layer = name.rpartition(".")[0]
    return next((first for parameter, first in began.items() if parameter.rpartition(".")[0] == layer), None) or 0


def power_decay(sigma_rel: float) -> Callable[[int], float]:
    """Return the decay of a power-function average, in which step t has a weight proportional to t^gamma.

    The average's length grows with training: `sigma_rel` is the standard deviation of its profile over the length of
    training (EDM2, Karras et al. 2024, eq. 3).
    """
    gamma = gamma_from_sigma_rel(sigma_rel)
    return lambda step: (1 - 1 / (step + 1)) ** (gamma + 1)


class EMA(Average):
    """The exponential average that is sampled and evaluated; its decay rises, so that short runs forget their
    initialisation. `profiles` are power-function averages, from whose snapshots `scripts/reconstruct_ema.py`
    reconstructs others."""

    def __init__(
        self, model: nn.Module, max_decay: float, profiles: Sequence[float] = (), *, sharded: bool = False
    ) -> None:
        if not 0 <= max_decay < 1:
            raise ValueError(f"--train.ema_decay {max_decay} must lie in [0, 1)")
        super().__init__(model, lambda step: min(max_decay, (1 + step) / (10 + step)), sharded=sharded)
        self.profiles = {sigma: Average(model, power_decay(sigma), sharded=sharded) for sigma in profiles}

    @torch.no_grad()
    def drift(self, model: nn.Module) -> float:
        """Return how far the average lags behind the weights: norm of the difference over norm of the weights."""
        averages, current = self.tensors, model.state_dict()
        names = [name for name, _ in self._model.named_parameters()]
        difference = get_total_norm([averages[name] - current[name] for name in names])
        return (full_tensor(difference) / full_tensor(get_total_norm([current[name] for name in names]))).item()


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent of a power-function average from its relative length: the positive root of `(gamma + 1) =
    sigma_rel^2 (gamma + 2)^2 (gamma + 3)` (Karras et al. 2024, appendix C)."""
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"--train.ema_profiles {sigma_rel}: lengths lie between 0 and 0.28; EDM2 keeps 0.05, 0.1")
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


Snapshot = tuple[int | float, float]  # (steps trained, gamma)


def reconstruction_weights(snapshots: Sequence[Snapshot], target: Snapshot) -> list[float]:
    """Return the weights of snapshots whose sum approximates a target average. They are a least-squares fit of the
    profiles over training (Karras et al. 2024, section 3.2), scaled to sum to one as in EDM2's code."""
    gram = [[_overlap(a, b) for b in snapshots] for a in snapshots]
    right = [_overlap(a, target) for a in snapshots]
    weights = np.linalg.lstsq(np.array(gram), np.array(right), rcond=None)[0]
    return (weights / weights.sum()).tolist()


def _overlap(a: Snapshot, b: Snapshot) -> float:
    """Return the inner product of two profiles `(gamma + 1) tau^gamma / t^(gamma + 1)`, tau from 0 to t."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    shorter = min(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / shorter
    return scale * (shorter / t_a) ** (gamma_a + 1) * (shorter / t_b) ** (gamma_b + 1)
