"""Make an average of any length from a finished run's snapshots (EDM2: Karras et al. 2024, section 3.2).

    python train.py --config EXPERIMENT.yaml --train.ema_profiles '[0.05, 0.1]' --log.checkpoint_every 2000
    python scripts/reconstruct_ema.py --run runs/XSwin --sigma_rel 0.08
    python evaluate.py --samples runs/XSwin/ema-0.08.safetensors

Snapshots are written with every checkpoint, `log.checkpoint_every`; sixteen or more over a run do well, evenly spread
with `log.checkpoint_minutes 0`.
"""

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from settings import within


@dataclass(frozen=True)
class ReconstructConfig:
    """Combine snapshots into one checkpoint file.

    Args:
        run: a run's folder, trained with --train.ema_profiles
        sigma_rel: length of the average: its standard deviation over the length of training; 0.02 to 0.25
        step: the end of training to average up to; by default the last snapshot
        output: file to write; by default runs/NAME/ema-SIGMA.safetensors, with --step ema-SIGMA-STEP.safetensors
    """

    run: Path
    sigma_rel: float = within("(0, inf)")
    step: int | None = within("[0, inf)", None)
    output: Path | None = None


def main(config: ReconstructConfig) -> None:
    """Read the snapshots up to the last, add them up by their weights, write the sum."""
    from tqdm import tqdm

    from checkpoints.averages import first_step, gamma_of, reconstruction_weights
    from checkpoints.checkpoint import open_checkpoint, read_metadata, read_tensors, save_tensors
    from checkpoints.training_state import list_snapshots
    from machine.whole_files import whole

    run, sigma_rel, step = config.run, config.sigma_rel, config.step
    files = list_snapshots(run)
    if not files:
        raise ValueError(f"--run {run}: no snapshots in it; train with --train.ema_profiles '[0.05, 0.1]'")
    last = max(files) if step is None else step
    if last not in files:
        raise ValueError(f"--step {step}: no snapshot of it; there are {', '.join(map(str, files))}")
    files = {number: path for number, path in files.items() if number <= last}
    metadata, names = read_metadata(files[last]), list(read_tensors(files[last]))
    began = json.loads(metadata.pop("began", "{}"))
    lengths = {sigma: gamma_of(float(sigma)) for sigma in sorted({name.split("/", 1)[0] for name in names})}

    @cache
    def shares(first: int) -> dict[tuple[int, str], float]:
        """Of each snapshot, in averages of what was trained from this step on."""
        kept = [(number, sigma) for number in files if number > first for sigma in lengths]
        profiles = [(number - first, lengths[sigma]) for number, sigma in kept]
        weights = reconstruction_weights(profiles, (last - first, gamma_of(sigma_rel)))
        return dict(zip(kept, weights, strict=True))

    total = {}
    for number, path in tqdm(files.items(), desc="snapshots"):
        for full_name, tensor in read_tensors(path).items():
            sigma, name = full_name.split("/", 1)
            if tensor.is_floating_point():
                part = shares(first_step(name, began)).get((number, sigma), 0.0) * tensor.double()
                total[name] = total.get(name, 0.0) + part
            else:
                total[name] = tensor
    path = config.output or run / f"ema-{sigma_rel:g}{'' if step is None else f'-{step}'}.safetensors"
    rounded = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}
    with whole(path) as partial:
        save_tensors(rounded, partial, {**metadata, "step": str(last), "sigma_rel": f"{sigma_rel:g}"})
    open_checkpoint(path)
    print(f"sigma_rel {sigma_rel:g} up to step {last}, from {len(files) * len(lengths)} snapshots: {path}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(ReconstructConfig))
