"""The exponential average of a model's weights: parameters and buffers, in float32."""

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from machine.sharding import is_sharded, own_part, part_like, whole


class EMA:
    """`average <- decay * average + (1 - decay) * value`; the rising decay lets short runs forget their initialisation.

    Floating buffers are averaged like parameters. Parameters that a step left alone, as it gave gradients to others
    only, stay as they are, and their steps count from the first that trained them: each stage of a model that is
    trained in stages has an average of its own training. Where training shards the model, each process averages its
    parts.
    """

    def __init__(self, model: nn.Module, max_decay: float) -> None:
        if not 0 <= max_decay < 1:
            raise ValueError(f"--train.ema_decay {max_decay} must lie in [0, 1)")
        self.max_decay = max_decay
        self._model = deepcopy(model).float().eval().requires_grad_(False)
        self._parts: dict[str, Tensor] = {}  # of a sharded model; else the model holds the averages
        self._is_whole = True
        # Of parameters that the first step left alone: the first one that did not, as soon as it is known.
        self.began: dict[str, int | None] | None = None

    def decay(self, step: int) -> float:
        """Of optimizer step `step`, from 0."""
        return min(self.max_decay, (1 + step) / (10 + step))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Averages of parameters and buffers, by name."""
        return self._parts or self._model.state_dict()

    @property
    def model(self) -> nn.Module:
        """The averaged model in eval mode; of a sharded one, for which every process has to ask, until the next
        update."""
        if not self._is_whole:
            for name, tensor in self._model.state_dict(keep_vars=True).items():
                tensor.data = whole(self._parts[name])
            self._is_whole = True
        return self._model

    def shard_like(self, model: nn.Module) -> None:
        """Keep the parts that this process has of `model`, if that is sharded."""
        if is_sharded(model):
            values = model.state_dict()
            self._parts = {name: part_like(part, values[name]).clone() for name, part in self.tensors.items()}
            self.let_go()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        self.let_go()
        current = model.state_dict(keep_vars=True)
        parameters = {name: value for name, value in current.items() if isinstance(value, nn.Parameter)}
        left_alone = {name for name, parameter in parameters.items() if parameter.grad is None}
        if len(left_alone) == len(parameters):
            left_alone = set()
        if self.began is None:
            self.began = dict.fromkeys(sorted(left_alone))
        self.began |= {name: step for name, first in self.began.items() if first is None and name not in left_alone}
        pairs: defaultdict[int, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, average in self.tensors.items():
            if name in left_alone:
                continue
            if average.is_floating_point():
                averages, values = pairs[first_step(name, self.began)]
                averages.append(own_part(average))
                values.append(own_part(current[name]).to(average.dtype))
            else:
                average.copy_(current[name])
        for first, (averages, values) in pairs.items():
            torch._foreach_lerp_(averages, values, 1 - self.decay(step - first))

    @torch.no_grad()
    def drift(self, model: nn.Module) -> float:
        """How far the average lags behind the weights: norm of the difference over norm of the weights."""
        averages, current = self.tensors, model.state_dict()
        names = [name for name, _ in self._model.named_parameters()]
        gap = get_total_norm([averages[name] - current[name] for name in names])
        return (whole(gap) / whole(get_total_norm([current[name] for name in names]))).item()

    def state(self) -> dict[str, int | None] | None:
        return self.began

    def restore(self, state: dict[str, int | None] | None) -> None:
        self.began = state and dict(state)

    def let_go(self) -> None:
        """Free the whole of a sharded model; its parts stay."""
        if self._parts:
            for tensor in self._model.state_dict(keep_vars=True).values():
                tensor.data = tensor.new_empty(0)
            self._is_whole = False


def first_step(name: str, began: Mapping[str, int | None]) -> int:
    """The one that began to train a parameter, or a buffer's layer."""
    if name in began:
        return began[name] or 0
    layer = name.rpartition(".")[0]
    return next((first for parameter, first in began.items() if parameter.rpartition(".")[0] == layer), None) or 0
