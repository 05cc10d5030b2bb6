"""The page as visitors use it: a real server on a free port, queried over its own interface."""

import asyncio
import json
import shlex
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import WIDTHS, needs_chromium, page_of
from PIL import Image
from processes import ROOT, environment_of, free_port, run, script, started

from experiment.cli import parse
from metrics.classifier import SmallClassifier
from sharing.studio import Request, Studio, class_argument, find_runs

gradio_client = pytest.importorskip("gradio_client", reason="the page is an extra: pip install -e '.[demo]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio_client"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # gradio_client leaves its event streams to the collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket"),
]
SAMPLE = script("sample.py")
DRAW = {
    "of_class": "star",
    "seed": "3",
    "number": 2,
    "guidance": 1.5,
    "sampler": "ddpm",
    "steps": 4,
    "to_class": None,
    "to_seed": "",
}


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The server's folder of temporary files."""
    return tmp_path_factory.mktemp("temporary")


def all_stars(path):
    """Write a classifier of the shapes to which everything is a star."""
    classifier = SmallClassifier(10)
    with torch.no_grad():
        classifier.to_logits.bias[3] = 1e3
    return classifier.save(path)


@pytest.fixture(scope="module")
def address(folder, temporary):
    """Address of the page, which serves two checkpoints of the tiny run and one that samples in a single step."""
    at_once = ("--diffusion.kind", "shortcut", "--diffusion.guidance_max", 5)
    at_once += ("--sampling.sampler", "shortcut", "--sampling.num_steps", 1)
    flags = ("--name", "at-once", "--train.num_steps", 1, "--log.validate_every", 0)
    run("train.py", "--config", "tiny.yaml", *at_once, *flags, cwd=folder)
    port = free_port()
    checkpoints = "[runs/tiny, runs/tiny/checkpoints/00000002, runs/at-once]"
    command = [str(ROOT / "scripts" / "app.py"), "--port", str(port), "--checkpoints", checkpoints]
    command += ["--classifier", str(all_stars(folder / "classifier.pt"))]
    log = folder / "app.log"
    server = started(command, folder, environment_of(GRADIO_ANALYTICS_ENABLED="False", TMPDIR=str(temporary)), log, log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert server.is_alive(), log.read_text()
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.join(120)
        assert server.exitcode == 128 + signal.SIGTERM
        assert not list(temporary.iterdir())


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    client = gradio_client.Client(address, download_files=str(tmp_path_factory.mktemp("downloads")), verbose=False)
    yield client
    client.close()


def draw(client, runs=("runs/tiny",), **settings):
    """Final outputs of the page: the files of all moments, the commands and the pictures."""
    wanted = {"runs": list(runs), **DRAW, **settings}
    slider, command, *shown = client.predict(*wanted.values(), api_name="/draw")
    return slider, command, [picture["value"] for picture in shown if picture.get("visible") and picture.get("value")]


def ask(address, **settings):
    """Request pictures without waiting for them; return the URL of the stream with the answer."""
    asked = json.dumps({"data": [["runs/tiny"], *{**DRAW, **settings}.values()]}).encode()
    url = f"{address}/gradio_api/call/draw"
    request = urllib.request.Request(url, asked, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return f"{url}/{json.load(answer)['event_id']}"


def listen(url):
    """Wait until all pictures are drawn; return the last event."""
    with urllib.request.urlopen(url, timeout=120) as answer:
        return answer.read().decode().partition("event: complete\ndata: ")[2]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    "settings",
    [{}, {"to_class": "ring", "number": 3}, {"to_seed": "8", "sampler": "ddim", "guidance": 1.0}],
    ids=["pictures", "classes", "seeds"],
)
def test_the_command_on_the_page_draws_the_same_pixels(client, folder, settings, monkeypatch):
    _, command, pictures = draw(client, **settings)
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)[1:]
    assert program == "sample.py"
    SAMPLE.main(parse(SAMPLE.SampleConfig, arguments))
    assert np.array_equal(pixels(pictures[0]), pixels(folder / "tiny.png"))


def test_two_checkpoints_side_by_side_and_back_through_the_steps(client):
    slider, command, pictures = draw(client, ["runs/tiny", "runs/tiny/checkpoints/00000002"])
    assert len(pictures) == len(command.splitlines()) == 2
    assert not np.array_equal(pixels(pictures[0]), pixels(pictures[1]))
    assert (slider["maximum"], slider["visible"]) == (4, True)
    before = [each["value"] for each in client.predict(2, api_name="/moment")[:2]]
    for early, late in zip(before, pictures, strict=True):
        assert pixels(early).shape == pixels(late).shape
        assert not np.array_equal(pixels(early), pixels(late))


@pytest.mark.parametrize(("of_class", "to_class", "words"), [("star", "", ": 2 of 2 recognised"), ("ring", "star", "")])
def test_the_page_counts_the_pictures_that_a_classifier_recognises(client, folder, of_class, to_class, words):
    wanted = {**DRAW, "of_class": of_class, "to_class": to_class or None}
    _, _, picture, *_ = client.predict(["runs/tiny"], *wanted.values(), api_name="/draw")
    assert picture["label"] == f"runs/tiny{words}"
    assert "classifier.pt: it names no classes; of models with as many" in (folder / "app.log").read_text()


@pytest.mark.parametrize("to_class", ["ring", None])
def test_the_slider_shows_the_pictures_of_sample_pys_interpolation(client, folder, to_class, monkeypatch):
    settings = {**DRAW, "guidance": 1.0, "sampler": "shortcut", "steps": 1, "to_class": to_class}
    monkeypatch.chdir(folder)
    studio, found = Studio(["runs/at-once"]), []
    for place in (1, 15):
        slider, command, *shown = client.predict(["runs/at-once"], *settings.values(), place, api_name="/way")
        assert not slider["visible"]
        assert [each["visible"] for each in shown] == [True, False, False]
        assert f"--interpolate 21 --seed 3 {'--sampler' if to_class else '--to_seed 4'}" in command
        found.append(pixels(shown[0]["value"]))
    SAMPLE.main(parse(SAMPLE.SampleConfig, shlex.split(command)[2:]))
    row = pixels(folder / "at-once.png").astype(int)
    for number, one in zip((0, 14), found, strict=True):
        assert np.abs(row[:, 66 * number : 66 * number + 68][2:-2, 2:-2] - one[2:-2, 2:-2]).max() <= 1
    assert to_class or np.abs(found[0] - found[1].astype(int)).max() > 20
    with pytest.raises(Exception, match="did you mean star"):
        client.predict(["runs/at-once"], *{**settings, "of_class": "starr"}.values(), 1, api_name="/way")
    assert studio.draws_at_once("runs/at-once")
    shown = client.predict(["runs/at-once"], "star", api_name="/update_controls")
    guidance = next(control for control in shown if control.get("maximum") == 5)
    assert (guidance["minimum"], guidance["value"]) == (1, 1.5)


def test_nearest_training_images_are_shown_below(client):
    """They are the first checkpoint's, whatever the others can draw."""
    path = client.predict(["runs/tiny", "runs/at-once"], *DRAW.values(), api_name="/nearest")
    assert pixels(path).shape[0] > 2 * 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"of_class": "starr"}, "did you mean star"),
        ({"seed": "abc"}, "Seed abc: give a whole number"),
        ({"seed": "-1"}, "Seed -1: give a whole number"),
        ({"steps": 0}, "Value 0 is less than minimum value 1"),
        ({"sampler": "magic"}, "magic is not in the list of choices"),
        ({"runs": ["../../etc"]}, "etc.* is not in the list of choices"),
        ({"runs": []}, "choose one to 3 checkpoints"),
        ({"to_class": "ring", "number": 1}, "a walk has both ends; ask for 2 pictures or more"),
    ],
)
def test_what_a_visitor_gets_wrong_is_said_on_the_page(client, settings, words):
    wanted = {"runs": ["runs/tiny"], **DRAW, **settings}
    with pytest.raises(Exception, match=words):  # gradio_client has its own for each case
        client.predict(*wanted.values(), api_name="/draw")


@pytest.fixture(scope="module")
def unread(address):
    """Long requests of visitors who have left. The server waits ten seconds for them, in which other tests run."""
    for _ in range(16):
        ask(address, number=8, steps=250)


@pytest.mark.usefixtures("unread")
def test_one_request_at_a_time_has_the_cores(folder, monkeypatch):
    from sharing.page import Page  # gradio is an extra

    monkeypatch.chdir(folder)

    async def built():  # in a loop that is closed: gradio opens some where none runs, and leaves them open
        return Page(Studio(["runs/tiny"]), Counter()).build()

    page = asyncio.run(built())
    by_name = {event.api_name: event for event in page.fns.values()}
    turns = {
        (by_name[name].concurrency_id, by_name[name].concurrency_limit)
        for name in ("draw", "way", "guidance", "nearest")
    }
    assert turns == {("cores", 1)}


def test_a_look_up_stops_between_two_moments():
    class Slow:
        read = 0

        def draw(self, request):
            yield 1, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

        def read_layouts(self, run):
            for self.read in range(9):
                yield self.read

    from sharing.page import Page

    page = Page(Studio([]), Counter())
    page.studio = Slow()
    page.make_requests = lambda *wanted: [SimpleNamespace(run="a")]
    looking = page.show_nearest(["a"])
    for _ in range(4):
        next(looking)
    looking.close()
    assert page.studio.read == 2
    page.is_listening = lambda: False
    assert list(page.show_nearest(["a"])) == []


def test_without_a_null_label_neither_the_picture_nor_its_command_is_guided(folder, monkeypatch):
    monkeypatch.chdir(folder)
    studio = Studio(["runs/tiny"])
    checkpoint, request = studio.checkpoints["runs/tiny"], Request("runs/tiny", "star", 0, 1, "ddpm", 4, 3.0)
    assert "--guidance_scale 3.0 " in studio.command(request)
    config = replace(checkpoint.config, train=replace(checkpoint.config.train, label_dropout=0.0))
    studio.checkpoints["runs/tiny"] = replace(checkpoint, config=config)
    assert studio.generator(request).sampling.guidance_scale == 1.0
    assert "guidance" not in studio.command(request)


def test_the_embedded_checkpoint_is_offered_beside_ones_own(tmp_path, folder):
    assert find_runs(tmp_path) == ["embedded"]
    assert {(folder / "runs" / "tiny").as_posix(), "embedded"} <= {*find_runs(folder / "runs")}
    with pytest.raises(ValueError, match="does not exist"):
        Studio([str(tmp_path / "none")])


def test_no_file_but_its_pictures_can_be_fetched(address, folder):
    for path in ("/etc/passwd", str(folder / "tiny.yaml"), "../tiny.yaml", str(ROOT / "README.md")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=120)
        assert refused.value.code in (403, 404)


@pytest.mark.parametrize(
    ("path", "headers", "data"),
    [
        ("/gradio_api/upload", {"Content-Type": "multipart/form-data; boundary=x"}, b"--x--"),
        ("/gradio_api/call/draw", {"Origin": "https://elsewhere.example"}, b'{"data": []}'),
        ("/config", {"Host": "elsewhere.example"}, None),
    ],
    ids=["upload", "origin", "host"],
)
def test_the_page_refuses_uploads_and_requests_of_other_sites(address, path, headers, data):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=120)
    assert refused.value.code == 403


def test_nothing_is_sampled_for_visitors_who_have_left(unread, client):
    began = time.monotonic()
    assert draw(client)[2]
    assert time.monotonic() - began < 120  # many minutes if those were drawn


def test_a_visitor_who_opens_the_stream_late_gets_the_answer(address):
    url = ask(address, number=1, steps=2)
    time.sleep(1)
    assert "sample.py" in listen(url)


def test_nothing_is_left_in_the_folder_for_temporary_files(temporary, client):
    draw(client)
    assert len(list(temporary.glob("pictures-*"))) == 1  # which goes at the end, as do those of libraries
    assert not (temporary / "gradio").exists()


def test_eight_visitors_at_once_get_their_pictures_in_turn(address):
    def visit(seed):
        outputs = json.loads(listen(ask(address, seed=str(seed), number=1, steps=2)).splitlines()[0])
        (image,) = (each["value"] for each in outputs if isinstance(each, dict) and isinstance(each.get("value"), dict))
        with urllib.request.urlopen(image["url"], timeout=120) as answer:
            return pixels(answer).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(visit, range(8)))) == 8


def test_classes_are_spelled_so_that_the_command_line_reads_them():
    assert [class_argument(label, ["cat", "8", "true", "a b", "x, y"]) for label in range(5)] == [
        "cat",
        "8",
        "true",
        "a b",
        "4",
    ]


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_visitor_draws_slides_back_and_compares(address, browser, width):
    with page_of(browser, address, width) as page:
        page.set_default_timeout(90_000)
        page.get_by_label("Class", exact=True).fill("star")
        page.get_by_label("Class", exact=True).press("Enter")
        page.get_by_label("Seed", exact=True).fill("5")
        page.get_by_role("button", name="Draw", exact=True).click()
        slider = page.get_by_role("slider", name="Back through the steps")
        slider.wait_for()  # it is there when all is drawn
        pictures = page.locator(".pictures img")
        last = pictures.first.get_attribute("src")
        assert "--classes star" in page.locator(".command textarea").input_value()
        slider.focus()
        slider.press("Home")
        page.wait_for_function("src => document.querySelector('.pictures img').getAttribute('src') !== src", arg=last)

        page.get_by_label("Checkpoints", exact=True).click()
        page.get_by_role("option", name="00000002").click()
        page.wait_for_timeout(500)
        assert page.get_by_label("Class", exact=True).input_value() == "star"  # what was asked for stays
        page.get_by_role("button", name="Draw", exact=True).click()
        page.wait_for_function("document.querySelectorAll('.pictures img').length === 2")
        slider.wait_for()
        assert page.locator(".command textarea").input_value().count("sample.py") == 2
        assert all(
            page.evaluate("[...document.querySelectorAll('.pictures img')].map(image => image.naturalWidth > 0)")
        )


@needs_chromium
def test_a_refused_request_is_said_once_and_leaves_no_marks(address, browser):
    with page_of(browser, address, WIDTHS["desktop"]) as page:
        page.set_default_timeout(90_000)
        page.get_by_label("Class", exact=True).fill("starr")
        page.get_by_label("Class", exact=True).press("Enter")
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_text("did you mean star").wait_for()
        page.locator("[data-testid=status-tracker] .error").first.wait_for(state="attached")
        assert not any(mark.is_visible() for mark in page.locator("[data-testid=status-tracker] .error").all())


@needs_chromium
def test_the_picture_follows_a_slider(address, browser):
    with page_of(browser, address, WIDTHS["desktop"]) as page:
        page.set_default_timeout(90_000)
        slider = page.get_by_role("slider", name="On the way, as it is moved")
        chosen = page.get_by_label("Checkpoints", exact=True)
        chosen.click()
        page.get_by_role("option", name="at-once").click()
        page.locator(".token-remove").first.click()
        page.get_by_role("button", name="Walk to another class or seed").click()
        slider.wait_for()  # which the run that draws in one call has
        source, seen = "document.querySelector('.pictures img')?.getAttribute('src')", [None]
        for _ in range(2):
            slider.focus()
            slider.press("ArrowRight")
            page.wait_for_function(f"src => ({source} ?? null) !== src", arg=seen[-1])
            seen.append(page.evaluate(source))
        assert "--interpolate 21" in page.locator(".command textarea").input_value()
