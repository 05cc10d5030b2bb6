"""Sample from checkpoints in a browser: watch the denoising, compare backbones, interpolate between classes and seeds.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from settings import reads, within

FONTS = ["system-ui", "sans-serif", "ui-monospace", "monospace"]  # installed on the visitor's machine
STYLE = """
.gradio-container { max-width: 1180px !important; width: 100% !important; margin: auto; }
.pictures img { width: 100% !important; height: auto !important; object-fit: contain !important; }
.pictures label[data-testid="block-label"] { position: static; margin-bottom: 4px; }
.pictures .image-container, .pictures .image-frame, .pictures .image-frame > * { height: auto; width: 100%; }
.command textarea { font-family: ui-monospace, monospace; font-size: 13px; }
footer, [data-testid="status-tracker"]:has(> .error) { display: none !important; }
"""


@dataclass(frozen=True)
class AppConfig:
    """Serve a page to sample from checkpoints.

    Args:
        checkpoints: runs, checkpoints or hf://owner/name to choose from; by default all runs in `runs`
        runs: folder to search for runs
        host: 127.0.0.1 serves this machine only, 0.0.0.0 everyone who can reach it
        port: port to listen on; 0: any free one
        share: also serve through a public gradio address
        queue: maximum number of waiting visitors; others are asked to come back later
        precision: of sampling: 'auto' (bf16 if the device has instructions for it, else fp32), 'fp32' or 'bf16'
        autoencoder: replaces the checkpoints' own
        classifier: file written by recognise.py --classifier, to count the images that it assigns to the requested
            class; it is a program, so run only what you trust
    """

    checkpoints: list[str] = reads("checkpoint", [])
    runs: Path = Path("runs")
    host: str = "127.0.0.1"
    port: int = within("[0, 65535]", 7860)
    share: bool = False
    queue: int = within("[1, inf)", 32)
    precision: str = "auto"
    autoencoder: str | None = reads("autoencoder", None)
    classifier: Path | None = reads("file", None)


def main(config: AppConfig) -> None:
    """Serve the page, and delete its temporary files at the end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are deleted
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # gradio reads this when it is imported
        serve(config)


def serve(config: AppConfig) -> None:
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("the page needs gradio: pip install -e '.[demo]'") from None
    from starlette.middleware import Middleware

    from sharing.page import Page
    from sharing.studio import Studio, find_runs

    paths = config.checkpoints or find_runs(config.runs)
    studio = Studio(paths, config.precision, config.autoencoder, config.classifier)
    if config.classifier and not studio.distinguished:
        print(
            f"--classifier {config.classifier}: it names no classes; of models with as many, it is taken to have theirs"
        )
    listening: Counter[str] = Counter()
    hosts = None if config.share or config.host not in LOOPBACK else LOOPBACK
    page = Page(studio, listening).build()
    page.queue(max_size=config.queue)
    theme = gr.themes.Soft(primary_hue="indigo", font=FONTS[:2], font_mono=FONTS[2:])
    address: Any = {"server_name": config.host, "server_port": config.port or None, "share": config.share}
    middleware = {"middleware": [Middleware(RequestFilter, listening, hosts, not config.share)]}
    page.launch(**address, footer_links=[], css=STYLE, theme=theme, app_kwargs=middleware)


LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RequestFilter:
    """ASGI middleware that refuses uploads and requests from other web sites: those that address the page by another
    name than `hosts` (None: any), and with `same_origin` those of another origin. `listening` counts the open streams
    of answers by session."""

    def __init__(self, app: Any, listening: Counter[str], hosts: tuple[str, ...] | None, same_origin: bool) -> None:
        self.app, self.listening, self.hosts, self.same_origin = app, listening, hosts, same_origin

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self.admits(scope["path"], {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            return await send({"type": "http.response.body", "body": b"refused"})
        path = scope["path"].rstrip("/")
        is_stream = scope["method"] == "GET" and (path.endswith("/queue/data") or "/call/" in path)
        (session,) = parse_qs(scope["query_string"].decode()).get("session_hash", [path.rpartition("/")[2]])[:1]
        self.listening[session] += is_stream
        scope["asked"] = time.monotonic()
        try:
            await self.app(scope, receive, send)
        finally:
            self.listening[session] -= is_stream
            self.listening += Counter()  # removes counts of zero

    def admits(self, path: str, headers: dict[str, str]) -> bool:
        host, origin = headers.get("host", ""), headers.get("origin")
        is_known_host = self.hosts is None or urlsplit(f"//{host}").hostname in self.hosts
        is_own_site = not self.same_origin or origin is None or urlsplit(origin).netloc == host
        return is_known_host and is_own_site and not path.rstrip("/").endswith("/upload")


if __name__ == "__main__":
    run_main(main, AppConfig)
