"""Reconstruct an average of any length from a finished run's snapshots (EDM2: Karras et al. 2024, section 3.2).

    python train.py --config EXPERIMENT.yaml --train.ema_profiles '[0.05, 0.1]' --log.checkpoint_every 2000
    python scripts/reconstruct_ema.py --run runs/XSwin --sigma_rel 0.08
    python evaluate.py --samples runs/XSwin/ema-0.08.safetensors

Snapshots are written with every checkpoint, by `log.checkpoint_every`. Use sixteen or more per run, evenly spaced, and
`log.checkpoint_minutes 0`.
"""

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from settings import reads, within, writes


@dataclass(frozen=True)
class ReconstructConfig:
    """Combine snapshots into one checkpoint file.

    Args:
        run: folder of a run with --train.ema_profiles
        sigma_rel: length of the average, as its standard deviation over the length of training; 0.02 to 0.25
        step: average up to this step, which must have a snapshot; by default the last one
        output: file to write; by default runs/NAME/ema-SIGMA.safetensors, with --step ema-SIGMA-STEP.safetensors
    """

    run: Path = reads("folder")
    sigma_rel: float = within("(0, inf)")
    step: int | None = within("[0, inf)", None)
    output: Path | None = writes(".safetensors", None)


def main(config: ReconstructConfig) -> None:
    """Write the weighted sum of all snapshots up to the last one."""
    from tqdm import tqdm

    from checkpoints.averages import first_step, gamma_from_sigma_rel, reconstruction_weights
    from checkpoints.checkpoint import open_checkpoint, read_metadata, read_tensors, save_tensors
    from checkpoints.training_state import list_snapshots
    from experiment.inputs import check_output
    from machine.atomic_files import atomic_path

    run, sigma_rel, step = config.run, config.sigma_rel, config.step
    files = list_snapshots(run)
    if not files:
        raise ValueError(f"--run {run}: no snapshots in it; train with --train.ema_profiles '[0.05, 0.1]'")
    output = config.output or run / f"ema-{sigma_rel:g}{'' if step is None else f'-{step}'}.safetensors"
    check_output("--output", output)
    last = max(files) if step is None else step
    if last not in files:
        raise ValueError(f"--step {step}: no snapshot of it; there are {', '.join(map(str, files))}")
    files = {snapshot_step: path for snapshot_step, path in files.items() if snapshot_step <= last}
    metadata, names = read_metadata(files[last]), list(read_tensors(files[last]))
    began = json.loads(metadata.pop("began", "{}"))
    lengths = {sigma: gamma_from_sigma_rel(float(sigma)) for sigma in sorted({name.split("/", 1)[0] for name in names})}

    @cache
    def coefficients(first: int) -> dict[tuple[int, str], float]:
        """Coefficient of each snapshot for parameters that are trained from the step `first` on."""
        snapshots = [(snapshot_step, sigma) for snapshot_step in files if snapshot_step > first for sigma in lengths]
        profiles = [(snapshot_step - first, lengths[sigma]) for snapshot_step, sigma in snapshots]
        weights = reconstruction_weights(profiles, (last - first, gamma_from_sigma_rel(sigma_rel)))
        return dict(zip(snapshots, weights, strict=True))

    total = {}
    for snapshot_step, path in tqdm(files.items(), desc="snapshots"):
        for full_name, tensor in read_tensors(path).items():
            sigma, name = full_name.split("/", 1)
            if tensor.is_floating_point():
                coefficient = coefficients(first_step(name, began)).get((snapshot_step, sigma), 0.0)
                total[name] = total.get(name, 0.0) + coefficient * tensor.double()
            else:
                total[name] = tensor
    rounded = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}
    with atomic_path(output, keep=True) as partial:  # scores may be of the average up to an earlier step
        save_tensors(rounded, partial, {**metadata, "step": str(last), "sigma_rel": f"{sigma_rel:g}"})
    open_checkpoint(output)
    print(f"sigma_rel {sigma_rel:g} up to step {last}, from {len(files) * len(lengths)} snapshots: {output}")


if __name__ == "__main__":
    run_main(main, ReconstructConfig)
