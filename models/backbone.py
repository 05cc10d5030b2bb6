"""The contract of backbones: what trainer, samplers and tools ask of one, beside `model(x_t, t, y)`.

A class that derives from `Backbone` sets the four sizes; every method has a default. A plain `nn.Module` with a fitting
constructor and `forward` is given sizes and defaults when it is created by name.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from models.layers import Images, Labels, Times, Tokens

SIZES = ("input_size", "in_channels", "out_channels", "num_classes")
MULTIPLYING = (nn.Linear, _ConvNd, nn.Bilinear, nn.MultiheadAttention)  # layers whose weights multiply features


class Backbone(nn.Module):
    """A network that denoises: `model(x_t, t, y, **extras) -> [b out_channels h w]`.

    `x_t` is [b in_channels h w], `t` [b] the time as the diffusion tells it, `y` [b] labels, of which `num_classes` is
    the null label. A backbone that is built with `second_time=True` may be given `r` [b], told alike: the end of the
    step from `t` that an average velocity is of (Geng et al. 2025, Frans et al. 2024); by default it is `t` itself. One
    that is built with `augment_dim=k` may be given `augment` [b k], how images were changed that it is trained on
    (Karras et al. 2022); by default all 0, which is not at all.
    """

    input_size: tuple[int, int]  # height and width of the latent or image; a constructor may be given a side
    in_channels: int
    out_channels: int  # twice as many where the variance is learned
    num_classes: int  # 0 makes the model unconditional: labels are ignored

    def block_types(self) -> tuple[type[nn.Module], ...]:
        """Classes of the repeated blocks: FSDP shards them, `train.recompute` and `train.compile` are about them, Muon
        takes their matrices, and `features` counts depth by them. They do not lie inside one another."""
        return ()

    def repeated_blocks(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, self.block_types())]

    def features(self, x_t: Images, t: Times, y: Labels, depths: Sequence[float]) -> list[Tokens]:
        """Hidden states after these shares of the blocks, in (0, 1] (REPA: Yu et al. 2025); no further block is run."""
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

    def as_tokens(self, state: Float[Tensor, "b ..."]) -> Tokens:
        """What a block puts out, as the sequence of its positions: sequences as they are, of images their pixels."""
        return state if state.ndim == 3 else rearrange(state, "b d h w -> b (h w) d")

    def encode(self, x_t: Images, t: Times, y: Labels) -> Sequence[Float[Tensor, "b ..."]]:
        """What feature matching compares, the mean over them: hidden states a quarter and half of the way through."""
        return self.features(x_t, t, y, (0.25, 0.5))

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters that weight decay is for, and those that it is not: it is for what multiplies features, not for
        norms, biases, embeddings, positions and scales."""
        layers = [layer for layer in self.modules() if isinstance(layer, MULTIPLYING)]
        weights = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
        decayed = [weight for weight in self.parameters() if id(weight) in weights and weight.ndim > 1]
        multiplying = {id(weight) for weight in decayed}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in multiplying]
        return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]

    def extras(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.forward).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    @property
    def _no_split_modules(self) -> list[str]:
        """The name that Accelerate looks for, of classes that there are."""
        return list(dict.fromkeys(type(block).__name__ for block in self.repeated_blocks()))


class _Reached(Exception):
    """The deepest block that was asked for has run."""


def complete(backbone: Any) -> type[Backbone]:
    """The class itself, or one with its name and the contract's defaults; refuses what cannot be a backbone."""
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
