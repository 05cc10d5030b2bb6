"""Evaluation of autoencoders (`evaluate.py --autoencoder`): reconstruction of held-out images, latent statistics."""

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
from evaluation.record import provenance, remove_unfinished, table, unfinished_path, write_json, write_unfinished
from evaluation.scoring import Reference, Row, Scorer, open_scorer, summarise
from evaluation.sources import Source, from_dataset, reconstructions
from evaluation.table import number
from experiment.build import open_split
from experiment.config import DataConfig, EvaluationConfig
from experiment.inputs import check_output
from machine.accelerator import from_main, indices_of_process
from machine.atomic_files import keeping
from machine.lock import taking_turns
from machine.precision import to_float64
from metrics.cost import throughput
from metrics.downloads import network_timeout
from metrics.features import Extractor
from metrics.perceptual import NETWORKS, perceptual_network
from metrics.pixelwise import WINDOW, psnr, spatial_frequencies, spectrum, ssim
from metrics.scores import METRICS, Score, find_metric, is_lower_better, metric_name
from sampling.grids import save_labelled

ACTIVE = 0.01  # a channel whose posterior mean varies less over images is dead (Burda et al. 2016, section 5.2)
AMPLIFICATION = 3  # of the differences in the picture of reconstructions, which are drawn around grey
COLUMNS = 10
DECIDING = ("agreement", "fid", "lpips", "psnr")  # to compare autoencoders by; the first that all have is used
PSNR_MARGIN = 1.0  # in dB
TENTH = "psnr_images_tenth"  # key of an autoencoder's metrics.json: 10th percentile of PSNR on its own held-out images


@dataclass(frozen=True)
class Distance:
    """Perceptual distance in the features of a frozen network (LPIPS or another), or the reason why there is none."""

    name: str
    network: nn.Module | None = None
    reason: str | None = None

    def __call__(self, images: UInt8[Tensor, "b 3 h w"], others: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        assert self.network is not None
        x, y = (self.network(batch.float() / 127.5 - 1).float().flatten(1) for batch in (images, others))
        return (x - y).square().mean(dim=1)


def open_distance(network: str, heads: str | None, device: torch.device) -> Distance:
    """Open the distance that `--perceptual` and `--heads` name. If its weights cannot be downloaded, the result holds
    the reason. Raises ValueError for a missing file."""
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
class Measurement:
    """Measurements of an autoencoder on a set of images."""

    scores: dict[str, Score]
    latents: dict[str, Any]  # statistics, see `latent_statistics`
    power: list[float]  # power spectrum of the images, by spatial frequency
    reconstructed_power: list[float]  # power spectrum of their reconstructions


@torch.inference_mode()
def measure(
    codec: LatentCodec, images: Source, distance: Distance, accelerator: Accelerator, batch_size: int
) -> Measurement:
    """Measure an autoencoder on images, shared by all processes; it decodes the mean of the posterior."""
    comparisons: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if distance.network is not None:
        comparisons[distance.name] = distance
    indices, is_quiet = indices_of_process(images.num_images, accelerator), not accelerator.is_main_process
    sums: dict[str, Any] = defaultdict(float)
    with tqdm(total=len(indices), desc=codec.source, unit="img", leave=False, disable=is_quiet) as bar:
        for batch in images.batches(indices, batch_size):
            originals = batch.images.to(accelerator.device)
            mean, std = posterior(codec, originals)
            reconstructed = codec.decode(mean.float().to(originals.device))
            terms = {name: compare(originals, reconstructed) for name, compare in comparisons.items()} | {
                "power": spectrum(originals),
                "reconstructed_power": spectrum(reconstructed),
                "mean": mean,
                "square": mean**2,
                "product": einsum(mean, mean, "b c h w, b d h w -> b c d") / mean[0, 0].numel(),
                "within": reduce(std**2, "b c h w -> b c", "mean"),
            }
            for name, values in terms.items():
                sums[name] = sums[name] + to_float64(values).sum(dim=0).cpu()
            bar.update(len(originals))
    parts = gather_object([dict(sums)])  # a process without images has no sums
    names = dict.fromkeys(name for part in parts for name in part)
    means: dict[str, Any] = {name: sum(part.get(name, 0.0) for part in parts) / images.num_images for name in names}
    scores = {}
    for name in comparisons:
        value = means[name].item()
        reason = None if isfinite(value) else f"its mean is {value}: an image came back exactly"
        scores[name] = Score(None if reason else value, reason=reason)
    if distance.network is None:
        scores[distance.name] = Score(None, reason=distance.reason)
    spectra = means["power"].tolist(), means["reconstructed_power"].tolist()
    return Measurement(scores, latent_statistics(codec, means), *spectra)


def posterior(
    codec: LatentCodec, images: UInt8[Tensor, "b 3 H W"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Mean and standard deviation of the posterior of each image, in the normalised latents that backbones see."""
    prepared = codec.prepare(images)
    zeros = torch.zeros(len(images), *codec.latent_shape(*images.shape[-2:]), device=prepared.device)
    mean, mean_plus_std = (to_float64(codec.draw(prepared, noise)) for noise in (zeros, zeros + 1))
    return mean, mean_plus_std - mean


def latent_statistics(codec: LatentCodec, means: dict[str, Tensor]) -> dict[str, Any]:
    """Compute statistics of the latents by channel, over images, positions and posterior samples.

    `activity` is the variance over images of the posterior mean of `z`, in the units in which the prior has variance 1
    (Burda et al. 2016, section 5.2). A channel whose activity is below `ACTIVE` is dead.
    """
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
    """Measure autoencoders on the held-out images, write JSON and pictures, and return a summary in words.

    Autoencoders, networks and data are opened first, so that what is missing is reported before anything is measured.
    """
    codecs = [open_codec(name, data.image_size) for name in dict.fromkeys(names)]
    path = Path(output) if output else default_output(codecs)
    from_main(accelerator, lambda: check_output("--output", path))
    distance = open_distance(*perceptual, accelerator.device)
    scorer, reference = open_scorer(data, accelerator, evaluation)
    held_out = open_split(data, "test", accelerator)
    images = from_dataset(held_out, "held-out images", evaluation.num_samples, evaluation.seed)

    unfinished, rows, measured = unfinished_path(path, repr((names, data, evaluation, perceptual))), [], {}
    for codec in codecs:
        row, measured[codec.source] = score_reconstructions(codec, images, distance, scorer, reference)
        rows.append(row)
        if accelerator.is_main_process:  # or hours of measuring are lost with an error of the next one
            write_unfinished(provenance(rows, reference, scorer), unfinished)
    # For metrics that compare with labels, the score of the original images is the ceiling.
    if label_metrics := [name for name in untaught(evaluation.metrics) if METRICS[name].needs == "labelled"]:
        scores, _ = scorer.score(images, reference, label_metrics)
        rows.append(summarise(images, [scores]))
    if not accelerator.is_main_process:
        return ""

    pictures = [path.with_name(f"{path.stem}-{name}.png") for name in ("reconstructions", "spectrum")]
    frequencies = spatial_frequencies(data.image_size, data.image_size).tolist()
    powers = {"held-out images": measured[codecs[0].source].power}
    powers |= {name: result.reconstructed_power for name, result in measured.items()}
    sha256 = None if distance.network is None else weights_sha256(distance.network.state_dict())
    record = {
        **provenance(rows, reference, scorer),
        "perceptual": {"name": distance.name, "sha256": sha256, "reason": distance.reason},
        "latents": {name: result.latents for name, result in measured.items()},
        "spectrum": {"cycles_per_pixel": frequencies, **powers},
    }
    with taking_turns(path.parent), keeping(pictures):  # those of an earlier record
        write_json(record, path)
        remove_unfinished(record, path)
        draw_reconstructions(images, codecs, accelerator.device, pictures[0])
        draw_spectra(frequencies, powers, pictures[1])
    lines = [
        f"{images.num_images} held-out images of {held_out.source_name} and what came back of them",
        *format_results(rows, measured, scorer.extractor),
        *advice(rows[: len(codecs)], codecs, data.image_size),
        "written: " + ", ".join(map(str, [path, *pictures])),
    ]
    return "\n".join(lines)


def untaught(metrics: Sequence[str]) -> list[str]:
    """The metrics that train no classifier on the samples, which would be tested on the same images."""
    return [name for name in metrics if not METRICS[name].teaches]


def score_reconstructions(
    codec: LatentCodec, images: Source, distance: Distance, scorer: Scorer, reference: Reference
) -> tuple[Row, Measurement]:
    """Score an autoencoder's reconstructions, measure its latents, and time it."""
    accelerator, evaluation, extractor = scorer.accelerator, scorer.evaluation, scorer.extractor
    source = reconstructions(images, codec.to(accelerator.device), accelerator.device)
    measurement = measure(codec, images, distance, accelerator, evaluation.batch_size)
    metrics = untaught(evaluation.metrics)
    scores, _ = scorer.score(source, reference, metrics)
    leak = Score(None, reason="it would be trained and tested on the same images")
    taught = [name for name in evaluation.metrics if name not in metrics]
    left_out = {metric_name(name, extractor.kind, extractor.name): leak for name in taught}
    scores = replace(scores, scores={**measurement.scores, **scores.scores, **left_out})
    speed = {}
    if accelerator.is_main_process:
        batch = images.images(torch.arange(min(evaluation.batch_size, images.num_images))).to(accelerator.device)
        options: dict[str, Any] = {"batch_size": len(batch), "num_repeats": 3, "device": batch.device}
        speed["encode img/s"] = round(throughput(partial(codec.prepare, batch), **options), 1)
        speed["decode img/s"] = round(throughput(partial(codec.decode, codec.encode(batch)), **options), 1)
    origin = {**source.provenance, **speed, "device": str(accelerator.device)}
    return summarise(replace(source, name=codec.source, provenance=origin), [scores]), measurement


def format_results(rows: Sequence[Row], measured: Mapping[str, Measurement], extractor: Extractor) -> list[str]:
    """Report the scores in a table, the latents, and why scores are missing."""
    missing = {name: score.reason for row in rows for name, score in row.scores.items() if score.value is None}
    on = f"{extractor.name} (sha256 {extractor.sha256[:12]})"
    lines = [
        table(rows, ("encode img/s", "decode img/s"), of="autoencoder"),
        *(f"latents of {name}: {format_latents(result.latents)}" for name, result in measured.items()),
        *(f"{name}: none: {reason}" for name, reason in missing.items()),
    ]
    note = "" if extractor.kind == "inception" else ": they compare autoencoders with each other, and are not FID"
    return [*lines, f"Distances on {on}{note}."]


def open_codec(name: str, image_size: int) -> LatentCodec:
    """Open an autoencoder. Raises ValueError for `pixel`, and for images that it, or SSIM, cannot be used on."""
    if name == "pixel":
        raise ValueError("--autoencoder pixel: it reconstructs every image exactly; give an autoencoder")
    if image_size < WINDOW:
        raise ValueError(f"--data.image_size {image_size}: SSIM looks at {WINDOW}x{WINDOW} pixels; take larger images")
    codec = LatentCodec(name)
    codec.latent_shape(image_size, image_size)
    return codec


def default_output(codecs: Sequence[LatentCodec]) -> Path:
    """Path of the JSON: in the autoencoder's folder, or for several or an embedded one in the working folder."""
    folder = Path(codecs[0].source)
    if len(codecs) == 1 and folder.is_dir() and folder.resolve() not in EMBEDDED.values():
        return folder / "autoencoder.json"
    names = [part for codec in codecs for part in Path(codec.source.strip("./")).parts[-2:]]
    return Path("-".join([*names, "autoencoder.json"]))


def format_latents(latents: dict[str, Any]) -> str:
    """Summarise the statistics of latents in a sentence."""
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
    """Write a picture with rows of images and, for each autoencoder, of their reconstructions and the differences."""
    labels = torch.zeros(images.num_images).long() if images.labels is None else images.labels
    originals = images.images(stratified(labels, min(COLUMNS, images.num_images), seed=0))
    rows, short = [("input", originals)], [Path(codec.source).name for codec in codecs]
    for codec, last in zip(codecs, short, strict=True):
        name = "reconstruction" if len(codecs) == 1 else last if short.count(last) == 1 else codec.source
        reconstructed = codec.decode(codec.encode(originals.to(device))).cpu()
        difference = AMPLIFICATION * (reconstructed.float() - originals.float()) + 127.5
        rows.append((name, reconstructed))
        rows.append((f"difference x{AMPLIFICATION}", difference.clamp(0, 255).to(torch.uint8)))
    tiles = [(name, list(rearrange(row, "n c h w -> n h w c").numpy())) for name, row in rows]
    save_labelled(tiles, [], path, scale=max(1, 128 // originals.shape[-1]))


def draw_spectra(frequencies: Sequence[float], powers: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plot the power spectra of images (the first of `powers`) and reconstructions, and below their ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    (first, images), *others = powers.items()
    top.plot(frequencies, images, color="black", linewidth=1.5, label=first)
    for name, power in others:
        ratio = np.divide(power, images, out=np.full(len(power), np.nan), where=np.array(images) > 1e-12)
        (line,) = top.plot(frequencies, power, linewidth=1.5, label=name)
        bottom.plot(frequencies, ratio, color=line.get_color(), linewidth=1.5)
    top.set(yscale="log", ylabel="power")
    top.legend(frameon=False, fontsize=8)
    bottom.axhline(1.0, color="black", linewidth=0.8)
    bottom.set(xlabel="spatial frequency (cycles a pixel)", ylabel="reconstructed / input", xlim=(0, 0.5))
    bottom.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def advice(rows: Sequence[Row], codecs: Sequence[LatentCodec], image_size: int) -> list[str]:
    """Sentences of advice: which autoencoder to use, and which do not suit the images."""
    shapes = {codec.source: codec.latent_shape(image_size, image_size) for codec in codecs}
    lines = [recommend(rows, shapes)] if len(rows) > 1 else []
    return lines + [line for row, codec in zip(rows, codecs, strict=True) if (line := warn_unsuitable(row, codec))]


def recommend(rows: Sequence[Row], shapes: Mapping[str, Sequence[int]]) -> str:
    """Recommend the fastest decoder among those within two standard errors of the best score, that of the first metric
    of `DECIDING` that all have, and of these within a decibel of the best PSNR: few images, or features that ignore
    blur, do not tell autoencoders apart."""
    titles = {find_metric(title)[0]: title for title in rows[0].scores if not title.endswith(", halves")}
    missing = {name for row in rows for name in titles.values() if row.scores.get(name, Score(None)).value is None}
    title = next((titles[name] for name in DECIDING if name in titles and titles[name] not in missing), None)
    if title is None:
        return "No score is available for all of them, so there is no recommendation."
    value = {row.name: row.scores[title].value or 0.0 for row in rows}
    error = {row.name: row.scores[title].std or 0.0 for row in rows}
    speed = {row.name: row.settings["decode img/s"] for row in rows}
    psnr = {row.name: row.scores["psnr"].value or 0.0 for row in rows if "psnr" in row.scores}
    best = (min if is_lower_better(title) else max)(value, key=lambda name: value[name])
    tied = [name for name in value if abs(value[name] - value[best]) <= 2 * hypot(error[name], error[best])]
    sharpest = max(psnr.get(name, 0.0) for name in tied)
    sharp = [name for name in tied if psnr.get(name, 0.0) >= sharpest - PSNR_MARGIN]
    chosen = max(sharp, key=lambda name: speed[name])

    def compare(describe: Callable[[str], str]) -> str:
        others = ", ".join(f"{name} {describe(name)}" for name in value if name != chosen)
        return f"{describe(chosen)} ({others})"

    within = f" within {PSNR_MARGIN:g} dB of the best psnr," if len(sharp) < len(tied) else ""
    why = f"the fastest{within} of {len(tied)} that {title} does not tell apart" if len(tied) > 1 else title
    return (
        f"Take {chosen}: {why}, {compare(lambda name: number(value[name], error[name] or None))}. It decodes "
        f"{compare(lambda name: f'{speed[name]:g} img/s')} from latents of "
        f"{compare(lambda name: 'x'.join(map(str, shapes[name])))}; more channels take a backbone longer to learn."
    )


def warn_unsuitable(row: Row, codec: LatentCodec) -> str | None:
    """Warn if the mean PSNR is below the 10th percentile of the images that the autoencoder was trained for."""
    folder, psnr = EMBEDDED.get(codec.source, Path(codec.source)), row.scores["psnr"].value
    try:
        low = float(json.loads((folder / "metrics.json").read_text())[TENTH])
    except (OSError, ValueError, TypeError, LookupError):  # an autoencoder from elsewhere, without this number
        return None
    if psnr is None or psnr >= low:
        return None
    return (
        f"These images lie outside of what {row.name} was made for: they come back at {psnr:.1f} dB, and nine tenths "
        f"of its own held-out images at more than {low:.1f}. Take another, or train one: scripts/train_autoencoder.py."
    )
