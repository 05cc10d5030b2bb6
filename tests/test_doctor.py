"""scripts/doctor.py: what a machine can do, with remedies; versions and shell completion of the commands."""

import itertools
import json
import subprocess
import sys

import torch
from processes import ROOT, run, script

DOCTOR = script("scripts/doctor.py")


def test_the_doctor_says_what_works_and_what_to_do_about_the_rest(monkeypatch, tmp_path):
    environment = {"TORCH_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "CUDA_HOME": "/cuda"}
    command = [sys.executable, "-W", "error", "scripts/doctor.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "CUDA_HOME" not in done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert {"Machine", "Packages", "Weights"} <= set(lines)
    assert "ok  the embedded autoencoders (--autoencoder embedded, embedded-f8c16, embedded-taef2)" in lines
    (hub,) = (line for line in lines if "hub does not answer" in line)
    assert hub.startswith("--")
    (inception,) = (line for line in lines if "Inception, for FID" in line)
    assert inception.startswith("--")
    assert str(tmp_path) in inception
    assert "--weights_path FILE" in inception


def test_a_gpu_that_is_not_of_cuda_is_named(monkeypatch):
    monkeypatch.setattr("machine.accelerator.default_device", lambda: torch.device("mps"))
    findings = [str(finding) for finding in itertools.islice(DOCTOR.machine(), torch.cuda.device_count() + 2)]
    assert findings[-1] == "ok  GPU: mps"


def test_the_doctor_gives_a_remedy_for_what_is_missing_only(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("doctor.hub_answers", lambda: False)
    for finding in [*DOCTOR.packages(), *DOCTOR.weights()]:
        assert str(finding).startswith("ok") == (not finding.remedy), finding
    monkeypatch.setitem(DOCTOR.EXTRAS, "no_such_package", ("nothing", "pip install nothing"))
    assert any(
        str(finding) == "--  no no_such_package, for nothing: pip install nothing" for finding in DOCTOR.packages()
    )


def test_files_put_into_the_cache_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("doctor.hub_answers", lambda: False)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth").touch()
    assert any(str(finding) == "ok  VGG19, for --auxiliary perceptual" for finding in DOCTOR.weights())


def test_commands_tell_their_version_and_complete_their_flags(tmp_path):
    assert run("train.py", "--version", cwd=tmp_path).stdout.strip() == "train.py 0.1.0"
    script = run("evaluate.py", "--print_completion", "shtab-bash", cwd=tmp_path).stdout
    assert "--likelihood" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    schema = json.loads(run("train.py", "--print_completion", "jsonschema", cwd=tmp_path).stdout)
    assert "diffusion" in schema["properties"]
