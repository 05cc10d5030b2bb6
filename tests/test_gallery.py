"""scripts/gallery.py: a page of all runs in a single file."""

import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
import yaml
from browser import WIDTHS, needs_chromium, page_of
from processes import script
from safetensors.torch import save_file

from checkpoints.checkpoint import WEIGHTS
from sampling.grids import save_grid

GALLERY = script("scripts/gallery.py")
pytestmark = pytest.mark.filterwarnings("ignore:Glyph")


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The tiny run, one with twice the learning rate and scores, and one that was killed before its first log line."""
    runs = tmp_path_factory.mktemp("gallery") / "runs"
    for name in ("tiny", "twice<b>"):
        (runs / name / "samples").mkdir(parents=True)
        for file in ("config.yaml", "log.jsonl"):
            shutil.copy(folder / "runs" / "tiny" / file, runs / name / file)
    grid = next((folder / "runs" / "tiny").rglob("*.png"))
    shutil.copy(grid, runs / "tiny" / "samples" / "00000004.png")
    config = yaml.safe_load((runs / "twice<b>" / "config.yaml").read_text())
    config["optim"]["lr"] *= 2
    (runs / "twice<b>" / "config.yaml").write_text(yaml.safe_dump({**config, "name": "twice"}))
    scores = {"fid": {"value": 12.5, "std": None}, "is": {"value": None, "reason": "too few"}}
    (runs / "twice<b>" / "scores.json").write_text(
        json.dumps({"scores": scores, "num_samples": 40, "samples": {"step": 2}})
    )
    with (runs / "twice<b>" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    (runs / "young").mkdir()
    (runs / "young" / "config.yaml").write_text("model: XSwin\n")
    (runs / "notes").mkdir()
    return runs


class Cells(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.rows, self.cell, self.tags = [], False, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "button")

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        if self.cell and self.rows:
            self.rows[-1].append(data)


def test_runs_scores_and_differences_are_in_the_table(runs):
    GALLERY.main(GALLERY.GalleryConfig(runs))
    page = (runs / "gallery.html").read_text()
    head, *rows = Cells(page).rows
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(table) == ["tiny", "twice<b>", "young"]
    assert (table["tiny"]["optim.lr"], table["twice<b>"]["optim.lr"]) == ("0.001", "0.002")
    assert (table["tiny"]["fid"], table["twice<b>"]["fid"]) == ("-", "12.5")
    assert (table["twice<b>"]["steps"], table["twice<b>"]["scored at step"]) == ("4", "2")
    assert (table["tiny"]["samples scored"], table["twice<b>"]["samples scored"]) == ("-", "40")
    assert (table["tiny"]["steps"], table["young"]["steps"]) == ("4", "-")
    losses = [json.loads(line).get("loss") for line in (runs / "tiny" / "log.jsonl").read_text().splitlines()]
    assert table["tiny"]["loss"] == f"{[loss for loss in losses if loss is not None][-1]:.4g}"
    assert "is" not in head
    assert "name" not in head


def test_a_setting_that_was_changed_on_the_way_shows_both_values(tmp_path):
    (tmp_path / "config.yaml").write_text("optim: {lr: 0.1}\n")
    (tmp_path / "checkpoints" / "00000009").mkdir(parents=True)
    history = [{"until": step, "settings": {"optim.lr": lr}} for step, lr in ((2, 0.4), (5, 0.2))]
    metadata = {"history": json.dumps(history)}
    save_file({"x": torch.zeros(1)}, tmp_path / "checkpoints" / "00000009" / WEIGHTS, metadata)
    shown = GALLERY.read_run(tmp_path).config["optim.lr"]
    assert shown == "0.4 until step 2, then 0.2 until step 5, then 0.1"


def test_scores_say_how_they_were_made_where_that_differs(tmp_path):
    """Also from the training's settings, which stand in the same table."""

    def columns_of(*scored):
        for number, samples in enumerate(scored):
            folder = tmp_path / str(len(scored)) / str(number)
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text("sampling: {guidance_scale: 1.5, num_steps: null}\n")
            if samples is not None:
                reference = {"source_hash": "abc", "split": "test-1"}
                record = {"scores": {"fid": {"value": 1.0}}, "samples": samples, "reference": reference}
                (folder / "scores.json").write_text(json.dumps(record))
        GALLERY.main(GALLERY.GalleryConfig(tmp_path / str(len(scored))))
        head, *rows = Cells((tmp_path / str(len(scored)) / "gallery.html").read_text()).rows
        columns = dict(zip(head, zip(*rows, strict=True), strict=True))
        return {name: cells for name, cells in columns.items() if name.startswith("scored with")}

    usual = {"guidance_scale": 1.5, "num_steps": 150, "labels": "balanced"}
    assert columns_of(usual, usual, None) == {}
    other = {**usual, "labels": "reference", "guidance_scale": 4.0}
    columns = {"scored with guidance_scale": ("1.5", "4"), "scored with labels": ("balanced", "reference")}
    assert columns_of(usual, other) == columns
    assert columns_of(other) == {"scored with guidance_scale": ("4",)}


def test_a_page_of_somebody_else_is_kept(runs, tmp_path):
    (tmp_path / "index.html").write_text("my site")
    GALLERY.main(GALLERY.GalleryConfig(runs, tmp_path / "index.html"))
    (kept,) = tmp_path.glob("index.html.before-*")
    assert kept.read_text() == "my site"
    (runs / "young" / "config.yaml").write_text("model: UViT\n")
    GALLERY.main(GALLERY.GalleryConfig(runs, tmp_path / "index.html"))  # a gallery is replaced
    (runs / "young" / "config.yaml").write_text("model: XSwin\n")
    assert [*tmp_path.glob("index.html.before-*")] == [kept]


def test_the_gallery_shows_the_newest_of_grids_and_samples(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.yaml").write_text("model: XSwin\n")
    grids = [tmp_path / name for name in ("samples/00000002.png", "samples.png", "samples/00000004.png")]
    for age, grid in enumerate(grids):
        grid.touch()
        os.utime(grid, (age, age))
        assert GALLERY.read_run(tmp_path).grid == grid


def test_the_gallery_shows_samples_of_the_newest_weights_whatever_the_file_times(tmp_path):
    (tmp_path / "config.yaml").write_text("model: XSwin\n")
    samples, grid = tmp_path / "samples.png", tmp_path / "samples" / "00000004.png"
    for age, (path, weights) in enumerate([(samples, "b"), (grid, None)]):
        save_grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), path, columns=1, weights=weights)
        os.utime(path, (age, age))
    for step, weights in enumerate("abc"):
        checkpoint = tmp_path / "checkpoints" / f"{step:08d}"
        checkpoint.mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, checkpoint / WEIGHTS, {"weights_sha256": weights})
        assert GALLERY.read_run(tmp_path).grid == (samples if weights == "b" else grid)
    os.utime(samples, (2, 2))  # drawn before the training went on, and copied last
    assert GALLERY.read_run(tmp_path).grid == grid
    (tmp_path / "checkpoints" / "00000002" / WEIGHTS).write_bytes(b"cut short")
    assert GALLERY.read_run(tmp_path).grid == samples


def test_the_page_needs_no_other_file(runs):
    GALLERY.main(GALLERY.GalleryConfig(runs))
    page = (runs / "gallery.html").read_text()
    tags = Cells(page).tags
    sources = [attrs[name] for _, attrs in tags for name in ("src", "href") if name in attrs]
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert sum(tag == "img" for tag, _ in tags) == 1
    assert "<svg" in page
    assert not re.search(r"@import|url\((?![\"']?#)", page)
    assert "twice<b>" not in page


@pytest.mark.parametrize(("last", "scale"), [(0.5, "log"), (-0.5, "linear")])
def test_a_negative_loss_is_in_the_figure_too(monkeypatch, last, scale):
    figures = []
    monkeypatch.setattr("evaluation.plots.figure_to_svg", lambda figure, name: figures.append(figure))
    events = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": last}]
    GALLERY.curves([GALLERY.Run("a", {}, events, {}, {}, None)])
    (axes,) = figures[0].axes
    assert axes.get_yscale() == scale
    assert axes.lines[0].get_ydata().tolist() == [2.0, last]


def test_a_folder_without_runs_is_told_in_words(tmp_path):
    with pytest.raises(ValueError, match="no run in it"):
        GALLERY.main(GALLERY.GalleryConfig(tmp_path))


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_page_opens_from_disk_in_a_browser(runs, browser, width):
    GALLERY.main(GALLERY.GalleryConfig(runs))
    with page_of(browser, (runs / "gallery.html").resolve().as_uri(), width) as page:
        rows = page.locator("table").first.locator("tbody tr")
        before = rows.all_inner_texts()
        page.locator("th button").first.click()
        page.locator("th button").first.click()
        assert sorted(rows.all_inner_texts()) == sorted(before)
        assert all(page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)"))
