"""What autoencoders lose of held-out images, and what their latents are like: `evaluate.py --autoencoder`."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import einsum, reduce
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from autoencoders.codec import EMBEDDED, LatentCodec, weights_sha256
from autoencoding.comparisons import draw_reconstructions, draw_spectra
from evaluation.record import provenance, table, write_json
from evaluation.scoring import open_scorer, summarise
from evaluation.sources import Source, from_dataset, reconstructions
from experiment.config import DataConfig, EvaluationConfig
from experiment.datasets import open_split
from metrics.cost import throughput
from metrics.downloads import network_timeout
from metrics.perceptual import NETWORKS, perceptual_network
from metrics.pixelwise import WINDOW, exact, psnr, spatial_frequencies, spectrum, ssim
from metrics.scores import Score
from sampling.generation import share

ACTIVE = 0.01  # a unit whose posterior mean varies less over images is dead (Burda et al. 2016, section 5.2)


@dataclass(frozen=True)
class Distance:
    """How far two images are apart in a frozen network's features, LPIPS or another, or why that cannot be had."""

    name: str
    network: nn.Module | None = None
    reason: str | None = None

    def __call__(self, images: UInt8[Tensor, "b 3 h w"], others: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        assert self.network is not None
        x, y = (self.network(batch.float() / 127.5 - 1).float().flatten(1) for batch in (images, others))
        return (x - y).square().mean(dim=1)

    @property
    def provenance(self) -> dict[str, Any]:
        """Which network images are compared by, for a record."""
        sha256 = None if self.network is None else weights_sha256(self.network.state_dict())
        return {"name": self.name, "sha256": sha256, "reason": self.reason}


def open_distance(network: str, heads: str | None, device: torch.device) -> Distance:
    """By `--perceptual` and `--heads`; where its weights cannot be downloaded it holds the reason.

    Raises:
        ValueError: for a file that there is not, or that is no network.
    """
    if network not in NETWORKS and not Path(network).is_file():
        known = ", ".join(NETWORKS)
        raise ValueError(
            f"--perceptual {network}: no such file; choose from {known}, or give a program that you trust, "
            "a .pt2 or TorchScript file"
        )
    if heads is not None and network != "lpips":
        raise ValueError(f"--heads {heads}: they are of --perceptual lpips, not of {network}; leave them out")
    if heads is not None and not Path(heads).is_file():
        raise ValueError(f"--heads {heads}: no such file; give the lpips package's weights/v0.1/vgg.pth")
    name = network if network == "lpips" else f"perceptual_distance[{Path(network).stem}]"
    try:
        with network_timeout(seconds=10.0):
            return Distance(name, perceptual_network(network, heads).to(device))
    except ValueError as error:
        if network not in NETWORKS:
            raise ValueError(f"--perceptual {error}") from error
        return Distance(name, reason=str(error))


@dataclass(frozen=True)
class Measured:
    """An autoencoder, on some images."""

    scores: dict[str, Score]
    latents: dict[str, Any]
    power: list[float]  # of the images, by spatial frequency
    kept: list[float]  # of their reconstructions


Compare = Callable[[Tensor, Tensor], Float[Tensor, " b"]]


@torch.inference_mode()
def measure(
    codec: LatentCodec, images: Source, distance: Distance, accelerator: Accelerator, batch_size: int
) -> Measured:
    """Means over images, of which each process takes a share."""
    compared: dict[str, Compare] = {"psnr": psnr, "ssim": ssim}
    if distance.network is not None:
        compared[distance.name] = distance
    mine, show = share(images.num_images, accelerator), accelerator.is_main_process
    sums: dict[str, Any] = defaultdict(float)
    with tqdm(total=len(mine), desc=codec.source, unit="img", leave=False, disable=not show) as bar:
        for batch in images.batches(mine, batch_size):
            for name, values in terms_of(codec, batch.images.to(accelerator.device), compared).items():
                sums[name] = sums[name] + exact(values).sum(dim=0).cpu()
            bar.update(len(batch.images))
    parts = gather_object([dict(sums)])
    names = dict.fromkeys(name for part in parts for name in part)
    means: dict[str, Any] = {name: sum(part.get(name, 0.0) for part in parts) / images.num_images for name in names}
    scores = {name: _score(means[name].item()) for name in compared}
    if distance.network is None:
        scores[distance.name] = Score(None, reason=distance.reason)
    return Measured(scores, latent_statistics(codec, means), means["power"].tolist(), means["kept"].tolist())


def terms_of(
    codec: LatentCodec, images: UInt8[Tensor, "b 3 H W"], compared: Mapping[str, Compare]
) -> dict[str, Float[Tensor, "b ..."]]:
    """What there is to average, for each image; what comes back is the decoded mean of the posterior."""
    mean, spread = posterior(codec, images)
    back = codec.decode(mean.float().to(images.device))
    return {
        **{name: compare(images, back) for name, compare in compared.items()},
        "power": spectrum(images),
        "kept": spectrum(back),
        "mean": mean,
        "square": mean**2,
        "product": einsum(mean, mean, "b c h w, b d h w -> b c d") / mean[0, 0].numel(),
        "within": reduce(spread**2, "b c h w -> b c", "mean"),
    }


def posterior(
    codec: LatentCodec, images: UInt8[Tensor, "b 3 H W"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Mean and standard deviation of the latents that a backbone is given of each image."""
    stored = codec.prepare(images)
    zeros = torch.zeros(len(images), *codec.latent_shape(*images.shape[-2:]), device=stored.device)
    mean, above = (exact(codec.draw(stored, noise)) for noise in (zeros, zeros + 1))
    return mean, above - mean


def latent_statistics(codec: LatentCodec, means: dict[str, Tensor]) -> dict[str, Any]:
    """Of draws from the posteriors, channel by channel, as a backbone is given them.

    `activity` is the variance over images of the posterior's mean of `z`, in which the prior has variance 1, averaged
    over a channel's positions (Burda et al. 2016, section 5.2); a channel below `ACTIVE` is dead.
    """
    mean = reduce(means["mean"], "c h w -> c", "mean")
    covariance = means["product"] - mean[:, None] * mean + means["within"].diag()
    std = covariance.diagonal().clamp(min=0).sqrt()
    correlation = covariance / (std[:, None] * std).clamp(min=1e-12)
    variance = (means["square"] - means["mean"] ** 2) / codec.scale.cpu().double() ** 2
    activity = reduce(variance, "c h w -> c", "mean")
    return {
        "channels": codec.channels,
        "factor": codec.factor,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "posterior_std": means["within"].sqrt().tolist(),
        "correlation": correlation.tolist(),
        "activity": activity.tolist(),
        "dead_channels": (activity < ACTIVE).double().mean().item(),
    }


def speeds(codec: LatentCodec, images: UInt8[Tensor, "b 3 H W"]) -> dict[str, float]:
    """Of this device, in batches of this size."""
    x_0 = codec.encode(images)
    how: dict[str, Any] = {"batch_size": len(images), "num_repeats": 3, "device": images.device}
    encode = throughput(lambda: codec.prepare(images), **how)
    decode = throughput(lambda: codec.decode(x_0), **how)
    return {"encode img/s": round(encode, 1), "decode img/s": round(decode, 1)}


def measure_autoencoders(
    names: Sequence[str],
    data: DataConfig,
    evaluation: EvaluationConfig,
    perceptual: tuple[str, str | None],
    accelerator: Accelerator,
    output: str | None = None,
) -> str:
    """Measure each on the held-out images, write JSON and pictures, and say in words what was found; `perceptual` is a
    network and its heads (see `open_distance`).

    Raises:
        ValueError: for what cannot be had or measured, before anything is.
    """
    codecs = [open_codec(name, data.image_size) for name in dict.fromkeys(names)]
    distance = open_distance(*perceptual, accelerator.device)
    scorer, reference = open_scorer(data, accelerator, evaluation)
    extractor = scorer.extractor
    images = from_dataset(open_split(data, "test"), "held-out images", evaluation.num_samples, evaluation.seed)
    first = images.images(torch.arange(min(evaluation.batch_size, images.num_images))).to(accelerator.device)

    rows, measured = [], {}
    for codec in codecs:
        source = reconstructions(images, codec.to(accelerator.device), accelerator.device)
        measured[codec.source] = measure(codec, images, distance, accelerator, evaluation.batch_size)
        scores, _ = scorer.score(source, reference)
        scores = replace(scores, scores={**measured[codec.source].scores, **scores.scores})
        speed = speeds(codec, first) if accelerator.is_main_process else {}
        about = {**source.provenance, **speed, "device": str(accelerator.device)}
        rows.append(summarise(replace(source, name=codec.source, provenance=about), [scores]))
    if not accelerator.is_main_process:
        return ""

    path = Path(output) if output else default_output(codecs)
    pictures = [path.with_name(f"{path.stem}-{name}.png") for name in ("reconstructions", "spectrum")]
    frequencies = spatial_frequencies(data.image_size, data.image_size).tolist()
    powers = {"held-out images": measured[codecs[0].source].power} | {name: of.kept for name, of in measured.items()}
    record = {
        **provenance(rows, reference, scorer),
        "perceptual": distance.provenance,
        "latents": {name: of.latents for name, of in measured.items()},
        "spectrum": {"cycles_per_pixel": frequencies, **powers},
    }
    write_json(record, path)
    draw_reconstructions(images, codecs, accelerator.device, pictures[0])
    draw_spectra(frequencies, powers, pictures[1])
    missing = {name: score.reason for row in rows for name, score in row.scores.items() if score.value is None}
    on = f"{extractor.name} (sha256 {extractor.sha256[:12]})"
    lines = [
        f"{images.num_images} held-out images and what came back of them; distances on {on}",
        table(rows, ("encode img/s", "decode img/s"), of="autoencoder"),
        *(f"latents of {name}: {in_words(of.latents)}" for name, of in measured.items()),
        *(f"{name}: none: {reason}" for name, reason in missing.items()),
    ]
    if extractor.kind != "inception":
        lines.append(f"Distances on {on} compare autoencoders with each other; they are not FID.")
    return "\n".join([*lines, "written: " + ", ".join(map(str, [path, *pictures]))])


def open_codec(name: str, image_size: int) -> LatentCodec:
    """An autoencoder that fits the images.

    Raises:
        ValueError: for one that does not, and for pixels.
    """
    if name == "pixel":
        raise ValueError("--autoencoder pixel: pixels come back as they were; give an autoencoder")
    if image_size < WINDOW:
        raise ValueError(f"--data.image_size {image_size}: SSIM looks at {WINDOW}x{WINDOW} pixels; take larger images")
    codec = LatentCodec(name)
    codec.latent_shape(image_size, image_size)
    return codec


def default_output(codecs: Sequence[LatentCodec]) -> Path:
    """In the folder of the autoencoder, if it is one and not the embedded one, else in the working folder."""
    folder = Path(codecs[0].source)
    is_users = len(codecs) == 1 and folder.is_dir() and folder.resolve() != EMBEDDED.resolve()
    return (folder if is_users else Path()) / "autoencoder.json"


def in_words(latents: dict[str, Any]) -> str:
    """The statistics of all channels in a line."""
    correlation = torch.tensor(latents["correlation"]).fill_diagonal_(0).abs().max().item()
    low, high = ({name: pick(latents[name]) for name in ("mean", "std", "posterior_std")} for pick in (min, max))
    ranges = ", ".join(f"{name.replace('_', ' ')} {low[name]:.3f} to {high[name]:.3f}" for name in low)
    return (
        f"{latents['channels']} channels, 1/{latents['factor']} of the side; {ranges}, correlations up to "
        f"{correlation:.2f}, {latents['dead_channels']:.0%} of the channels dead"
    )


def _score(value: float) -> Score:
    return Score(value) if isfinite(value) else Score(None, reason=f"its mean is {value}: an image came back exactly")
