"""Checkpoints of an autoencoder's training: `ema.safetensors`, in `state/` a file a network and optimizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from autoencoding.autoencoder_config import AutoencodingConfig
from checkpoints.averages import EMA
from checkpoints.checkpoint import (
    WEIGHTS,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    read_metadata,
    read_tensors,
    same_identity,
    save_tensors,
)
from machine.checkpoint_folder import checkpoint_path, rotate, write_checkpoint
from machine.sharding import gather


def save(
    folder: Path,
    *,
    step: int,
    ema: EMA,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    config: AutoencodingConfig,
    identity: Mapping[str, Mapping[str, Any]],
    progress: Mapping[str, Any],
    rotates: bool = True,
) -> None:
    """Write `folder/<step>` whole or not at all, then, if it `rotates`, drop what the configuration does not keep;
    `identity` is for `check_identity`, `progress` what resuming needs beside tensors: JSON.

    Raises:
        OSError: when it cannot be written; older checkpoints stay.
    """

    def fill(checkpoint: Path) -> None:
        state = checkpoint / "state"
        state.mkdir()
        metadata = {"config": json.dumps(config.to_dict()), "identity": json.dumps(identity)}
        save_tensors(gather(ema.tensors, keep=True), checkpoint / WEIGHTS, metadata)
        for name, network in networks.items():
            save_file(gather(network.state_dict(), keep=True), state / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            save_file(gather(optimizer_tensors(optimizer), keep=True), state / f"optimizer-{name}.safetensors")
        (state / "progress.json").write_text(json.dumps({"step": step, **progress}))

    write_checkpoint(checkpoint_path(folder, step), fill)
    if rotates:
        rotate(folder, keep=config.log.keep_checkpoints)


def check_identity(checkpoint: Path, identity: Mapping[str, Mapping[str, Any]]) -> None:
    """That the splits are by their content those that it was trained with; older checkpoints name none.

    Raises:
        CheckpointError: naming the flag, and what differs.
    """
    known = json.loads(read_metadata(checkpoint / WEIGHTS).get("identity", "{}"))
    for part, values in identity.items():
        same_identity(checkpoint / WEIGHTS, part, known.get(part, {}), values)


def load(
    checkpoint: Path,
    ema: EMA,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> dict[str, Any]:
    """Put a checkpoint into the objects; returns its `progress`, and `step`, the steps done.

    Raises:
        CheckpointError: when it does not fit.
    """
    state = checkpoint / "state"
    load_weights(ema.tensors, read_tensors(checkpoint / WEIGHTS), checkpoint)
    for name, network in networks.items():
        load_weights(network.state_dict(), read_tensors(state / f"{name}.safetensors"), checkpoint)
    for name, optimizer in optimizers.items():
        load_optimizer(optimizer, read_tensors(state / f"optimizer-{name}.safetensors"))
    return json.loads((state / "progress.json").read_text())
