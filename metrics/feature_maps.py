"""Spatial features of frozen networks, the targets of representation alignment."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from metrics.extractors import PROGRAM, ExtractorError, kind_and_name, load_extractor


class FeatureMaps:
    """The last spatial features [n d h w] of a frozen network: `timm:NAME`, or the path of a program (.pt2 or
    TorchScript) from images in [0, 255]. They are average-pooled to the `grid`, as they take 2 bytes per value in the
    cache. Like a codec, it can build a latent cache by `prepare`."""

    def __init__(
        self, extractor: str, weights_path: str | None, grid: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.name, self.grid, kind = extractor, (grid[0], grid[1]), kind_and_name(extractor)[0]
        if kind not in ("timm", PROGRAM):
            raise ExtractorError(
                f"--alignment.extractor {extractor}: has no features at places; give timm:NAME or a FILE.pt2 you trust"
            )
        try:
            network, sha256, _ = load_extractor(extractor, weights_path)
        except ExtractorError as error:
            raise ExtractorError(str(error).replace("--", "--alignment.")) from error
        network = network.to(device)
        self.maps: Any = network.maps if kind == "timm" else network.module
        self.device = device
        self.identity: dict[str, Any] = {"codec": "features", "sha256": sha256, "grid": list(grid)}
        self.provenance = {**self.identity, "extractor": extractor}

    @torch.inference_mode()
    def prepare(self, images: UInt8[Tensor, "n 3 H W"]) -> Float[Tensor, "n d h w"]:
        flag = f"--alignment.extractor {self.name}"
        output = self.maps(images.to(self.device).float())
        maps = output[0] if isinstance(output, tuple | list) else output
        if maps.ndim != 4:
            raise ExtractorError(f"{flag}: it gives {list(maps.shape)}, not features at their places [n d h w]")
        if any(ours < theirs for ours, theirs in zip(maps.shape[2:], self.grid, strict=True)):
            raise ExtractorError(
                f"{flag}: its features of {images.shape[-1]} pixels are {maps.shape[2]}x{maps.shape[3]}, coarser than "
                f"the backbone's {self.grid[0]}x{self.grid[1]}; take a deeper --alignment.depth or another network"
            )
        if not maps.half().isfinite().all():
            raise ExtractorError(f"{flag}: its features are not finite in half precision; take another network")
        return F.adaptive_avg_pool2d(maps.float(), self.grid)
