"""Draw from checkpoints in a browser: watch it denoise, compare backbones, walk between classes and seeds.

pip install -e '.[demo]'
python scripts/app.py                                          # every run in runs/
python scripts/app.py --checkpoints '[runs/XSwin, hf://owner/name]'
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse

MOST_RUNS = 3  # side by side
STYLE = """
.gradio-container { max-width: 1180px !important; width: 100% !important; margin: auto; }
.pictures img { width: 100% !important; height: auto !important; object-fit: contain !important; }
.pictures label[data-testid="block-label"] { position: static; margin-bottom: 4px; }
.pictures .image-container, .pictures .image-frame, .pictures .image-frame > * { height: auto; width: 100%; }
.command textarea { font-family: ui-monospace, monospace; font-size: 13px; }
footer { display: none !important; }
"""


@dataclass(frozen=True)
class AppConfig:
    """A page to draw from checkpoints.

    Args:
        checkpoints: runs, checkpoints or hf://owner/name to choose from; by default all runs in `runs`
        runs: the folder that is looked through
        host: 127.0.0.1 serves this machine alone, 0.0.0.0 everyone who reaches it
        port: 0 takes a free one
        share: also through a public address of gradio's
        queue: visitors that may wait at a time; more are told to come back
        precision: of sampling: 'auto' (bf16 where the device has instructions for it), 'fp32' or 'bf16'
        autoencoder: in place of the ones in the checkpoints' configurations
    """

    checkpoints: list[str] = field(default_factory=list)
    runs: Path = Path("runs")
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    queue: int = 32
    precision: str = "auto"
    autoencoder: str | None = None


def main(config: AppConfig) -> None:
    """Open the checkpoints, serve the page."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError("the page needs gradio: pip install -e '.[demo]'") from None
    from experiment.studio import Studio, find_runs

    studio = Studio(config.checkpoints or find_runs(config.runs), config.precision, config.autoencoder)
    page = build_page(studio)
    page.queue(max_size=config.queue, default_concurrency_limit=1)  # one at a time has all the cores
    page.launch(
        server_name=config.host,
        server_port=config.port or None,
        share=config.share,
        footer_links=[],
        css=STYLE,
        theme=theme(),
        max_file_size="1mb",
    )


def theme() -> Any:
    """Plain, and without fonts from elsewhere."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def build_page(studio) -> Any:
    """The page: what to draw on the left (on a phone: above), pictures on the right."""
    import gradio as gr

    from diffusion import SAMPLERS
    from experiment.studio import MOST_IMAGES, MOST_STEPS

    runs = list(studio.checkpoints)
    first = studio.checkpoints[runs[0]]
    with gr.Blocks(title="Draw from a checkpoint", delete_cache=(3600, 3600), analytics_enabled=False) as page:
        gr.Markdown("## Draw from a checkpoint\nThe same seeds for every backbone; each picture with its command.")
        history = gr.State([])  # of the pictures shown: for each run a list of files, a moment each
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                chosen = gr.Dropdown(runs, value=runs[:1], multiselect=True, max_choices=MOST_RUNS, label="Checkpoints")
                of_class = gr.Dropdown(first.classes, label="Class", allow_custom_value=True, filterable=True)
                with gr.Row():
                    seed = gr.Textbox("0", label="Seed", max_lines=1, min_width=90, scale=1)
                    number = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Pictures", min_width=140, scale=2)
                guidance = gr.Slider(0, 10, _guidance(first), step=0.1, label="Guidance")
                with gr.Row():
                    sampler = gr.Dropdown(list(SAMPLERS), value=_sampler(first), label="Sampler", min_width=140)
                    steps = gr.Slider(1, MOST_STEPS, _steps(first), step=1, label="Steps", min_width=140)
                with gr.Accordion("Walk to another class or seed", open=False):
                    to_class = gr.Dropdown(first.classes, value=None, label="To the class", allow_custom_value=True)
                    to_seed = gr.Textbox("", label="To the seed", max_lines=1)
                draw = gr.Button("Draw", variant="primary")
            with gr.Column(scale=3, min_width=320):
                shown = [
                    gr.Image(
                        label=run if number < 1 else "",
                        visible=number < 1,
                        type="filepath",
                        format="png",
                        buttons=["download", "fullscreen"],
                        elem_classes="pictures",
                        interactive=False,
                    )
                    for number, run in zip(range(MOST_RUNS), [runs[0]] * MOST_RUNS, strict=True)
                ]
                moment = gr.Slider(1, 2, 1, step=1, label="Back through the steps", visible=False)
                command = gr.Textbox(
                    label="The same pictures, from a shell",
                    lines=2,
                    max_lines=12,
                    interactive=False,
                    buttons=["copy"],
                    elem_classes="command",
                )
                with gr.Accordion("Nearest training images", open=False):
                    gr.Markdown("By colours and layout (16x16 pixels) among the images it was trained on.")
                    look = gr.Button("Look them up")
                    near = gr.Image(type="filepath", format="png", label="Pictures above, training images below")

        wanted = [chosen, of_class, seed, number, guidance, sampler, steps, to_class, to_seed]
        outputs = [history, moment, command, *shown]
        draw.click(partial(draw_pictures, studio), wanted, outputs, api_name="draw", show_progress="minimal")
        moment.input(show_moment, [history, moment], shown, api_name="moment", queue=False, show_progress="hidden")
        chosen.change(
            partial(follow, studio), [chosen, of_class], [of_class, to_class, sampler, steps, guidance], queue=False
        )
        look.click(partial(look_up, studio), wanted, near, api_name="nearest")
    return page


def draw_pictures(
    studio, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed
) -> Iterator[tuple[Any, ...]]:
    """Each run's pictures in turn, as they come; at the end, all their moments and the commands."""
    import gradio as gr

    requests = in_words(requests_of)(studio, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed)
    commands = "\n".join(studio.command(request, f"{_slug(request.run)}.png") for request in requests)
    files: list[list[str]] = [[] for _ in requests]
    for drawn, request in enumerate(requests):
        for step, images in studio.draw(request):
            files[drawn].append(write_picture(studio, request, images))
            titles = [f"{each.run}: step {step} of {request.num_steps}" for each in requests]
            yield [], gr.Slider(visible=False), commands, *views(files, titles)
    num = max(map(len, files))
    slider = gr.Slider(1, num, num, step=1, visible=num > 1)
    yield files, slider, commands, *views(files, [request.run for request in requests])


def show_moment(history: list[list[str]], moment: float) -> list[Any]:
    """All runs' pictures at one of the kept moments."""
    import gradio as gr

    found = [gr.Image(value=files[min(int(moment), len(files)) - 1]) for files in history]
    return found + [gr.skip()] * (MOST_RUNS - len(found))


def look_up(studio, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed) -> str:
    """The first run's pictures above the training images that look most like them."""
    import torch

    from experiment.tracking import save_grid

    request = in_words(requests_of)(studio, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed)[
        0
    ]
    *_, (_, images) = studio.draw(request)
    found, distances = in_words(studio.nearest)(request.run, images)
    path = Path(tempfile.mkdtemp()) / "nearest.png"
    captions = [""] * len(images) + [f"{distance:.1f} away" for distance in distances]
    save_grid(torch.cat([images, found]), path, columns=len(images), captions=captions)
    return str(path)


def follow(studio, runs: list[str], of_class: str) -> list[Any]:
    """Classes and settings of a run chosen alone; those beside it are drawn as it is. A class that it has stays."""
    import gradio as gr

    if len(runs) != 1:
        return [gr.skip()] * 5
    checkpoint = in_words(studio.checkpoint)(runs[0])
    classes = checkpoint.classes
    kept = of_class if of_class in classes else next(iter(classes), None)
    return [
        gr.Dropdown(classes, value=kept, visible=bool(classes)),
        gr.Dropdown(classes, value=None, visible=bool(classes)),
        gr.Dropdown(value=_sampler(checkpoint)),
        gr.Slider(value=_steps(checkpoint)),
        gr.Slider(value=_guidance(checkpoint), visible=bool(classes)),
    ]


def requests_of(studio, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed) -> list[Any]:
    """What the visitor asked for, a request a run; all are checked before anything is drawn.

    Raises:
        ValueError: in the visitor's words.
    """
    from experiment.studio import Request

    runs = [runs] if isinstance(runs, str) else runs
    if not 1 <= len(runs or []) <= MOST_RUNS:
        raise ValueError(f"choose one to {MOST_RUNS} checkpoints")
    request = Request(
        run="",
        of_class=str(of_class),
        seed=whole("Seed", seed),
        num_images=whole("Pictures", number),
        sampler=str(sampler),
        num_steps=whole("Steps", steps),
        guidance_scale=float(guidance),
        to_class=str(to_class) if to_class else None,
        to_seed=whole("To the seed", to_seed) if str(to_seed or "").strip() else None,
    )
    requests = [replace(request, run=run) for run in runs]
    for each in requests:
        studio.generator(each)
        studio.command(each)
    return requests


def whole(name: str, given: object) -> int:
    """A number that is whole and not negative.

    Raises:
        ValueError: for anything else.
    """
    text = str(given).strip().removesuffix(".0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{name} {given}: give a whole number, 0 or more")
    return int(text)


def write_picture(studio, request, images) -> str:
    """The file that sample.py writes."""
    from experiment.tracking import save_grid

    path = Path(tempfile.mkdtemp(prefix="pictures-")) / f"{_slug(request.run)}.png"
    classes = studio.classes(request.run)
    named = classes and not request.interpolates
    captions = [classes[studio.label(request.run, request.of_class)]] * len(images) if named else None
    save_grid(images, path, columns=len(images), captions=captions)
    return str(path)


def views(files: list[list[str]], titles: list[str]) -> list[Any]:
    """A picture a run; places that are not needed are hidden."""
    import gradio as gr

    shown = [
        gr.Image(value=each[-1] if each else None, label=title, visible=True)
        for each, title in zip(files, titles, strict=True)
    ]
    return shown + [gr.Image(value=None, visible=False)] * (MOST_RUNS - len(shown))


def in_words(function):
    """What a visitor can get wrong is shown on the page, and nothing else of it."""
    import gradio as gr

    def said(*arguments):
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None

    return said


def _slug(run: str) -> str:
    name = run.removeprefix("hf://").removeprefix("runs/").strip("/.")
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "picture"


def _sampler(checkpoint) -> str:
    return checkpoint.config.sampling.sampler or checkpoint.build_process().default_sampler


def _steps(checkpoint) -> int:
    return min(50, checkpoint.config.sampling.num_steps)


def _guidance(checkpoint) -> float:
    return checkpoint.config.sampling.guidance_scale if checkpoint.classes else 1.0


if __name__ == "__main__":
    with one_line_errors():
        main(parse(AppConfig))
