"""The contract of backbones: what trainer, samplers and tools ask of one, beside `model(x_t, t, y)`.

A class that derives from `Backbone` sets the four sizes; every method has a default. A plain `nn.Module` with a fitting
constructor and `forward` is given sizes and defaults when it is created by name.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

SIZES = ("input_size", "in_channels", "out_channels", "num_classes")
MULTIPLYING = (nn.Linear, _ConvNd, nn.Bilinear, nn.MultiheadAttention)  # layers whose weights multiply features


class Backbone(nn.Module):
    """A network that denoises: `model(x_t, t, y, **extras) -> [b out_channels h w]`.

    `x_t` is [b in_channels h w], `t` [b] the time as the diffusion tells it, `y` [b] labels, of which `num_classes` is
    the null label. `out_channels` are twice as many where the variance is learned.

    Args:
        input_size: side of the latent or image, or height and width
        in_channels: of the latent or image
        out_channels: to put out
        num_classes: 0 makes the model unconditional: labels are ignored
    """

    input_size: tuple[int, int]
    in_channels: int
    out_channels: int
    num_classes: int

    def block_types(self) -> tuple[type[nn.Module], ...]:
        """Classes of the repeated blocks: FSDP shards them and recomputes them, torch.compile compiles them, Muon takes
        their matrices, and `features` counts depth by them. They do not lie inside one another."""
        return ()

    def repeated_blocks(self) -> list[nn.Module]:
        """The modules of these classes."""
        return [module for module in self.modules() if isinstance(module, self.block_types())]

    def features(
        self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], y: Int64[Tensor, " b"], depths: Sequence[float]
    ) -> list[Float[Tensor, "b n d"]]:
        """Hidden states as sequences, after these shares of the blocks: above 0, and 1 for all of them.

        What representation alignment (Yu et al. 2025, REPA) and feature matching compare. No further block is run.

        Raises:
            ValueError: for a depth out of (0, 1], or a backbone that names no blocks.
        """
        num_blocks = len(self.repeated_blocks())
        if not num_blocks or not all(0 < depth <= 1 for depth in depths):
            raise ValueError(f"features at depths {list(depths)}: give shares in (0, 1]; there are {num_blocks} blocks")
        numbers = [max(1, math.ceil(depth * num_blocks - 1e-6)) for depth in depths]
        states: list[Tensor] = []

        def keep(block: nn.Module, inputs: Any, state: Tensor) -> None:
            states.append(state)
            if len(states) == max(numbers):
                raise _Reached

        handles = [block.register_forward_hook(keep) for block in self.repeated_blocks()]
        try:
            self(x_t, t, y)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [self.as_tokens(states[number - 1]) for number in numbers]

    def as_tokens(self, state: Float[Tensor, "b ..."]) -> Float[Tensor, "b n d"]:
        """What a block puts out, as the sequence of its positions: sequences as they are, of images their pixels."""
        return state if state.ndim == 3 else rearrange(state, "b d h w -> b (h w) d")

    def encode(
        self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], y: Int64[Tensor, " b"]
    ) -> Sequence[Float[Tensor, "b ..."]]:
        """What feature matching compares, the mean over them: hidden states a quarter and half of the way through."""
        return self.features(x_t, t, y, (0.25, 0.5))

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters that weight decay is for, and those that it is not: it is for what multiplies features, not for
        norms, biases, embeddings, positions and scales."""
        multiplying = {
            id(parameter)
            for layer in self.modules()
            if isinstance(layer, MULTIPLYING)
            for parameter in layer.parameters(recurse=False)
            if parameter.ndim > 1
        }
        decayed = [parameter for parameter in self.parameters() if id(parameter) in multiplying]
        rest = [parameter for parameter in self.parameters() if id(parameter) not in multiplying]
        return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]

    def extras(self) -> tuple[str, ...]:
        """Names of further inputs that `forward` takes: its keywords."""
        parameters = inspect.signature(self.forward).parameters.values()
        return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)

    @property
    def _no_split_modules(self) -> list[str]:
        """The name that Accelerate looks for, of classes that there are."""
        return list(dict.fromkeys(type(block).__name__ for block in self.repeated_blocks()))


class _Reached(Exception):
    """The deepest block that was asked for has run."""


def complete(backbone: Any) -> type[Backbone]:
    """The class itself, or one with its name and the contract's defaults.

    Raises:
        ValueError: for what cannot be a backbone, in words.
    """
    name = getattr(backbone, "__name__", backbone)
    if not inspect.isclass(backbone) or not issubclass(backbone, nn.Module):
        raise ValueError(f"--model: {name} is no nn.Module class, which a backbone must be")
    accepted = inspect.signature(backbone).parameters
    if lacking := [size for size in SIZES if size not in accepted]:
        raise ValueError(f"--model: the constructor of {name} must take {', '.join(SIZES)}; it lacks {lacking[0]}")
    try:
        inspect.signature(backbone.forward).bind("model", "x_t", "t", "y")
    except TypeError as error:
        raise ValueError(f"--model: {name} must have forward(self, x_t, t, y) ({error})") from error
    if issubclass(backbone, Backbone):
        return backbone
    return type(name, (backbone, Backbone), {"__module__": backbone.__module__})
