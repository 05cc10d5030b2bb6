"""The protocol of published FIDs on random weights: a published file and a reference batch of ADM's in, moments and
distances of ADM's evaluator out (Dhariwal and Nichol 2021).

The evaluator is written here anew, as far from ours as can be: the TensorFlow graph's resizing in NumPy, torchvision's
Inception with the 2015 graph's pooling, features in the graph's order (height, width, channel), NumPy's moments.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import script
from test_reference_parity import load_fixture
from torchvision.models import inception

from evaluation.flags import SweptSampling
from evaluation.scoring import Scorer
from metrics.features import Extractor
from metrics.image_batches import image_batches
from metrics.reference import ReferenceError, read_adm, write_adm

EVALUATE, IMPORT = script("evaluate.py"), script("scripts/import_checkpoint.py")
SIDE, NUM = 64, 6


def resized(images, side=299):
    """TensorFlow 1's bilinear resizing, without antialiasing: output i is read at i * in / out. [n h w 3] uint8 to
    float."""
    place = np.arange(side, dtype=np.float32) * np.float32(images.shape[1] / side)
    low = np.floor(place).astype(int)
    high, share = np.minimum(low + 1, images.shape[1] - 1), (place - low).astype(np.float32)
    x = images.astype(np.float32)
    rows = x[:, low] * (1 - share)[:, None, None] + x[:, high] * share[:, None, None]
    return rows[:, :, low] * (1 - share)[:, None] + rows[:, :, high] * share[:, None]


@torch.inference_mode()
def activations(images, weights, monkeypatch):
    """`pool_3` [n 2048] and the first seven channels of `mixed_6/conv` [n 17*17*7] for images [n h w 3] uint8."""
    average = F.avg_pool2d

    def pool(x, kernel_size, stride=None, padding=0):
        if x.shape[1] == 2048:  # the last block's branch takes the maximum in the 2015 graph
            return F.max_pool2d(x, kernel_size, stride, padding)
        return average(x, kernel_size, stride, padding, count_include_pad=False)

    net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    net.load_state_dict(torch.load(weights, weights_only=True))
    seen = {}
    net.avgpool.register_forward_hook(lambda *call: seen.update(pooled=call[2]))
    net.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.update(conv=call[2]))
    with monkeypatch.context() as patch:
        patch.setattr(F, "avg_pool2d", pool)
        net(torch.from_numpy((resized(images) - 128) / 128).permute(0, 3, 1, 2))
    conv = seen["conv"][:, :7].permute(0, 2, 3, 1).numpy()
    return seen["pooled"].flatten(1).numpy(), conv.reshape(len(conv), -1)


def moments(x):
    return x.mean(axis=0), np.cov(x, rowvar=False)


def distance(x, y):
    """Fréchet distance from moments of few samples: the trace of the root is the nuclear norm of a small product."""
    (mean, cov), (other_mean, other_cov) = moments(x), moments(y)
    a, b = ((z - z.mean(axis=0)).astype(np.float64) / np.sqrt(len(z) - 1) for z in (x, y))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((mean - other_mean) ** 2).sum() + np.trace(cov) + np.trace(other_cov) - 2 * root


def close(ours, theirs):
    """Assert equality up to 1e-4 of the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() < 1e-4 * np.abs(theirs).max()


def photographs(seed, num=NUM):
    """Soft random images, whose features differ by more than noise."""
    coarse = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    images = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def batch(tmp_path_factory, inception_weights):
    """A reference batch like ADM's: the moments are of more images than it holds, and it names no extractor."""
    images = photographs(seed=0)
    with pytest.MonkeyPatch.context() as patch:
        pooled, spatial = activations(images, inception_weights, patch)
    path = tmp_path_factory.mktemp("adm") / "VIRTUAL_imagenet64_labeled.npz"
    named = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (*moments(pooled), *moments(spatial)), strict=True))
    np.savez(path, arr_0=images[:4], **named)
    return path, (pooled, spatial), images


def test_moments_are_those_of_adms_evaluator(inception_weights, batch, tmp_path):
    path, _, images = batch
    extractor = Extractor("inception", weights_path=inception_weights)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    ours = extractor(image_batches(tensor, 4), NUM, metrics=["fid", "sfid"], progress=False)
    with np.load(path) as file:
        assert close(ours.moments.mean, file["mu"])
        assert close(ours.moments.covariance, file["sigma"])
        assert close(ours.spatial.mean, file["mu_s"])
        assert close(ours.spatial.covariance, file["sigma_s"])
    write_adm(tmp_path / "ours.npz", ours, tensor, extractor)
    found, _ = read_adm(tmp_path / "ours.npz", extractor)
    assert torch.equal(found.spatial.mean, ours.spatial.mean)
    with np.load(tmp_path / "ours.npz") as file:
        before = {name: file[name] for name in file.files if name != "format"}
    np.savez(tmp_path / "before.npz", **before)
    with pytest.raises(ReferenceError, match="mu_s and sigma_s are in an outdated order; write it again"):
        read_adm(tmp_path / "before.npz", extractor)


def test_a_published_model_is_scored_as_adms_evaluator_would(inception_weights, batch, tmp_path, monkeypatch):
    """Import, sample, extract and compare with the commands of docs/zoo.md, on a small model and few samples."""
    monkeypatch.chdir(tmp_path)
    torch.save(load_fixture("dit")[1], "published.pt")
    settings = {"num_heads": 4, "autoencoder": "embedded", "source": "dit"}
    IMPORT.main(IMPORT.ImportConfig(weights=Path("published.pt"), output=Path("runs/DiT"), **settings))
    drawn = []
    extract = Scorer.extract
    monkeypatch.setattr(Scorer, "extract", lambda self, source: drawn.append(source) or extract(self, source))
    path, (pooled, spatial), _ = batch
    flags = {"samples": "runs/DiT", "reference": str(path), "num_samples": NUM, "labels": "random"}
    network = {"extractor": "inception", "weights_path": str(inception_weights), "metrics": ["fid", "sfid"]}
    sampling = SweptSampling(num_steps=2)
    EVALUATE.main(EVALUATE.EvaluateConfig(**flags, **network, precision="fp32", sampling=sampling))
    record = json.loads(Path("runs/DiT/scores.json").read_text())
    (samples,) = [source for source in drawn if source.name == "DiT"]
    images = samples.images(torch.arange(NUM)).permute(0, 2, 3, 1).numpy()
    assert images.shape == (NUM, SIDE, SIDE, 3)
    theirs = activations(images, inception_weights, monkeypatch)
    assert record["scores"]["fid"]["value"] == pytest.approx(distance(theirs[0], pooled), rel=1e-3)
    assert record["scores"]["sfid"]["value"] == pytest.approx(distance(theirs[1], spatial), rel=1e-3)
    assert (record["num_samples"], record["samples"]["labels"]) == (NUM, "random")
