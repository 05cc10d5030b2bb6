"""Score a checkpoint, a folder or an npz against held-out images; or measure autoencoders on them.

python evaluate.py --samples runs/XSwin
python evaluate.py --samples runs/XSwin --guidance_scale 1,1.5,2,4 --num_steps 20,50 --trials 3 --baselines true
python evaluate.py --samples samples.npz --data.path caltech101.zip --extractor mobilenet_v2.pt
python evaluate.py --samples runs/DiT-XL-2-256 --reference VIRTUAL_imagenet256_labeled.npz --num_samples 50000
python evaluate.py --autoencoder embedded,stabilityai/sd-vae-ft-ema --data.path caltech101.zip
"""

from dataclasses import replace

from evaluation.flags import EvaluateConfig, check, is_run
from experiment.cli import run_main
from experiment.config import EvaluationConfig
from machine.stopping import without_garbage_collection
from metrics.scores import check_metrics
from settings import set_values


def main(config: EvaluateConfig) -> None:
    """Combine flags with the configuration of the checkpoint, and score samples or measure autoencoders."""
    with without_garbage_collection():
        from checkpoints.checkpoint import open_checkpoint
        from evaluation.autoencoder_scores import measure_autoencoders
        from evaluation.command import Command
        from evaluation.scoring import Scorer
        from evaluation.sources import rename_flag
        from experiment.build import merge_data_flags
        from machine.accelerator import open_accelerator
        from metrics.self_check import self_check

    check(config)
    accelerator = open_accelerator(config.precision)
    owner = config.checkpoint or (config.samples if config.samples and is_run(config.samples) else None)
    with rename_flag("--checkpoint" if config.checkpoint else "--samples", "--checkpoint"):
        checkpoint = open_checkpoint(owner, accelerator) if owner else None
    flags = {name: value for name, value in set_values(config).items() if name in EvaluationConfig.__dataclass_fields__}
    if "extractor" in flags:
        flags = {"weights_path": None} | flags  # the configured weights belong to the other extractor
    evaluation = replace(checkpoint.config.evaluation if checkpoint else EvaluationConfig(), **flags)
    check_metrics(evaluation.metrics)
    data = merge_data_flags(checkpoint.config.data if checkpoint else None, config.data)
    if config.self_check:
        accelerator.print(self_check(Scorer(evaluation, accelerator).extractor))
    elif config.samples is None:
        names = [name.strip() for name in str(config.autoencoder).split(",")]
        network = (config.perceptual, config.heads)
        accelerator.print(measure_autoencoders(names, data, evaluation, network, accelerator, config.output))
    else:
        command = Command(config, config.samples, checkpoint, data, Scorer(evaluation, accelerator))
        inputs = command.open_inputs()  # all of them first, so that errors come early
        results = command.score(inputs)
        if accelerator.is_main_process:
            print(command.report(inputs, results))  # before any file is written: if that fails, no scores are lost
            print("written: " + ", ".join(map(str, command.write(inputs, results))))


if __name__ == "__main__":
    run_main(main, EvaluateConfig)
