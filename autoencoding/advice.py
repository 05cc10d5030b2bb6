"""Which of several autoencoders to take for some images, what it costs, and whether the images are of its kind."""

import json
from collections.abc import Callable, Mapping, Sequence
from math import hypot
from pathlib import Path

from autoencoders.codec import EMBEDDED, LatentCodec
from evaluation.scoring import Row
from evaluation.table import number
from metrics.scores import Score, row_of

DECIDING = {"agreement": True, "fid": False, "lpips": False, "psnr": True}  # the first that all have; is more better?
TENTH = "psnr_images_tenth"  # of an autoencoder's metrics.json: a tenth of the images it was made for come back worse


def advice(rows: Sequence[Row], codecs: Sequence[LatentCodec], image_size: int) -> list[str]:
    """Sentences to close a measurement with, of rows and their autoencoders."""
    shapes = {codec.source: codec.latent_shape(image_size, image_size) for codec in codecs}
    lines = [choice(rows, shapes)] if len(rows) > 1 else []
    return lines + [line for row, codec in zip(rows, codecs, strict=True) if (line := outside(row, codec))]


def choice(rows: Sequence[Row], shapes: Mapping[str, Sequence[int]]) -> str:
    """The best by the first score of `DECIDING` that every row has; of those within two standard errors of it the one
    that decodes fastest."""
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
    """Without the scores of halves of the images."""
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
