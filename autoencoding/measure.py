"""What autoencoders lose of held-out images, and what their latents are like: `evaluate.py --autoencoder`."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import hypot, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import einsum, rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from autoencoders.codec import EMBEDDED, LatentCodec, weights_sha256
from data.subsets import stratified
from evaluation.record import provenance, table, write_json
from evaluation.scoring import Row, open_scorer, summarise
from evaluation.sources import Source, from_dataset, reconstructions
from evaluation.table import number
from experiment.build import open_split
from experiment.config import DataConfig, EvaluationConfig
from machine.accelerator import share
from machine.precision import exact
from metrics.cost import throughput
from metrics.downloads import network_timeout
from metrics.perceptual import NETWORKS, perceptual_network
from metrics.pixelwise import WINDOW, psnr, spatial_frequencies, spectrum, ssim
from metrics.scores import METRICS, Score, metric_name, row_of
from sampling.image_files import save_labelled

ACTIVE = 0.01  # a unit whose posterior mean varies less over images is dead (Burda et al. 2016, section 5.2)
AMPLIFIED = 3  # times that differences are drawn of what they are, around grey
COLUMNS = 10
DECIDING = {"agreement": True, "fid": False, "lpips": False, "psnr": True}  # the first that all have; is more better?
TENTH = "psnr_images_tenth"  # of an autoencoder's metrics.json: a tenth of the images it was made for come back worse


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


def open_distance(network: str, heads: str | None, device: torch.device) -> Distance:
    """By `--perceptual` and `--heads`, or why it cannot be downloaded; a missing file is a ValueError."""
    if network not in NETWORKS and not Path(network).is_file():
        raise ValueError(
            f"--perceptual {network}: no such file; give {', '.join(NETWORKS)}, or a program (.pt2) that you trust"
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


@torch.inference_mode()
def measure(
    codec: LatentCodec, images: Source, distance: Distance, accelerator: Accelerator, batch_size: int
) -> Measured:
    """Means over images, of which each process takes a share; they come back as the decoded mean of the posterior."""
    compared: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if distance.network is not None:
        compared[distance.name] = distance
    indices, quiet = share(images.num_images, accelerator), not accelerator.is_main_process
    sums: dict[str, Any] = defaultdict(float)
    with tqdm(total=len(indices), desc=codec.source, unit="img", leave=False, disable=quiet) as bar:
        for batch in images.batches(indices, batch_size):
            originals = batch.images.to(accelerator.device)
            mean, std = posterior(codec, originals)
            reconstructed = codec.decode(mean.float().to(originals.device))
            terms = {name: compare(originals, reconstructed) for name, compare in compared.items()} | {
                "power": spectrum(originals),
                "kept": spectrum(reconstructed),
                "mean": mean,
                "square": mean**2,
                "product": einsum(mean, mean, "b c h w, b d h w -> b c d") / mean[0, 0].numel(),
                "within": reduce(std**2, "b c h w -> b c", "mean"),
            }
            for name, values in terms.items():
                sums[name] = sums[name] + exact(values).sum(dim=0).cpu()
            bar.update(len(originals))
    parts = gather_object([dict(sums)])
    names = dict.fromkeys(name for part in parts for name in part)
    means: dict[str, Any] = {name: sum(part.get(name, 0.0) for part in parts) / images.num_images for name in names}
    scores = {}
    for name in compared:
        value = means[name].item()
        reason = None if isfinite(value) else f"its mean is {value}: an image came back exactly"
        scores[name] = Score(None if reason else value, reason=reason)
    if distance.network is None:
        scores[distance.name] = Score(None, reason=distance.reason)
    return Measured(scores, latent_statistics(codec, means), means["power"].tolist(), means["kept"].tolist())


def posterior(
    codec: LatentCodec, images: UInt8[Tensor, "b 3 H W"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Mean and standard deviation of the latents that a backbone is given of each image."""
    stored = codec.prepare(images)
    zeros = torch.zeros(len(images), *codec.latent_shape(*images.shape[-2:]), device=stored.device)
    mean, above = (exact(codec.draw(stored, noise)) for noise in (zeros, zeros + 1))
    return mean, above - mean


def latent_statistics(codec: LatentCodec, means: dict[str, Tensor]) -> dict[str, Any]:
    """Of draws from the posteriors, by channel. `activity` is the variance over images of the posterior's mean of `z`,
    in which the prior has variance 1 (Burda et al. 2016, section 5.2); a channel below `ACTIVE` is dead."""
    mean = reduce(means["mean"], "c h w -> c", "mean")
    covariance = means["product"] - mean[:, None] * mean + means["within"].diag()
    std = covariance.diagonal().clamp(min=0).sqrt()
    correlation = covariance / (std[:, None] * std).clamp(min=1e-12)
    variance = (means["square"] - means["mean"] ** 2) / codec.scale.cpu().double() ** 2
    activity = reduce(variance, "c h w -> c", "mean")
    by_channel = {"mean": mean, "std": std, "posterior_std": means["within"].sqrt(), "correlation": correlation}
    statistics = {name: values.tolist() for name, values in {**by_channel, "activity": activity}.items()}
    dead = (activity < ACTIVE).double().mean().item()
    return {"channels": codec.channels, "factor": codec.factor, **statistics, "dead_channels": dead}


def measure_autoencoders(
    names: Sequence[str],
    data: DataConfig,
    evaluation: EvaluationConfig,
    perceptual: tuple[str, str | None],
    accelerator: Accelerator,
    output: str | None = None,
) -> str:
    """Measure each on the held-out images, write JSON and pictures, and say in words what came out. What cannot be had
    is refused before anything is measured."""
    codecs = [open_codec(name, data.image_size) for name in dict.fromkeys(names)]
    distance = open_distance(*perceptual, accelerator.device)
    scorer, reference = open_scorer(data, accelerator, evaluation)
    extractor = scorer.extractor
    held_out = open_split(data, "test", accelerator)
    images = from_dataset(held_out, "held-out images", evaluation.num_samples, evaluation.seed)
    batch = images.images(torch.arange(min(evaluation.batch_size, images.num_images))).to(accelerator.device)

    asked = [name for name in evaluation.metrics if not METRICS[name].teaches]
    leak = Score(None, reason="it would learn from the very images that it asks of")
    taught = [name for name in evaluation.metrics if name not in asked]
    refused = {metric_name(name, extractor.kind, extractor.name): leak for name in taught}
    rows, measured = [], {}
    for codec in codecs:
        source = reconstructions(images, codec.to(accelerator.device), accelerator.device)
        measured[codec.source] = measure(codec, images, distance, accelerator, evaluation.batch_size)
        scores, _ = scorer.score(source, reference, asked)
        scores = replace(scores, scores={**measured[codec.source].scores, **scores.scores, **refused})
        speed = {}
        if accelerator.is_main_process:
            timed: dict[str, Any] = {"batch_size": len(batch), "num_repeats": 3, "device": batch.device}
            speed["encode img/s"] = round(throughput(partial(codec.prepare, batch), **timed), 1)
            speed["decode img/s"] = round(throughput(partial(codec.decode, codec.encode(batch)), **timed), 1)
        about = {**source.provenance, **speed, "device": str(accelerator.device)}
        rows.append(summarise(replace(source, name=codec.source, provenance=about), [scores]))
    if of_classes := [name for name in asked if METRICS[name].needs == "labelled"]:  # the probe's ceiling
        scores, _ = scorer.score(images, reference, of_classes)
        rows.append(summarise(images, [scores]))
    if not accelerator.is_main_process:
        return ""

    path = Path(output) if output else default_output(codecs)
    pictures = [path.with_name(f"{path.stem}-{name}.png") for name in ("reconstructions", "spectrum")]
    frequencies = spatial_frequencies(data.image_size, data.image_size).tolist()
    powers = {"held-out images": measured[codecs[0].source].power} | {name: of.kept for name, of in measured.items()}
    sha256 = None if distance.network is None else weights_sha256(distance.network.state_dict())
    record = {
        **provenance(rows, reference, scorer),
        "perceptual": {"name": distance.name, "sha256": sha256, "reason": distance.reason},
        "latents": {name: of.latents for name, of in measured.items()},
        "spectrum": {"cycles_per_pixel": frequencies, **powers},
    }
    write_json(record, path)
    draw_reconstructions(images, codecs, accelerator.device, pictures[0])
    draw_spectra(frequencies, powers, pictures[1])
    missing = {name: score.reason for row in rows for name, score in row.scores.items() if score.value is None}
    on = f"{extractor.name} (sha256 {extractor.sha256[:12]})"
    lines = [
        f"{images.num_images} held-out images of {held_out.source_name} and what came back of them; distances on {on}",
        table(rows, ("encode img/s", "decode img/s"), of="autoencoder"),
        *(f"latents of {name}: {in_words(of.latents)}" for name, of in measured.items()),
        *(f"{name}: none: {reason}" for name, reason in missing.items()),
    ]
    if extractor.kind != "inception":
        lines.append(f"Distances on {on} compare autoencoders with each other; they are not FID.")
    lines += advice(rows[: len(codecs)], codecs, data.image_size)
    return "\n".join([*lines, "written: " + ", ".join(map(str, [path, *pictures]))])


def open_codec(name: str, image_size: int) -> LatentCodec:
    """An autoencoder that fits the images; another one, and pixels, are refused."""
    if name == "pixel":
        raise ValueError("--autoencoder pixel: pixels come back as they were; give an autoencoder")
    if image_size < WINDOW:
        raise ValueError(f"--data.image_size {image_size}: SSIM looks at {WINDOW}x{WINDOW} pixels; take larger images")
    codec = LatentCodec(name)
    codec.latent_shape(image_size, image_size)
    return codec


def default_output(codecs: Sequence[LatentCodec]) -> Path:
    """In the autoencoder's own folder, but for an embedded one, else by their names in the working folder."""
    folder = Path(codecs[0].source)
    if len(codecs) == 1 and folder.is_dir() and folder.resolve() not in EMBEDDED.values():
        return folder / "autoencoder.json"
    names = [part for codec in codecs for part in Path(codec.source.strip("./")).parts[-2:]]
    return Path("-".join([*names, "autoencoder.json"]))


def in_words(latents: dict[str, Any]) -> str:
    correlation = torch.tensor(latents["correlation"]).fill_diagonal_(0).abs().max().item()
    ranges = [
        f"{name.replace('_', ' ')} {min(latents[name]):.3f} to {max(latents[name]):.3f}"
        for name in ("mean", "std", "posterior_std")
    ]
    return (
        f"{latents['channels']} channels, 1/{latents['factor']} of the side; {', '.join(ranges)}, correlations up to "
        f"{correlation:.2f}, {latents['dead_channels']:.0%} of the channels dead"
    )


def draw_reconstructions(images: Source, codecs: Sequence[LatentCodec], device: torch.device, path: Path) -> None:
    """Some images of the classes, and for each autoencoder what comes back of them and by how much it differs."""
    labels = torch.zeros(images.num_images).long() if images.labels is None else images.labels
    originals = images.images(stratified(labels, min(COLUMNS, images.num_images), seed=0))
    rows, short = [("input", originals)], [Path(codec.source).name for codec in codecs]
    for codec, last in zip(codecs, short, strict=True):
        name = "reconstruction" if len(codecs) == 1 else last if short.count(last) == 1 else codec.source
        reconstructed = codec.decode(codec.encode(originals.to(device))).cpu()
        difference = AMPLIFIED * (reconstructed.float() - originals.float()) + 127.5
        rows.append((name, reconstructed))
        rows.append((f"difference x{AMPLIFIED}", difference.clamp(0, 255).to(torch.uint8)))
    tiles = [(name, list(rearrange(row, "n c h w -> n h w c").numpy())) for name, row in rows]
    save_labelled(tiles, [], path, scale=max(1, 128 // originals.shape[-1]))


def draw_spectra(frequencies: Sequence[float], powers: Mapping[str, Sequence[float]], path: Path) -> None:
    """Power by spatial frequency of the images (the first of `powers`) and of reconstructions, and their ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    (first, images), *others = powers.items()
    above.plot(frequencies, images, color="black", linewidth=1.5, label=first)
    for name, power in others:
        ratio = np.divide(power, images, out=np.full(len(power), np.nan), where=np.array(images) > 1e-12)
        (line,) = above.plot(frequencies, power, linewidth=1.5, label=name)
        below.plot(frequencies, ratio, color=line.get_color(), linewidth=1.5)
    above.set(yscale="log", ylabel="power")
    above.legend(frameon=False, fontsize=8)
    below.axhline(1.0, color="black", linewidth=0.8)
    below.set(xlabel="spatial frequency (cycles a pixel)", ylabel="reconstructed / input", xlim=(0, 0.5))
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def advice(rows: Sequence[Row], codecs: Sequence[LatentCodec], image_size: int) -> list[str]:
    """Sentences to close a measurement with, of rows and their autoencoders."""
    shapes = {codec.source: codec.latent_shape(image_size, image_size) for codec in codecs}
    lines = [choice(rows, shapes)] if len(rows) > 1 else []
    return lines + [line for row, codec in zip(rows, codecs, strict=True) if (line := outside(row, codec))]


def choice(rows: Sequence[Row], shapes: Mapping[str, Sequence[int]]) -> str:
    """The fastest decoder of those within two standard errors of the best by the first score of `DECIDING`."""
    scores = {row.name: {row_of(title)[0]: score for title, score in _whole(row).items()} for row in rows}
    known = [{name for name in of if of[name].value is not None} for of in scores.values()]
    metric = next((name for name in DECIDING if all(name in names for names in known)), None)
    if metric is None:
        return "No score that all of them have says which to take."
    title = next(title for title in _whole(rows[0]) if row_of(title)[0] == metric)

    def value(row: Row) -> float:
        return scores[row.name][metric].value or 0.0

    def error(row: Row) -> float:
        return scores[row.name][metric].std or 0.0

    def speed(row: Row) -> float:
        return row.settings["decode img/s"]

    best = (max if DECIDING[metric] else min)(rows, key=value)
    alike = [row for row in rows if abs(value(row) - value(best)) <= 2 * hypot(error(row), error(best))]
    taken = max(alike, key=speed)

    def beside(describe: Callable[[Row], str]) -> str:
        others = ", ".join(f"{row.name} {describe(row)}" for row in rows if row is not taken)
        return f"{describe(taken)} ({others})"

    why = f"the fastest of {len(alike)} that {title} does not tell apart" if len(alike) > 1 else title
    return (
        f"Take {taken.name}: {why}, {beside(lambda row: number(value(row), error(row) or None))}. It decodes "
        f"{beside(lambda row: f'{speed(row):g} img/s')} from latents of "
        f"{beside(lambda row: 'x'.join(map(str, shapes[row.name])))}; the more channels, the longer a backbone learns."
    )


def _whole(row: Row) -> dict[str, Score]:
    return {title: score for title, score in row.scores.items() if not title.endswith(", halves")}


def outside(row: Row, codec: LatentCodec) -> str | None:
    """That the images come back worse than nine tenths of those that the autoencoder was made for, where it is so."""
    folder, psnr = EMBEDDED.get(codec.source, Path(codec.source)), row.scores["psnr"].value
    try:
        low = float(json.loads((folder / "metrics.json").read_text())[TENTH])
    except (OSError, ValueError, TypeError, LookupError):  # of the hub, or of other authors: nobody measured it
        return None
    if psnr is None or psnr >= low:
        return None
    return (
        f"These images lie outside of what {row.name} was made for: they come back at {psnr:.1f} dB, and nine tenths "
        f"of its own held-out images at more than {low:.1f}. Take another, or train one: scripts/train_autoencoder.py."
    )
