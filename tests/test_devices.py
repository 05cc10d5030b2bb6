"""The programs on a simulated GPU (tests/pretend.py), compared with the CPU."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from processes import IN_FILES, TINY, log, run
from test_backbones import SMALL

from experiment.mappings import flatten
from metrics.programs import save_program
from models import class_of


def pretended(*arguments, cwd, device="gpu"):
    own = {"PRETEND": device, "ACCELERATE_USE_CPU": "true" if device == "cpu" else "false"}
    return run("tests/pretend.py", *arguments, cwd=cwd, **own)


def there(*arguments, cwd, device="gpu"):
    """Run a program on the simulated device; returns how often each file waited for it."""
    return json.loads(pretended(*arguments, cwd=cwd, device=device).stdout.splitlines()[-1])


def losses(folder, name):
    return {line["step"]: line["loss"] for line in log(folder, name) if "loss" in line}


class MeanColors(torch.nn.Module):
    def forward(self, images: torch.Tensor):
        means = images.float().mean(dim=(2, 3)) / 255
        return means, torch.softmax(4 * means, dim=1)


def score_values(record):
    return [row["scores"]["frechet_distance[colors]"]["value"] for row in record["rows"]]


STEPS = TINY["train"]["num_steps"]
LOOKS = 5  # at three looks and two saves, whether weights are finite
NOW_AND_THEN = {  # lines of the log, checkpoints
    "training/meter.py",
    "training/inspection.py",
    "checkpoints/averages.py",
    "machine/sharding.py",
}
ONCE = {"data/encoding.py", "autoencoders/codec.py", "sampling/generation.py"}  # encoding, samples that are there


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder, there("train.py", "--config", "tiny.yaml", cwd=folder)


def test_training_is_that_of_the_cpu_and_waits_once_a_step(trained, folder):
    elsewhere, waits = trained
    for ours, theirs in zip(log(elsewhere, "tiny"), log(folder, "tiny"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "gradient_norm", "validation_loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert (waits.pop("training/interruption.py"), waits.pop("training/guard.py")) == (STEPS, LOOKS)
    sent = {name.partition(",")[0]: waits.pop(name) for name in list(waits) if name.endswith(", sending")}
    assert sent["training/batches.py"] == 2  # labels, an epoch's order
    assert sent["data/latents.py"] == 2 + 8  # latents of both splits; images and views of two batches of two looks
    assert "training/meter.py" not in sent
    assert set(waits) <= ONCE | NOW_AND_THEN


def test_latents_read_from_files_train_as_from_memory_without_waiting_for_the_device(folder, tmp_path):
    (tmp_path / "in_files.py").write_text(IN_FILES)
    waits = there(tmp_path / "in_files.py", "--config", folder / "tiny.yaml", cwd=tmp_path)
    assert losses(tmp_path, "tiny") == pytest.approx(losses(folder, "tiny"), rel=1e-5)
    assert waits.pop("training/interruption.py") == STEPS
    assert waits.pop("training/batches.py, sending") == 2  # labels, an epoch's order
    assert not [name for name in waits if name.startswith(("training/batches.py", "data/shards.py"))]


def test_targets_from_the_model_itself_equal_the_cpus_without_waiting_for_the_device(tmp_path):
    """These are MeanFlow's forward derivatives and a shortcut's own predictions."""
    kinds = {"meanflow": {"omega": 0.5, "kappa": 0.5}, "shortcut": {"guidance_scale": 2.0}}
    log_nothing = {"validate_every": 0, "checkpoint_every": 0, "trackers": []}
    for kind, settings in kinds.items():
        config = {
            **TINY,
            "name": kind,
            "sampling": {"num_steps": 2},
            "diffusion": {"kind": kind, **settings},
            "log": {"every": 1, **log_nothing},
        }
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump({**config, "train": {**TINY["train"], "num_steps": 2}}))
    commands = [("train.py", "--config", tmp_path / f"{kind}.yaml") for kind in kinds]
    for name in ("gpu", "cpu"):
        (tmp_path / name).mkdir()
    waits = there(*commands[0], "+", *commands[1], cwd=tmp_path / "gpu")
    pretended(*commands[0], "+", *commands[1], cwd=tmp_path / "cpu", device="cpu")
    for kind in kinds:
        assert losses(tmp_path / "gpu", kind) == pytest.approx(losses(tmp_path / "cpu", kind), rel=1e-5)
    assert not [name for name in waits if name.startswith(("diffusion/", "models/"))]


def test_samples_and_scores_are_those_of_the_cpu(trained, tmp_path):
    save_program(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / "colors.pt")
    flags = ("--samples", trained[0] / "runs/tiny", "--extractor", tmp_path / "colors.pt", "--num_samples", 20)
    flags += ("--sampler", "ddpm,ddim,heun,dpmpp_2m_sde,unipc", "--num_steps", 3, "--guidance_scale", 2)
    flags += ("--sampling.guidance_interval", "[0, 50]")
    waits = there("evaluate.py", *flags, "--output", "ours.json", cwd=tmp_path)
    assert not [name for name in waits if name.startswith("diffusion/")]
    run("evaluate.py", *flags, "--output", "theirs.json", cwd=tmp_path)
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in ("ours.json", "theirs.json"))
    assert score_values(ours) == pytest.approx(score_values(theirs), rel=1e-3)


REFUSED = {  # by Apple's device; the first by any
    "here + torch.ones(2)": "tensors of two devices",
    "here.double()": "float64",
    "torch.ones(2, device=here.device, dtype=torch.float64)": "float64",
    "torch.tensor([1.0], dtype=torch.float64, device=here.device)": "float64",
    "torch.ones(2, dtype=torch.float64).to(here.device)": "float64",
    "here.to('cpu', torch.float64)": "float64",
    "torch.zeros(2, dtype=torch.float64).copy_(here)": "float64",
    "torch.lerp(here, here, torch.tensor(0.5, dtype=torch.float64))": "float64",
    "here.to(torch.complex128)": "float64",
    "torch.linalg.eigvals(torch.ones(2, 2, device=here.device))": "not currently implemented",
}
TRY = """
import json, torch
here, found = torch.ones(2, device="pretend"), {}
assert (here * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float32  # a number is taken by such a kernel
assert here.cpu().double().sum() == 2
for line in json.load(open("lines.json")):
    try:
        found[line] = f"{eval(line)}: was allowed"
    except (RuntimeError, TypeError) as error:
        found[line] = str(error)
print(json.dumps(found))
"""


def test_it_refuses_what_gpus_refuse_and_apples_do(tmp_path):
    (tmp_path / "try.py").write_text(TRY)
    (tmp_path / "lines.json").write_text(json.dumps(list(REFUSED)))
    done = pretended(tmp_path / "try.py", cwd=tmp_path, device="mps")
    found = json.loads(done.stdout.splitlines()[-2])
    assert not {line: found[line] for line, words in REFUSED.items() if words not in found[line]}


BITS = """
import json, torch
from diffusion import EDM, FlowMatching, GaussianDiffusion
from diffusion.sde import bits_per_dimension

def bits(diffusion, device):
    x_0, y = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4).to(device), torch.zeros(2, dtype=torch.int64, device=device)
    model = lambda x_t, t, y: x_t * (0.5 + t[:, None, None, None] / 2000)
    return bits_per_dimension(diffusion, model, x_0, y, num_steps=4, probe=x_0.sign()).tolist()

diffusions = (GaussianDiffusion(variance="fixed_small"), FlowMatching(), EDM())
print(json.dumps([[bits(each, device) for each in diffusions] for device in ("cpu", "pretend")]))
"""


def test_on_a_device_without_float64_all_is_as_on_the_cpu(folder, tmp_path):
    save_program(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / "colors.pt")
    (tmp_path / "bits.py").write_text(BITS)
    drawn = ("--spacing", "karras", "--guidance_scale", 2, "--sampling.guidance_parallel", 0.5)
    drawn += ("--sampling.guidance_rescale", 0.5)
    programs = ["evaluate.py", "--samples", "runs/tiny", *drawn, "--extractor", tmp_path / "colors.pt"]
    programs += ["--num_samples", 8, "--sampler", "ddpm,heun,unipc", "--num_steps", 3]
    for flags in (
        ("--num_per_class", 1, "--panel", 2, "--output", "samples.npz"),
        ("--classes", "[0, 1]", "--interpolate", 3, "--to_seed", 1),
        ("--classes", "[0]", "--reconstruct", 500, "--num_per_class", 1),
    ):
        programs += ["+", "sample.py", "--checkpoint", "runs/tiny", *drawn, *flags]
    training = ("train.py", "--config", folder / "tiny.yaml", "--train.ema_profiles", "[0.1]")
    shutil.copytree(folder / "runs/tiny", tmp_path / "cpu/runs/tiny")
    (tmp_path / "mps").mkdir()

    done = pretended(*training, "+", *programs, "+", tmp_path / "bits.py", cwd=tmp_path / "mps", device="mps")
    pretended(*programs, cwd=tmp_path / "cpu", device="cpu")

    assert json.loads(done.stdout.splitlines()[-1])["training/interruption.py"] == STEPS
    assert losses(tmp_path / "mps", "tiny") == pytest.approx(losses(folder, "tiny"), rel=1e-5)
    ours, theirs = (json.loads((tmp_path / name / "runs/tiny/scores.json").read_text()) for name in ("mps", "cpu"))
    assert score_values(ours) == pytest.approx(score_values(theirs), rel=1e-3)
    ours, theirs = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("mps", "cpu"))
    assert np.abs(ours - theirs).max() <= 1
    theirs, ours = json.loads(done.stdout.splitlines()[-2])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_run_from_the_cpu_resumes_on_a_device_with_the_same_losses(folder, tmp_path):
    shutil.copytree(folder / "runs/tiny", tmp_path / "runs/tiny")
    shutil.copytree(folder / "runs/tiny", tmp_path / "cpu/runs/tiny")
    there("train.py", "--resume", "runs/tiny", "--train.num_steps", 6, cwd=tmp_path)
    run("train.py", "--resume", "runs/tiny", "--train.num_steps", 6, cwd=tmp_path / "cpu")
    found = losses(tmp_path, "tiny")
    assert found == pytest.approx(losses(tmp_path / "cpu", "tiny"), rel=1e-5)
    assert max(found) == 6


WIDE = """
import torch
from metrics.features import Extractor
from metrics.image_batches import image_batches
from metrics.programs import save_program

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("one", torch.ones((), dtype=torch.float64))

    def forward(self, images):
        means = (images.double().mean(dim=(2, 3)) * self.one).float()
        return means, means.softmax(dim=1)

images = torch.arange(3 * 3 * 8 * 8).reshape(3, 3, 8, 8).to(torch.uint8)
for name in ("wide.pt", "wide.pt2"):
    save_program(Wide(), images[:2], name)
    extractor = Extractor(name, device="pretend")
    found = extractor(image_batches(images, 2), 3, metrics=["kid"], progress=False).features
    torch.testing.assert_close(found, images.float().mean(dim=(2, 3)))
    print(extractor.device)
"""


def test_an_extractor_that_holds_float64_runs_on_the_cpu_and_says_so(tmp_path):
    (tmp_path / "wide.py").write_text(WIDE)
    done = pretended(tmp_path / "wide.py", cwd=tmp_path, device="mps")
    assert done.stdout.splitlines()[:2] == ["cpu", "cpu"]
    assert done.stderr.count("lacks what it needs; it runs on the CPU") == 2


VARIANTS = {
    "flow": {"model": "DiT-S/2", "diffusion": {"kind": "flow", "times": "logit_normal"}},
    "EDM": {"model": "UViT-tokens-S/2", "diffusion": {"kind": "edm"}},
    "min-SNR": {"model": "USwin", "diffusion": {"weighting": "min_snr"}},
    "pixels": {
        "model": "UNet-Mini",
        "autoencoder": "pixel",
        "data": {**TINY["data"], "image_size": 16},
        "auxiliary": [
            {"kind": "feature_matching", "weight": 0.1},
            {"kind": "perceptual", "weight": 0.1, "network": "colors.pt"},
        ],
    },
    "cascade": {"model": "Cascade", "autoencoder": "pixel", "diffusion": {"kind": "cascade", "num_timesteps": 25}},
}


def test_other_objectives_backbones_and_spaces_are_as_on_the_cpu_without_float64(tmp_path):
    programs = []
    num_steps = {name: 3 if name == "cascade" else 2 for name in VARIANTS}  # one in each phase, or an update
    for name, variant in VARIANTS.items():
        sizes = SMALL[class_of(variant["model"]).__name__]
        config = {**TINY, "sampling": {"num_steps": 2}, "train": {**TINY["train"], "num_steps": num_steps[name]}}
        config |= {**variant, "name": name, "model_args": {key: _plain(value) for key, value in sizes.items()}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        programs += ["train.py", "--config", tmp_path / f"{name}.yaml", "+"]
    programs += ["sample.py", "--checkpoint", "runs/cascade", "--stages", "true", "--num_per_class", 1]
    for device in ("mps", "cpu"):
        (tmp_path / device).mkdir()
        save_program(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / device / "colors.pt")
        pretended(*programs, cwd=tmp_path / device, device=device)
    for name in VARIANTS:
        ours, theirs = (losses(tmp_path / device, name) for device in ("mps", "cpu"))
        assert len(ours) == num_steps[name]
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert (tmp_path / f"mps/runs/{name}/samples/{num_steps[name]:08d}.png").is_file()


def test_an_autoencoder_is_trained_as_on_the_cpu(tmp_path):
    flags = ("--data.path", "shapes", "--data.num_images", 40, "--data.image_size", 32, "--train.num_steps", 4)
    flags += ("--train.batch_size", 4, "--architecture.channels", "[8, 16]", "--architecture.norm_groups", 4)
    flags += ("--loss.perceptual", "null", "--discriminator.weight", 0.1, "--discriminator.start", 2)
    flags += ("--log.every", 1)
    save_program(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / "colors.pt")
    measuring = ("--data.path", "shapes", "--data.num_images", 40, "--data.image_size", 32, "--autoencoder", "embedded")
    measuring += ("--extractor", "colors.pt", "--perceptual", "colors.pt", "--output")
    for device in ("mps", "cpu"):
        programs = ["scripts/train_autoencoder.py", *flags, "--name", device]
        pretended(*programs, "+", "evaluate.py", *measuring, f"{device}.json", cwd=tmp_path, device=device)
    assert losses(tmp_path, "mps") == pytest.approx(losses(tmp_path, "cpu"), rel=1e-4)
    ours, theirs = (json.loads((tmp_path / f"{device}.json").read_text()) for device in ("mps", "cpu"))
    for mine, other in zip(*(flatten(each["latents"]).values() for each in (ours, theirs)), strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=1e-5, atol=1e-6)


def _plain(value):
    """Convert tuples to lists for YAML."""
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
