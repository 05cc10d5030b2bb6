"""Draw from checkpoints in a browser: watch it denoise, compare backbones, walk between classes and seeds.

pip install -e '.[demo]'
python scripts/app.py                                          # every run in runs/
python scripts/app.py --checkpoints '[runs/XSwin, hf://owner/name]'
"""

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from settings import within

MOST_RUNS = 3  # side by side
SECONDS_KEPT = 1800  # of pictures in files, and of what a visitor has seen
SECONDS_TO_LISTEN = 10  # after asking; a browser on a busy machine takes a second to open the stream of answers
FONTS = ["system-ui", "sans-serif", "ui-monospace", "monospace"]  # the visitor's own
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
    port: int = within("[0, 65535]", 7860)
    share: bool = False
    queue: int = within("[1, inf)", 32)
    precision: str = "auto"
    autoencoder: str | None = None


def main(config: AppConfig) -> None:
    """Serve the page; what it writes goes with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which lets files be removed
    with tempfile.TemporaryDirectory(prefix="pictures-") as files:
        os.environ["GRADIO_TEMP_DIR"] = files  # which gradio reads when it is imported
        serve(config)


def serve(config: AppConfig) -> None:
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("the page needs gradio: pip install -e '.[demo]'") from None
    from starlette.middleware import Middleware

    from sharing.studio import Studio, find_runs

    studio = Studio(config.checkpoints or find_runs(config.runs), config.precision, config.autoencoder)
    listening: Counter[str] = Counter()
    hosts = None if config.share or config.host not in LOOPBACK else LOOPBACK
    page = build_page(studio, listening)
    page.queue(max_size=config.queue)
    theme = gr.themes.Soft(primary_hue="indigo", font=FONTS[:2], font_mono=FONTS[2:])
    place: Any = {"server_name": config.host, "server_port": config.port or None, "share": config.share}
    door = {"middleware": [Middleware(Door, listening, hosts, not config.share)]}
    page.launch(**place, footer_links=[], css=STYLE, theme=theme, app_kwargs=door)


LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Door:
    """Between the network and the page, as ASGI has it. No file is taken; other web sites are refused, by origin and,
    where `hosts` are known, by name; `listening` counts whose answers somebody reads, by session."""

    def __init__(self, app: Any, listening: Counter[str], hosts: tuple[str, ...] | None, same_origin: bool) -> None:
        self.app, self.listening, self.hosts, self.same_origin = app, listening, hosts, same_origin

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self.admits(scope["path"], {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            return await send({"type": "http.response.body", "body": b"refused"})
        place = scope["path"].rstrip("/")
        streams = scope["method"] == "GET" and (place.endswith("/queue/data") or "/call/" in place)
        (session,) = parse_qs(scope["query_string"].decode()).get("session_hash", [place.rpartition("/")[2]])[:1]
        self.listening[session] += streams
        scope["asked"] = time.monotonic()
        try:
            await self.app(scope, receive, send)
        finally:
            self.listening[session] -= streams
            self.listening += Counter()  # drops those at zero

    def admits(self, path: str, headers: dict[str, str]) -> bool:
        """By where it goes, and what it says of where it comes from."""
        host, origin = headers.get("host", ""), headers.get("origin")
        named = self.hosts is None or urlsplit(f"//{host}").hostname in self.hosts
        from_here = not self.same_origin or origin is None or urlsplit(origin).netloc == host
        return named and from_here and not path.rstrip("/").endswith("/upload")


def build_page(studio, listening: Counter[str]) -> Any:
    """The page: what to draw on the left (on a phone: above), pictures on the right."""
    import gradio as gr

    from sharing.studio import LENGTH, MOST_IMAGES, MOST_STEPS

    runs = list(studio.checkpoints)
    first = studio.checkpoints[runs[0]]
    as_trained, picture_of = settings_of(first), partial(gr.Image, type="pil", format="png")
    samplers = list(dict.fromkeys(name for each in studio.checkpoints.values() for name in samplers_for(each)))
    with gr.Blocks(title="Draw from a checkpoint", delete_cache=(300, SECONDS_KEPT), analytics_enabled=False) as page:
        gr.Markdown("## Draw from a checkpoint\nThe same seeds for every backbone; each picture with its command.")
        history = gr.State([], time_to_live=SECONDS_KEPT)  # for each run its pictures, a moment each
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                chosen = gr.Dropdown(runs, value=runs[:1], multiselect=True, max_choices=MOST_RUNS, label="Checkpoints")
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
                words: Any = {"label": "On the way, as it is moved", "info": "To that class and seed, or the next seed"}
                way = gr.Slider(1, LENGTH, 1, step=1, visible=studio.draws_at_once(runs[0]), **words)
                draw = gr.Button("Draw", variant="primary")
            with gr.Column(scale=3, min_width=320):
                look: Any = {"buttons": ["download", "fullscreen"], "elem_classes": "pictures", "interactive": False}
                shown = [
                    picture_of(label=runs[0] if number < 1 else "", visible=number < 1, **look)
                    for number in range(MOST_RUNS)
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
        read = partial(is_read, listening)
        alone: Any = {"concurrency_id": "cores", "concurrency_limit": 1}  # else each of these would have its own turn
        shown_as: Any = {"api_name": "draw", "show_progress": "minimal"}
        draw.click(partial(draw_pictures, studio, read), wanted, outputs, **shown_as, **alone)
        moment.input(show_moment, [history, moment], shown, api_name="moment", queue=False, show_progress="hidden")
        live: Any = {"trigger_mode": "always_last", "show_progress": "hidden", **alone}
        for slider, name in ((way, "way"), (guidance, "guidance")):
            slider.input(partial(draw_on_the_way, studio), [*wanted, way], outputs, api_name=name, **live)
        followed = [of_class, to_class, sampler, steps, guidance, way]
        chosen.change(partial(follow, studio), [chosen, of_class], followed, queue=False)
        find.click(partial(look_up, studio, read), wanted, near, api_name="nearest", **alone)
    return page


def is_read(listening: Counter[str]) -> bool:
    """Whether somebody reads the answer that is being made. One who has only just asked is waited for."""
    from gradio.context import LocalContext

    request: Any = LocalContext.request.get(None)
    session = getattr(request, "session_hash", None)
    while session is not None and not listening[session]:
        if time.monotonic() > request.request.scope["asked"] + SECONDS_TO_LISTEN:
            return False
        time.sleep(0.05)
    return True


def draw_pictures(studio, is_read, *wanted) -> Iterator[tuple[Any, ...]]:
    """Each run's pictures in turn, as they come; at the end, all their moments and the commands."""
    import gradio as gr

    with in_words():
        requests = requests_of(studio, *wanted)
        commands = "\n".join(studio.command(request, f"{_slug(request.run)}.png") for request in requests)
        drawn: list[list[Any]] = [[] for _ in requests]
        for mine, request in zip(drawn, requests, strict=True):
            if not is_read():
                return
            for step, images in studio.draw(request):
                mine.append(picture(studio, request, images))
                titles = [f"{one.run}: step {step} of {request.num_steps}" for one in requests]
                yield [], gr.Slider(visible=False), commands, *views(drawn, titles)
    num = max(map(len, drawn))
    slider = gr.Slider(1, num, num, step=1, visible=num > 1)
    yield drawn, slider, commands, *views(drawn, [request.run for request in requests])


def draw_on_the_way(studio, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed, place) -> Any:
    """The one picture at this place of a walk, where a call or a few draw it; of other checkpoints nothing."""
    import gradio as gr

    from sharing.studio import LENGTH

    runs = [runs] if isinstance(runs, str) else runs
    with in_words():
        if len(runs or []) != 1 or not studio.draws_at_once(runs[0]):
            return [gr.skip()] * (3 + MOST_RUNS)
        if not to_class and not str(to_seed or "").strip():
            to_seed = whole("Seed", seed) + 1
        (request,) = requests_of(studio, runs, of_class, seed, 2, guidance, sampler, steps, to_class, to_seed)
        drawn = picture(studio, request, studio.on_the_way(request, whole("On the way", place) - 1))
        command = studio.command(replace(request, num_images=LENGTH), f"{_slug(request.run)}.png")
    return [], gr.Slider(visible=False), command, *views([[drawn]], [f"{request.run}: {place} of {LENGTH}"])


def show_moment(history: list[list[Any]], moment: float) -> list[Any]:
    """All runs' pictures at one of the kept moments."""
    import gradio as gr

    pictures = [gr.Image(value=moments[min(int(moment), len(moments)) - 1]) for moments in history]
    return pictures + [gr.skip()] * (MOST_RUNS - len(pictures))


def look_up(studio, is_read, *wanted) -> Iterator[Any]:
    """The first run's pictures above the training images most like them; stops, when told, between two moments."""
    import gradio as gr
    import torch

    from sampling.image_files import draw_grid

    with in_words():
        request = requests_of(studio, *wanted)[0]
        images = torch.empty(0)
        if not is_read():
            return
        for moment in studio.draw(request):
            images = moment[1]
            yield gr.skip()
        for _ in studio.read_layouts(request.run):
            yield gr.skip()
        neighbours, distances = studio.nearest(request.run, images)
        captions = [""] * len(images) + [f"{distance:.1f} away" for distance in distances]
        yield draw_grid(torch.cat([images, neighbours]), len(images), captions=captions)


def follow(studio, runs: list[str], of_class: str) -> list[Any]:
    """Classes and settings of a run chosen alone; those beside it are drawn as it is. A class that it has stays."""
    import gradio as gr

    if len(runs) != 1:
        return [*[gr.skip()] * 5, gr.Slider(visible=False)]
    with in_words():
        checkpoint = studio.checkpoint(runs[0])
    classes, (sampler, steps, guidance) = checkpoint.classes, settings_of(checkpoint)
    kept = of_class if of_class in classes else next(iter(classes), None)
    return [
        gr.Dropdown(classes, value=kept, visible=bool(classes)),
        gr.Dropdown(classes, value=None, visible=bool(classes)),
        gr.Dropdown(samplers_for(checkpoint), value=sampler),
        gr.Slider(value=steps),
        gr.Slider(value=guidance, visible=checkpoint.num_guided > 0),
        gr.Slider(value=1, visible=studio.draws_at_once(runs[0])),
    ]


def settings_of(checkpoint) -> tuple[str, int, float]:
    """Sampler, steps and guidance of a checkpoint's own configuration."""
    from diffusion.samplers import AVERAGES, num_steps_of
    from sampling.checks import resolve_sampling

    diffusion = checkpoint.build_diffusion()
    sampling = resolve_sampling(checkpoint.config.sampling, diffusion, checkpoint.num_guided)
    sampler, num_steps = str(sampling.sampler), num_steps_of(sampling, diffusion)
    return sampler, min(4 if sampler in AVERAGES else 50, num_steps), sampling.guidance_scale


def samplers_for(checkpoint) -> list[str]:
    from diffusion.samplers import samplers_of

    return list(samplers_of(checkpoint.build_diffusion()))


def requests_of(studio, runs, of_class, seed, number, guidance, sampler, steps, to_class, to_seed) -> list[Any]:
    """What the visitor asked for, a request a run; all are checked before anything is drawn."""
    from sharing.studio import Request

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
        studio.generator(request)
        studio.command(request)
    return requests


def whole(name: str, value: object) -> int:
    text = str(value).strip().removesuffix(".0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{name} {value}: give a whole number, 0 or more")
    return int(text)


def picture(studio, request, images) -> Any:
    """The picture that sample.py writes for a request."""
    from sampling.image_files import draw_grid

    classes = studio.classes(request.run)
    named = classes and not request.interpolates
    captions = [classes[studio.label(request.run, request.of_class)]] * len(images) if named else None
    return draw_grid(images, len(images), captions=captions)


def views(pictures: list[list[Any]], titles: list[str]) -> list[Any]:
    """A picture a run; places that are not needed are hidden."""
    import gradio as gr

    shown = [
        gr.Image(value=moments[-1] if moments else None, label=title, visible=True)
        for moments, title in zip(pictures, titles, strict=True)
    ]
    return shown + [gr.Image(value=None, visible=False)] * (MOST_RUNS - len(shown))


@contextmanager
def in_words() -> Iterator[None]:
    """What a visitor can get wrong is shown on the page, and nothing else of it."""
    import gradio as gr

    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from None


def _slug(run: str) -> str:
    name = run.removeprefix("hf://").removeprefix("runs/").strip("/.")
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "picture"


if __name__ == "__main__":
    with one_line_errors():
        main(parse(AppConfig))
