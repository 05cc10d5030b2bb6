"""The interface of backbones: `model(x_t, t, y)`, and what trainer, samplers and tools need beside it.

A class that derives from `Backbone` sets the four sizes; every method has a default. `create_model` adds sizes and
defaults to a plain `nn.Module` whose constructor and `forward` have the right signatures.
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
MULTIPLYING = (nn.Linear, _ConvNd, nn.Bilinear, nn.MultiheadAttention)  # layers with weight matrices (or kernels)


class Backbone(nn.Module):
    """A denoising network: `model(x_t, t, y, **extras) -> [b out_channels h w]`.

    `x_t` is [b in_channels h w]. `t` [b] is the time, in the units that the diffusion passes to its backbone. `y` [b]
    holds labels; `num_classes` is the null label.

    A backbone built with `second_time=True` accepts a keyword `r` [b], in the units of `t` and `t` itself by default:
    the time at which the average velocity from `t` ends (Geng et al. 2025, Frans et al. 2024). One built with
    `augment_dim=k` accepts a keyword `augment` [b k], which describes the augmentation of each training image (Karras
    et al. 2022); the default, all zeros, means no augmentation. One built with `guidance_input=True` accepts a
    keyword `g` [b], the scale of the guidance that its output includes (Meng et al. 2023); the default, 1, means none.
    """

    input_size: tuple[int, int]  # height and width of the latent or image; constructors also accept one side
    in_channels: int
    out_channels: int  # twice in_channels where the variance is learned
    num_classes: int  # 0 makes the model unconditional: labels are ignored

    def block_types(self) -> tuple[type[nn.Module], ...]:
        """Classes of the repeated blocks, none of which contains another. FSDP shards these blocks, `train.recompute`
        and `train.compile` wrap them, Muon optimises their matrices, and `features` counts depth in them."""
        return ()

    def repeated_blocks(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, self.block_types())]

    def features(self, x_t: Images, t: Times, y: Labels, depths: Sequence[float]) -> list[Tokens]:
        """Return the hidden states at relative depths in (0, 1], counted in blocks (REPA: Yu et al. 2025). The forward
        pass stops after the deepest block that is needed."""
        num_blocks = len(self.repeated_blocks())
        if not num_blocks or not all(0 < depth <= 1 for depth in depths):
            raise ValueError(f"features at depths {list(depths)}: give shares in (0, 1]; there are {num_blocks} blocks")
        block_numbers = [max(1, math.ceil(depth * num_blocks - 1e-6)) for depth in depths]
        hidden_states: list[Tensor] = []

        def record(block: nn.Module, inputs: Any, output: Tensor) -> None:
            hidden_states.append(output)
            if len(hidden_states) == max(block_numbers):
                raise _StopForward

        handles = [block.register_forward_hook(record) for block in self.repeated_blocks()]
        try:
            self(x_t, t, y)
        except _StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [self.as_tokens(hidden_states[number - 1]) for number in block_numbers]

    def as_tokens(self, state: Float[Tensor, "b ..."]) -> Tokens:
        """Convert a block's output to a token sequence; feature maps [b d h w] are flattened, sequences unchanged."""
        return state if state.ndim == 3 else rearrange(state, "b d h w -> b (h w) d")

    def encode(self, x_t: Images, t: Times, y: Labels) -> Sequence[Float[Tensor, "b ..."]]:
        """Return the activations that the feature-matching loss compares: by default, at 1/4 and 1/2 of the depth."""
        return self.features(x_t, t, y, (0.25, 0.5))

    def param_groups(self) -> list[dict[str, Any]]:
        """Split the parameters into two optimizer groups: with weight decay, and without. Only weight matrices and
        kernels decay; norms, biases, embeddings, positions and scales do not."""
        layers = [layer for layer in self.modules() if isinstance(layer, MULTIPLYING)]
        matrices = {id(weight) for layer in layers for weight in layer.parameters(recurse=False) if weight.ndim > 1}
        decayed = [parameter for parameter in self.parameters() if id(parameter) in matrices]
        others = [parameter for parameter in self.parameters() if id(parameter) not in matrices]
        return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]

    def extras(self) -> tuple[str, ...]:
        """Names of the keyword-only arguments that `forward` accepts beside `(x_t, t, y)`."""
        parameters = inspect.signature(self.forward).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the block classes, where Accelerate looks for them to wrap blocks in FSDP."""
        return list(dict.fromkeys(type(block).__name__ for block in self.repeated_blocks()))


class _StopForward(Exception):
    """Raised in a hook to end a forward pass early."""


def as_backbone(backbone: Any) -> type[Backbone]:
    """Return the class itself or, for a plain `nn.Module`, a subclass with the defaults of `Backbone`. Raises
    ValueError if its constructor or `forward` has the wrong signature."""
    name = getattr(backbone, "__name__", backbone)
    if not inspect.isclass(backbone) or not issubclass(backbone, nn.Module):
        raise ValueError(f"--model: {name} is no nn.Module class, which a backbone must be")
    parameters = inspect.signature(backbone).parameters
    if missing := [size for size in SIZES if size not in parameters]:
        raise ValueError(f"--model: the constructor of {name} must take {', '.join(SIZES)}; it lacks {missing[0]}")
    try:
        inspect.signature(backbone.forward).bind("model", "x_t", "t", "y")
    except TypeError as error:
        raise ValueError(f"--model: {name} must have forward(self, x_t, t, y) ({error})") from error
    if issubclass(backbone, Backbone):
        return backbone
    return type(name, (backbone, Backbone), {"__module__": backbone.__module__})
