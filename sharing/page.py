"""The page of scripts/app.py: what stands on it, and what its buttons and sliders do."""

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
from diffusion.samplers import AVERAGES, num_steps_of, samplers_of
from sampling.checks import resolve_sampling
from sampling.image_files import draw_grid
from sharing.studio import LENGTH, MOST_IMAGES, MOST_STEPS, Request, Studio

MOST_RUNS = 3  # side by side
SECONDS_KEPT = 1800  # of pictures in files, and of what a visitor has seen
SECONDS_TO_LISTEN = 10  # after asking; a browser on a busy machine takes a second to open the stream of answers


class Page:
    """What visitors ask of a studio, as they see it; `listening` counts whose answers somebody reads, by session."""

    def __init__(self, studio: Studio, listening: Counter[str]) -> None:
        self.studio, self.listening = studio, listening

    def build(self) -> gr.Blocks:
        """What to draw on the left (on a phone: above), pictures on the right."""
        runs = list(self.studio.checkpoints)
        first = self.studio.checkpoints[runs[0]]
        as_trained, picture_of = settings_of(first), partial(gr.Image, type="pil", format="png")
        samplers = list(dict.fromkeys(name for one in self.studio.checkpoints.values() for name in samplers_for(one)))
        title = "Draw from a checkpoint"
        with gr.Blocks(title=title, delete_cache=(300, SECONDS_KEPT), analytics_enabled=False) as page:
            gr.Markdown(f"## {title}\nThe same seeds for every backbone; each picture with its command.")
            history = gr.State([], time_to_live=SECONDS_KEPT)  # for each run its pictures, a moment each
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
                    guidance = gr.Slider(0, 10, as_trained[2], step=0.1, label="Guidance", visible=guided)
                    with gr.Row():
                        sampler = gr.Dropdown(samplers, value=as_trained[0], label="Sampler", min_width=140)
                        steps = gr.Slider(1, MOST_STEPS, as_trained[1], step=1, label="Steps", min_width=140)
                    with gr.Accordion("Walk to another class or seed", open=False):
                        to_class = gr.Dropdown(first.classes, value=None, label="To the class", allow_custom_value=True)
                        to_seed = gr.Textbox("", label="To the seed", max_lines=1)
                    words: Any = {"label": "On the way, as it is moved"}
                    words |= {"info": "To that class and seed, or the next seed"}
                    way = gr.Slider(1, LENGTH, 1, step=1, visible=self.studio.draws_at_once(runs[0]), **words)
                    draw = gr.Button("Draw", variant="primary")
                with gr.Column(scale=3, min_width=320):
                    look: Any = {"buttons": ["download", "fullscreen"], "elem_classes": "pictures"}
                    shown = [
                        picture_of(label="" if place else runs[0], visible=not place, interactive=False, **look)
                        for place in range(MOST_RUNS)
                    ]
                    moment = gr.Slider(1, 2, 1, step=1, label="Back through the steps", visible=False)
                    look = {"lines": 2, "max_lines": 12, "buttons": ["copy"], "elem_classes": "command"}
                    command = gr.Textbox(label="The same pictures, from a shell", interactive=False, **look)
                    with gr.Accordion("Nearest training images", open=False):
                        gr.Markdown("By colours and layout (16x16 pixels) among the images it was trained on.")
                        find = gr.Button("Look them up")
                        near = picture_of(label="Pictures above, training images below")

            wanted = [chosen, of_class, seed, number, guidance, sampler, steps, to_class, to_seed]
            outputs = [history, moment, command, *shown]
            alone: Any = {"concurrency_id": "cores", "concurrency_limit": 1}  # else each would have its own turn
            draw.click(self.draw, wanted, outputs, api_name="draw", show_progress="minimal", **alone)
            moment.input(show_moment, [history, moment], shown, api_name="moment", queue=False, show_progress="hidden")
            live: Any = {"trigger_mode": "always_last", "show_progress": "hidden", **alone}
            for slider, name in ((way, "way"), (guidance, "guidance")):
                slider.input(self.draw_on_the_way, [*wanted, way], outputs, api_name=name, **live)
            followed = [of_class, to_class, sampler, steps, guidance, way]
            chosen.change(self.follow, [chosen, of_class], followed, queue=False)
            find.click(self.look_up, wanted, near, api_name="nearest", **alone)
        return page

    def is_read(self) -> bool:
        """Whether somebody reads the answer that is being made. One who has only just asked is waited for."""
        request: Any = LocalContext.request.get(None)
        session = getattr(request, "session_hash", None)
        while session is not None and not self.listening[session]:
            if time.monotonic() > request.request.scope["asked"] + SECONDS_TO_LISTEN:
                return False
            time.sleep(0.05)
        return True

    def draw(self, *wanted) -> Iterator[tuple[Any, ...]]:
        """Each run's pictures in turn, as they come; at the end, all their moments and the commands."""
        with in_words():
            requests = self.requests_of(*wanted)
            commands = "\n".join(self.command(request) for request in requests)
            drawn: list[list[Any]] = [[] for _ in requests]
            for mine, request in zip(drawn, requests, strict=True):
                if not self.is_read():
                    return
                for step, images in self.studio.draw(request):
                    mine.append(self.picture(request, images))
                    titles = [f"{one.run}: step {step} of {request.num_steps}" for one in requests]
                    yield [], gr.Slider(visible=False), commands, *views(drawn, titles)
        num = max(map(len, drawn))
        slider = gr.Slider(1, num, num, step=1, visible=num > 1)
        yield drawn, slider, commands, *views(drawn, [request.run for request in requests])

    def draw_on_the_way(
        self, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed, place
    ) -> list[Any]:
        """The one picture at this place of a walk, where a call or a few draw it; of other checkpoints nothing."""
        runs = [runs] if isinstance(runs, str) else runs
        with in_words():
            if len(runs or []) != 1 or not self.studio.draws_at_once(runs[0]):
                return [gr.skip()] * (3 + MOST_RUNS)
            if not to_class and not str(to_seed or "").strip():
                to_seed = whole("Seed", seed) + 1
            (request,) = self.requests_of(runs, of_class, seed, 2, guidance, sampler, steps, to_class, to_seed)
            drawn = self.picture(request, self.studio.on_the_way(request, whole("On the way", place) - 1))
            command = self.command(replace(request, num_images=LENGTH))
        return [[], gr.Slider(visible=False), command, *views([[drawn]], [f"{request.run}: {place} of {LENGTH}"])]

    def look_up(self, *wanted) -> Iterator[Any]:
        """The first run's pictures above the training images most like them; stops, when told, between two moments."""
        with in_words():
            request = self.requests_of(*wanted)[0]
            images = torch.empty(0)
            if not self.is_read():
                return
            for moment in self.studio.draw(request):
                images = moment[1]
                yield gr.skip()
            for _ in self.studio.read_layouts(request.run):
                yield gr.skip()
            neighbours, distances = self.studio.nearest(request.run, images)
            captions = [""] * len(images) + [f"{distance:.1f} away" for distance in distances]
            yield draw_grid(torch.cat([images, neighbours]), len(images), captions=captions)

    def follow(self, runs: list[str], of_class: str | None) -> list[Any]:
        """Classes and settings of a run chosen alone; those beside it are drawn as it is. A class that it has stays."""
        if len(runs) != 1:
            return [*[gr.skip()] * 5, gr.Slider(visible=False)]
        with in_words():
            checkpoint = self.studio.checkpoint(runs[0])
        classes, (sampler, steps, guidance) = checkpoint.classes, settings_of(checkpoint)
        kept = of_class if of_class in classes else next(iter(classes), None)
        return [
            gr.Dropdown(classes, value=kept, visible=bool(classes)),
            gr.Dropdown(classes, value=None, visible=bool(classes)),
            gr.Dropdown(samplers_for(checkpoint), value=sampler),
            gr.Slider(value=steps),
            gr.Slider(value=guidance, visible=checkpoint.num_guided > 0),
            gr.Slider(value=1, visible=self.studio.draws_at_once(runs[0])),
        ]

    def requests_of(self, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed) -> list[Request]:
        """What the visitor asked for, a request a run; all are checked before anything is drawn."""
        runs = [runs] if isinstance(runs, str) else runs
        if not 1 <= len(runs or []) <= MOST_RUNS:
            raise ValueError(f"choose one to {MOST_RUNS} checkpoints")
        drawn = whole("Seed", seed), whole("Pictures", number), str(sampler), whole("Steps", steps), float(guidance)
        to_seed = whole("To the seed", to_seed) if str(to_seed or "").strip() else None
        request = Request("", str(of_class), *drawn, to_class=str(to_class) if to_class else None, to_seed=to_seed)
        if request.interpolates and request.num_images < 2:
            raise ValueError("To the class, To the seed: a walk has both ends; ask for 2 pictures or more")
        requests = [replace(request, run=run) for run in runs]
        for request in requests:
            self.studio.generator(request)
            self.studio.command(request)
        return requests

    def command(self, request: Request) -> str:
        """With the run's name, as far as files bear it, for the picture's."""
        name = request.run.removeprefix("hf://").removeprefix("runs/").strip("/.")
        name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "picture"
        return self.studio.command(request, f"{name}.png")

    def picture(self, request: Request, images: torch.Tensor) -> Any:
        """The picture that sample.py writes for a request."""
        classes = self.studio.classes(request.run)
        named = classes and not request.interpolates
        captions = [classes[self.studio.label(request.run, request.of_class)]] * len(images) if named else None
        return draw_grid(images, len(images), captions=captions)


def show_moment(history: list[list[Any]], moment: float) -> list[Any]:
    """All runs' pictures at one of the kept moments."""
    pictures = [gr.Image(value=moments[min(int(moment), len(moments)) - 1]) for moments in history]
    return pictures + [gr.skip()] * (MOST_RUNS - len(pictures))


def views(pictures: list[list[Any]], titles: list[str]) -> list[Any]:
    """A picture a run; places that are not needed are hidden."""
    shown = [
        gr.Image(value=moments[-1] if moments else None, label=title, visible=True)
        for moments, title in zip(pictures, titles, strict=True)
    ]
    return shown + [gr.Image(value=None, visible=False)] * (MOST_RUNS - len(shown))


def settings_of(checkpoint: Checkpoint) -> tuple[str, int, float]:
    """Sampler, steps and guidance of a checkpoint's own configuration."""
    diffusion = checkpoint.build_diffusion()
    sampling = resolve_sampling(checkpoint.config.sampling, diffusion, checkpoint.num_guided)
    sampler, num_steps = str(sampling.sampler), num_steps_of(sampling, diffusion)
    return sampler, min(4 if sampler in AVERAGES else 50, num_steps), sampling.guidance_scale


def samplers_for(checkpoint: Checkpoint) -> list[str]:
    return list(samplers_of(checkpoint.build_diffusion()))


def whole(name: str, value: object) -> int:
    text = str(value).strip().removesuffix(".0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{name} {value}: give a whole number, 0 or more")
    return int(text)


@contextmanager
def in_words() -> Iterator[None]:
    """What a visitor can get wrong is shown on the page, and nothing else of it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
