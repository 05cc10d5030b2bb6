"""Gradio page of scripts/app.py: its layout, and the callbacks of its buttons and sliders."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr
import torch
from gradio.context import LocalContext

from checkpoints.checkpoint import Checkpoint
from diffusion.samplers import AVERAGES, num_steps_for, samplers_for
from sampling.checks import resolve_sampling
from sampling.grids import draw_grid
from sharing.studio import LENGTH, MOST_IMAGES, MOST_STEPS, Request, Studio

MOST_RUNS = 3  # checkpoints side by side
SECONDS_KEPT = 1800  # lifetime of picture files, and of a visitor's history
# Time for a visitor's browser to open the stream of answers after a request; on a busy machine it takes a second.
SECONDS_TO_LISTEN = 10


class Page:
    """The page, and its callbacks on a studio; `listening` counts the open answer streams of each session."""

    def __init__(self, studio: Studio, listening: Counter[str]) -> None:
        self.studio, self.listening = studio, listening

    def build(self) -> gr.Blocks:
        """Lay out the page: controls on the left (on a phone: above), pictures on the right."""
        runs = list(self.studio.checkpoints)
        first = self.studio.checkpoints[runs[0]]
        defaults, image = settings_of(first), partial(gr.Image, type="pil", format="png")
        checkpoints = self.studio.checkpoints.values()
        samplers = list(dict.fromkeys(name for checkpoint in checkpoints for name in sampler_names(checkpoint)))
        title = "Sample from a checkpoint"
        with gr.Blocks(title=title, delete_cache=(300, SECONDS_KEPT), analytics_enabled=False) as page:
            gr.Markdown(f"## {title}\nAll backbones use the same seeds; each picture comes with its command.")
            history = gr.State([], time_to_live=SECONDS_KEPT)  # per run, a picture per moment
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    chosen = gr.Dropdown(
                        runs, value=runs[:1], multiselect=True, max_choices=MOST_RUNS, label="Checkpoints"
                    )
                    of_class = gr.Dropdown(first.classes, label="Class", allow_custom_value=True, filterable=True)
                    with gr.Row():
                        seed = gr.Textbox("0", label="Seed", max_lines=1, min_width=90, scale=1)
                        number = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Pictures", min_width=140, scale=2)
                    guided = first.num_guided > 0
                    guidance = gr.Slider(
                        *guidance_limits(first), defaults[2], step=0.1, label="Guidance", visible=guided
                    )
                    with gr.Row():
                        sampler = gr.Dropdown(samplers, value=defaults[0], label="Sampler", min_width=140)
                        steps = gr.Slider(1, MOST_STEPS, defaults[1], step=1, label="Steps", min_width=140)
                    with gr.Accordion("Walk to another class or seed", open=False):
                        to_class = gr.Dropdown(first.classes, value=None, label="To the class", allow_custom_value=True)
                        to_seed = gr.Textbox("", label="To the seed", max_lines=1)
                    texts: Any = {"label": "On the way, as it is moved"}
                    texts |= {"info": "To that class and seed, or the next seed"}
                    way = gr.Slider(1, LENGTH, 1, step=1, visible=self.studio.draws_at_once(runs[0]), **texts)
                    draw = gr.Button("Draw", variant="primary")
                with gr.Column(scale=3, min_width=320):
                    style: Any = {"buttons": ["download", "fullscreen"], "elem_classes": "pictures"}
                    pictures = [
                        image(label="" if index else runs[0], visible=not index, interactive=False, **style)
                        for index in range(MOST_RUNS)
                    ]
                    moment = gr.Slider(1, 2, 1, step=1, label="Back through the steps", visible=False)
                    style = {"lines": 2, "max_lines": 12, "buttons": ["copy"], "elem_classes": "command"}
                    command = gr.Textbox(label="The command for these pictures", interactive=False, **style)
                    with gr.Accordion("Nearest training images", open=False):
                        gr.Markdown("By colour and layout (16x16 pixels), among its training images.")
                        find = gr.Button("Look them up")
                        neighbours = image(label="Pictures above, training images below")

            inputs = [chosen, of_class, seed, number, guidance, sampler, steps, to_class, to_seed]
            outputs = [history, moment, command, *pictures]
            # One queue for all callbacks that compute; otherwise each would run beside the others.
            one_queue: Any = {"concurrency_id": "cores", "concurrency_limit": 1}
            draw.click(self.draw, inputs, outputs, api_name="draw", show_progress="minimal", **one_queue)
            quiet: Any = {"queue": False, "show_progress": "hidden"}
            moment.input(show_step, [history, moment], pictures, api_name="moment", **quiet)
            live: Any = {"trigger_mode": "always_last", "show_progress": "hidden", **one_queue}
            for slider, name in ((way, "way"), (guidance, "guidance")):
                slider.input(self.draw_interpolated, [*inputs, way], outputs, api_name=name, **live)
            controls = [of_class, to_class, sampler, steps, guidance, way]
            chosen.change(self.update_controls, [chosen, of_class], controls, queue=False)
            find.click(self.show_nearest, inputs, neighbours, api_name="nearest", **one_queue)
        return page

    def is_listening(self) -> bool:
        """Whether the visitor still listens to the answer; waits for one whose request has only just come in."""
        request: Any = LocalContext.request.get(None)
        session = getattr(request, "session_hash", None)
        while session is not None and not self.listening[session]:
            if time.monotonic() > request.request.scope["asked"] + SECONDS_TO_LISTEN:
                return False
            time.sleep(0.05)
        return True

    def draw(self, *inputs) -> Iterator[tuple[Any, ...]]:
        """Draw each run's pictures in turn and yield outputs as they come; the last ones include the whole history."""
        with errors_on_page():
            requests = self.make_requests(*inputs)
            commands = "\n".join(self.command(request) for request in requests)
            history: list[list[Any]] = [[] for _ in requests]
            titles = []
            for moments, request in zip(history, requests, strict=True):
                if not self.is_listening():
                    return
                images = torch.empty(0)
                for step, images in self.studio.draw(request):
                    moments.append(self.picture(request, images))
                    steps = [f"{other.run}: step {step} of {request.num_steps}" for other in requests]
                    yield [], gr.Slider(visible=False), commands, *update_images(history, steps)
                titles.append(self.title(request, images))
        num = max(map(len, history))
        slider = gr.Slider(1, num, num, step=1, visible=num > 1)
        yield history, slider, commands, *update_images(history, titles)

    def draw_interpolated(
        self, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed, position
    ) -> list[Any]:
        """Draw the picture at one position of an interpolation; checkpoints that need many steps are skipped."""
        runs = [runs] if isinstance(runs, str) else runs
        with errors_on_page():
            if len(runs or []) != 1 or not self.studio.draws_at_once(runs[0]):
                return [gr.skip()] * (3 + MOST_RUNS)
            if not to_class and not str(to_seed or "").strip():
                to_seed = whole_number("Seed", seed) + 1
            (request,) = self.make_requests(runs, of_class, seed, 2, guidance, sampler, steps, to_class, to_seed)
            picture = self.picture(
                request, self.studio.draw_position(request, whole_number("On the way", position) - 1)
            )
            command = self.command(replace(request, num_images=LENGTH))
        images = update_images([[picture]], [f"{request.run}: {position} of {LENGTH}"])
        return [[], gr.Slider(visible=False), command, *images]

    def show_nearest(self, runs, *inputs) -> Iterator[Any]:
        """Show the first run's pictures above their nearest training images; yields where gradio may cancel."""
        with errors_on_page():
            (request,) = self.make_requests(runs if isinstance(runs, str) else (runs or [])[:1], *inputs)
            images = torch.empty(0)
            if not self.is_listening():
                return
            for _, pictures in self.studio.draw(request):
                images = pictures
                yield gr.skip()
            for _ in self.studio.read_layouts(request.run):
                yield gr.skip()
            neighbours, distances = self.studio.nearest(request.run, images)
            captions = [""] * len(images) + [f"{distance:.1f} away" for distance in distances]
            yield draw_grid(torch.cat([images, neighbours]), len(images), captions=captions)

    def update_controls(self, runs: list[str], of_class: str | None) -> list[Any]:
        """Set the controls to a run's classes and settings when it is the only one chosen. Further runs are drawn with
        the settings of the first. The class stays where the run has it."""
        if len(runs) != 1:
            return [*[gr.skip()] * 5, gr.Slider(visible=False)]
        with errors_on_page():
            checkpoint = self.studio.checkpoint(runs[0])
        classes, (sampler, steps, guidance) = checkpoint.classes, settings_of(checkpoint)
        selected = of_class if of_class in classes else next(iter(classes), None)
        return [
            gr.Dropdown(classes, value=selected, visible=bool(classes)),
            gr.Dropdown(classes, value=None, visible=bool(classes)),
            gr.Dropdown(sampler_names(checkpoint), value=sampler),
            gr.Slider(value=steps),
            gr.Slider(*guidance_limits(checkpoint), guidance, visible=checkpoint.num_guided > 0),
            gr.Slider(value=1, visible=self.studio.draws_at_once(runs[0])),
        ]

    def make_requests(self, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed) -> list[Request]:
        """Make a request per run from the controls, and check all of them before anything is drawn."""
        runs = [runs] if isinstance(runs, str) else runs
        if not 1 <= len(runs or []) <= MOST_RUNS:
            raise ValueError(f"choose one to {MOST_RUNS} checkpoints")
        sampling = (
            whole_number("Seed", seed),
            whole_number("Pictures", number),
            str(sampler),
            whole_number("Steps", steps),
            float(guidance),
        )
        to_seed = whole_number("To the seed", to_seed) if str(to_seed or "").strip() else None
        request = Request("", str(of_class), *sampling, to_class=str(to_class) if to_class else None, to_seed=to_seed)
        if request.interpolates and request.num_images < 2:
            raise ValueError("To the class, To the seed: a walk has both ends; ask for 2 pictures or more")
        requests = [replace(request, run=run) for run in runs]
        for request in requests:
            self.studio.generator(request)
            self.studio.command(request)
        return requests

    def command(self, request: Request) -> str:
        """Command that draws the request, with an output file that is named after the run."""
        name = request.run.removeprefix("hf://").removeprefix("runs/").strip("/.")
        name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "picture"
        return self.studio.command(request, f"{name}.png")

    def title(self, request: Request, images: torch.Tensor) -> str:
        """The run, and how many of its pictures a classifier assigns to the requested class."""
        number = self.studio.num_recognised(request, images)
        return request.run if number is None else f"{request.run}: {number} of {len(images)} recognised"

    def picture(self, request: Request, images: torch.Tensor) -> Any:
        """Arrange images as the picture that sample.py writes for the request."""
        classes = self.studio.classes(request.run)
        has_captions = classes and not request.interpolates
        captions = [classes[self.studio.label(request.run, request.of_class)]] * len(images) if has_captions else None
        return draw_grid(images, len(images), captions=captions)


def show_step(history: list[list[Any]], moment: float) -> list[Any]:
    """Show the pictures of all runs at one moment of their history, counted from 1."""
    pictures = [gr.Image(value=moments[min(int(moment), len(moments)) - 1]) for moments in history]
    return pictures + [gr.skip()] * (MOST_RUNS - len(pictures))


def update_images(pictures: list[list[Any]], titles: list[str]) -> list[Any]:
    """Update the image of each run to its last moment, and hide the images that are not needed."""
    images = [
        gr.Image(value=moments[-1] if moments else None, label=title, visible=True)
        for moments, title in zip(pictures, titles, strict=True)
    ]
    return images + [gr.Image(value=None, visible=False)] * (MOST_RUNS - len(images))


def settings_of(checkpoint: Checkpoint) -> tuple[str, int, float]:
    """A checkpoint's own sampler, number of steps (at most 50, of few-step models 4) and guidance scale."""
    diffusion = checkpoint.build_diffusion()
    sampling = resolve_sampling(checkpoint.config.sampling, diffusion, checkpoint.num_guided)
    sampler, num_steps = str(sampling.sampler), num_steps_for(sampling, diffusion)
    return sampler, min(4 if sampler in AVERAGES else 50, num_steps), sampling.guidance_scale


def guidance_limits(checkpoint: Checkpoint) -> tuple[float, float]:
    """The least and the largest guidance scale to choose from, learned if the scale is an input of the model."""
    largest = checkpoint.build_diffusion().guidance_max
    return (0.0, 10.0) if largest is None else (1.0, largest)


def sampler_names(checkpoint: Checkpoint) -> list[str]:
    return list(samplers_for(checkpoint.build_diffusion()))


def whole_number(name: str, value: object) -> int:
    """Parse a non-negative whole number from a control. Raises ValueError naming the control."""
    text = str(value).strip().removesuffix(".0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{name} {value}: give a whole number, 0 or more")
    return int(text)


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Show errors that a visitor can cause as one line on the page, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
