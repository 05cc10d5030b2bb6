"""Representation alignment (REPA): hidden states of a backbone learn to resemble the features of a frozen network."""

import math
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from data.image_set import ImageSet
from data.latents import LatentCache
from experiment.build import open_cache
from experiment.config import AlignmentConfig, ExperimentConfig
from machine.randomness import seed_for
from metrics.feature_maps import FeatureMaps
from models.backbone import Backbone
from training.run import Run

PROJECTOR_WIDTH = 2048  # of REPA's MLP (Yu et al. 2025, appendix)


class Alignment(nn.Module):
    """One minus the cosine similarity of projected hidden states and features of the clean image, averaged over
    positions (Yu et al. 2025, eq. 8).

    With `irepa` the projector is a convolution, and features are normalised over the positions of an image, which
    removes their common component (Singh et al. 2025). Hidden states come from the forward pass of the diffusion's
    loss, so that the projector is the only extra cost of a step.
    """

    def __init__(self, backbone: Backbone, config: AlignmentConfig) -> None:
        super().__init__()
        try:
            block, self.width, self.grid = _block_at(backbone, config.depth)
        except ValueError as error:
            raise ValueError(f"--alignment.depth: {error} in this --model") from error
        self.weight, self.kind = config.weight, config.kind
        self._as_tokens, self.is_recording, self._block_output = backbone.as_tokens, False, None
        self.projector: nn.Module
        block.register_forward_hook(self._record)  # before compilation, as later hooks would not be called

    def build_projector(self, num_features: int, seed: int) -> "Alignment":
        """Create the projector to features of this width, with initial weights that depend on the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.kind == "irepa":
                self.projector = nn.Conv2d(self.width, num_features, 3, padding=1)
            else:
                widths = (self.width, PROJECTOR_WIDTH, PROJECTOR_WIDTH, num_features)
                first, second, third = (nn.Conv2d(*pair, 1) for pair in pairwise(widths))
                self.projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
        return self

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, " b"]:
        """Compute the term of each sample from the hidden states of the last call of a `RecordingModel` model."""
        output, self._block_output = self._block_output, None
        assert output is not None
        height, width = self.grid
        hidden = rearrange(self._as_tokens(output), "b (h w) d -> b d h w", h=height, w=width)
        target = features.float()
        if self.kind == "irepa":
            target = (target - target.mean((2, 3), keepdim=True)) / (target.std((2, 3), keepdim=True) + 1e-6)
        similarity = F.cosine_similarity(self.projector(hidden).float(), target, dim=1)
        return 1 - similarity.mean((1, 2))

    def _record(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.is_recording:
            self._block_output = output


class RecordingModel(nn.Module):
    """A model whose calls record hidden states for the alignment."""

    def __init__(self, model: nn.Module, alignment: Alignment) -> None:
        super().__init__()
        self.model, self.alignment = model, alignment

    def forward(self, *inputs: Any, **extras: Any) -> Tensor:
        self.alignment.is_recording = True
        try:
            return self.model(*inputs, **extras)
        finally:
            self.alignment.is_recording = False


def open_alignment(
    run: Run[ExperimentConfig], backbone: Backbone, images: ImageSet
) -> tuple[Alignment, LatentCache] | tuple[None, None]:
    """Create the alignment and open the cache of features of the training images, which is computed on first use. Both
    are None if there is no extractor. Raises a ValueError that names an invalid flag."""
    config, device = run.config.alignment, run.accelerator.device
    if config.extractor is None:
        return None, None
    alignment = Alignment(backbone, config)
    maps = FeatureMaps(config.extractor, config.weights_path, alignment.grid, device)
    run.check_identity(**run.identity, alignment=maps.identity)
    features = open_cache(run.config.data, maps, images, run.accelerator, flips=run.config.data.flip)
    alignment.build_projector(features.stored.shape[2], seed_for(run.config.train.seed, "alignment"))
    return alignment.to(device), features


@torch.no_grad()
def _block_at(backbone: Backbone, depth: float) -> tuple[nn.Module, int, tuple[int, int]]:
    """Find the block at a relative depth, its states' width and their grid, by running the backbone to there."""
    device, was_training, own_blocks = next(backbone.parameters()).device, backbone.training, backbone.repeated_blocks()
    if device.type == "meta":  # it will be sharded
        backbone = deepcopy(backbone).to(device)
    called: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, number=number: called.append(number))
        for number, block in enumerate(backbone.repeated_blocks())
    ]
    x_t, t = torch.zeros(1, backbone.in_channels, *backbone.input_size, device=device), torch.zeros(1, device=device)
    with torch.random.fork_rng(devices=[]):
        (tokens,) = backbone.eval().features(x_t, t, torch.zeros(1, dtype=torch.int64, device=device), [depth])
    backbone.train(was_training)
    for handle in handles:
        handle.remove()
    height, width = backbone.input_size
    grids = ((-(-height // reduction), -(-width // reduction)) for reduction in range(1, height + 1))
    return own_blocks[called[-1]], tokens.shape[2], next(grid for grid in grids if math.prod(grid) == tokens.shape[1])
