"""The documents: valid links, measured numbers, and the site that is built from them."""

import os
import re
import subprocess
import sys
import threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import WIDTHS, needs_chromium, page_of
from processes import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LOADED = re.compile(r"""(?:<(?:script|img|iframe)\b[^>]*\bsrc=|<link\b[^>]*\bhref=|url\(|@import )["']?([^"')\s>]+)""")


@cache
def anchors(path: Path) -> list[str]:
    """Anchors of a document's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings_that_there_are(path):
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", path.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.is_relative_to(ROOT), target
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_no_two_headings_of_a_document_are_alike():
    for path in DOCUMENTS:
        assert len(set(anchors(path))) == len(anchors(path)), path


def test_the_numbers_of_the_readme_are_measured_or_published():
    readme, results = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
    rows = re.search(r"^\| backbone .*?\n\n", readme, re.DOTALL | re.MULTILINE)
    assert rows
    numbers = re.findall(r"\d[\d.,]*\d", rows[0])
    assert len(numbers) >= 40
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", results), f"{number} is not in docs/results.md"
    assert "are **not FID**" in readme


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a broken link, or an `Args:` entry without a parameter, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]  # --quiet would count no warnings
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_document_and_room_is_a_page(site):
    pages = {path.stem for path in site.glob("*.html")}
    assert {"index"} | {path.stem for path in DOCUMENTS} - {"README"} <= pages
    assert 'id="diffusion.samplers.sample"' in (site / "api/diffusion.samplers.html").read_text()
    name = "configs/caltech101/xswin.yaml"
    assert (site / name).read_bytes() == (ROOT / name).read_bytes()


def test_pages_load_nothing_from_elsewhere(site):
    files = [path for path in site.rglob("*") if path.suffix in {".html", ".css"}]
    loaded = {link for path in files for link in LOADED.findall(path.read_text())}
    assert any(link.endswith(".css") for link in loaded)
    assert not {link for link in loaded if re.match(r"(?:https?:)?//", link)}


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@needs_chromium
def test_a_browser_shows_the_pages_whole_on_a_desktop_and_on_a_phone(site, browser):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}"
        with page_of(browser, "about:blank", WIDTHS["desktop"]) as page:
            for name in ("index", "tutorial", "results", "features", "api/experiment"):
                page.goto(f"{home}/{name}.html", wait_until="load")
                for width in WIDTHS.values():
                    page.set_viewport_size({"width": width, "height": 900})
                    whole = f"document.documentElement.scrollWidth <= innerWidth && innerWidth === {width}"
                    page.wait_for_function(whole)  # the theme's drawers slide away
                broken = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
                assert page.evaluate(broken) == [], name
        server.shutdown()
