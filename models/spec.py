"""A backbone, so that it can be built again."""

from dataclasses import dataclass

import torch

from models import create_model
from models.backbone import Backbone


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a backbone again: the configuration's part, and what followed from the data."""

    name: str
    args: dict
    input_size: tuple[int, int]
    in_channels: int
    out_channels: int
    num_classes: int

    def build(self) -> Backbone:
        """The backbone with fresh weights.

        Raises:
            ValueError: when name or arguments do not fit; nothing is allocated before that is known.
        """
        self.build_on_meta()
        return self._create()

    def build_on_meta(self) -> Backbone:
        """The backbone without memory for its weights: validates the arguments, counts parameters."""
        with torch.device("meta"):
            return self._create()

    def _create(self) -> Backbone:
        return create_model(
            self.name,
            input_size=self.input_size,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            num_classes=self.num_classes,
            **self.args,
        )
