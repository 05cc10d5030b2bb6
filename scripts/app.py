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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from settings import within

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

    from sharing.page import Page
    from sharing.studio import Studio, find_runs

    studio = Studio(config.checkpoints or find_runs(config.runs), config.precision, config.autoencoder)
    listening: Counter[str] = Counter()
    hosts = None if config.share or config.host not in LOOPBACK else LOOPBACK
    page = Page(studio, listening).build()
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


if __name__ == "__main__":
    with one_line_errors():
        main(parse(AppConfig))
