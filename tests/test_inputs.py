"""What flags name is looked for before libraries are imported, which takes seconds."""

import subprocess
import sys

import pytest
from processes import ROOT

from experiment.config import EvaluationConfig, ExperimentConfig, LogConfig
from experiment.inputs import check_inputs, is_autoencoder, is_name_or_file, is_weights

MISTYPED = {
    "train.py --data.path nowhere": "--data.path nowhere: is neither a folder nor a file; give a folder, a zip",
    "train.py --init_from runs/nowhere": "--init_from runs/nowhere does not exist; give a run's folder",
    "train.py --autoencoder runs/nowhere": "--autoencoder runs/nowhere: no such folder",
    "train.py --sampling.guidance_checkpoint nowhere": "--sampling.guidance_checkpoint nowhere does not exist",
    "train.py --alignment.extractor nowhere.pt2": "--alignment.extractor nowhere.pt2: no such file",
    "train.py --auxiliary [{kind:perceptual,weight:1,network:x.pt2}]": "--auxiliary.network x.pt2: no such file",
    "train.py --log.evaluate_every 9 --evaluation.extractor x.pt2": "--evaluation.extractor x.pt2: no such file",
    "sample.py --checkpoint runs/nowhere": "--checkpoint runs/nowhere does not exist",
    "sample.py --checkpoint embedded --spacing levels.txt": "--sampling.spacing levels.txt: no such file",
    "sample.py --checkpoint embedded --reconstruct 9 --data.path nowhere": "--data.path nowhere: is neither",
    "evaluate.py --samples nowhere": "--samples nowhere does not exist; give a run's folder",
    "evaluate.py --samples embedded --extractor nowhere.pt2": "--extractor nowhere.pt2: no such file",
    "evaluate.py --samples embedded --reference nowhere.npz": "--reference nowhere.npz: no such file",
    "evaluate.py --samples embedded --spacing karras,levels.txt": "--sampling.spacing karras,levels.txt: no such file",
    "evaluate.py --autoencoder embedded,./nowhere": "--autoencoder embedded,./nowhere: no such folder",
    "scripts/ablate.py nowhere.yaml": "--ablation nowhere.yaml: no such file",
    "scripts/ablate.py configs/ablations/skip.yaml --set {data.path:nowhere}": "variant localized: --data.path nowhere",
    "scripts/app.py --checkpoints [embedded,nowhere]": "--checkpoints nowhere does not exist",
    "scripts/compare.py --scores [nowhere.json]": "--scores nowhere.json: no such file",
    "scripts/demo.py --experiment nowhere.yaml": "--experiment nowhere.yaml: no such file",
    "scripts/export_diffusers.py --checkpoint nowhere --output x": "--checkpoint nowhere does not exist",
    "scripts/find_rate.py --data.path nowhere": "--data.path nowhere: is neither",
    "scripts/gallery.py nowhere": "--folder nowhere: no such folder",
    "scripts/gpu_check.py --compare nowhere": "--compare nowhere: no such folder",
    "scripts/import_checkpoint.py --weights nowhere.pt --output x": "--weights nowhere.pt: no such file",
    "scripts/launch_slurm.py --experiment nowhere.yaml": "--experiment nowhere.yaml: no such file",
    "scripts/push_to_hub.py --checkpoint nowhere --repo a/b": "--checkpoint nowhere does not exist",
    "scripts/recognise.py --samples nowhere.npz": "--samples nowhere.npz: no such file",
    "scripts/reconstruct_ema.py --run nowhere --sigma_rel 0.1": "--run nowhere: no such folder",
    "scripts/train_autoencoder.py --data.path nowhere": "--data.path nowhere: is neither",
    "evaluate.py --samples embedded --write_reference ready": "--write_reference ready: give FILE.npz",
    "evaluate.py --samples embedded --output docs": "--output docs: give FILE.json",
    "evaluate.py --autoencoder embedded --output x.png": "--output x.png: give FILE.json",
    "sample.py --checkpoint embedded --output Makefile/new": "--output Makefile/new: nothing can be written in",
    "scripts/recognise.py --classifier docs": "--classifier docs: give FILE.pt2 or FILE.pt",
    "scripts/recognise.py --perceptual features": "--perceptual features: give FILE.pt2 or FILE.pt",
    "scripts/reconstruct_ema.py --run docs --sigma_rel 0.1 --output x.pt": "--output x.pt: give FILE.safetensors",
    "scripts/segment_shapes.py --output docs": "--output docs: give FILE.png or FILE.pdf",
}
ATTEMPTS = """
import contextlib, runpy, sys
for line in sys.argv[1:]:
    sys.argv[:] = [word.replace(":", ": ") if word[0] in "{[" else word for word in line.split()]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert end.code == 2, line
    assert "torch" not in sys.modules, line
"""


def test_what_flags_name_is_missed_before_torch_is_imported():
    lines = list(MISTYPED)
    command = [sys.executable, "-c", ATTEMPTS, *lines]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    errors = done.stderr.splitlines()
    for line, error in zip(lines, errors, strict=True):
        assert MISTYPED[line] in error


def test_only_what_a_training_reads_is_looked_for(monkeypatch):
    config = ExperimentConfig(init_from="gone", evaluation=EvaluationConfig(extractor="gone.pt2"))
    with pytest.raises(ValueError, match="--init_from gone does not exist"):
        check_inputs(config)
    resumed = ExperimentConfig(init_from="gone", resume="runs/x", evaluation=config.evaluation)
    check_inputs(resumed)
    with pytest.raises(ValueError, match=r"--evaluation.extractor gone.pt2: no such file"):
        check_inputs(ExperimentConfig(evaluation=config.evaluation, log=LogConfig(evaluate_every=1)))
    monkeypatch.setenv("RANK", "1")  # whose machine need not see the images
    check_inputs(config)


def test_names_that_are_no_paths_are_left_to_those_who_know_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "sd").mkdir(parents=True)
    known = ("pixel", "embedded-taef2", "stabilityai/sd-vae-ft-ema", "owner/name/vae", "mine/sd", str(tmp_path))
    assert all(map(is_autoencoder, known))
    assert not any(map(is_autoencoder, ("nowhere", "./sd", "/gone/sd", "runs/gone", "mine/sd/gone")))
    assert all(map(is_name_or_file, ("inception", "timm:resnet18.a1_in1k", "karras", "dinov2-vit-b-14")))
    assert not any(map(is_name_or_file, ("gone.pt2", "folder/gone")))
    assert is_weights("DiT-XL-2-256x256")
    assert is_weights("vavae-imagenet256-f16d32-dinov2.pt")
    assert not is_weights("gone.pt")
