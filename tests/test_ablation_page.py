"""The page of an ablation, as a browser shows it."""

import json
import re

import pytest
from browser import WIDTHS, needs_chromium, page_of
from finished_ablation import CLASSES, VARIANTS, finished_ablation

from ablation.results import read_results
from ablation.tables import variant_cells


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    return finished_ablation(tmp_path_factory.mktemp("work"))


def test_the_page_needs_nothing_but_itself(ablation):
    html = (ablation / "report.html").read_text()
    assert "A &lt;fake&gt; ablation" in html
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "url(http" not in html
    assert html.count("<svg") == 5
    assert '<div class="scroll" tabindex="0">' in html  # a keyboard reaches what lies beyond its edge


PROBE = """
<script>
const overlap = ([, a], [, b]) =>
  a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
const box = e => [`${e.tagName} ${e.textContent.slice(0, 20)}`, e.getBoundingClientRect()];
const pairs = boxes => boxes.flatMap((a, i) =>
  boxes.slice(i + 1).filter(b => overlap(a, b)).map(b => `${a[0]} | ${b[0]}`));
const all = selector => [...document.querySelectorAll(selector)];
const parts = "h1, h2, h3, p, .scroll, figure > svg, figcaption, .beside > *, .strip > *, dt, dd";
const overlaps = pairs(all(parts).filter(e => e.textContent || e.src).map(box));
for (const svg of all("figure > svg")) overlaps.push(...pairs([...svg.querySelectorAll("text")].map(box)));
const press = n => {
  document.querySelectorAll("th button")[n].click();
  return all("tbody.models tr").map(row => row.cells[0].textContent.trim());
};
const edges = row => [...row.cells].map(cell => Math.round(cell.getBoundingClientRect().right)).join();
const found = {
  columns: new Set(all("tr").map(edges)).size,
  overlaps, width: innerWidth, content: document.documentElement.scrollWidth,
  images: document.images.length,
  broken: all("img").filter(e => !e.complete || !e.naturalWidth).length,
  clipped: all(".beside > .name, .strip > span").filter(e => e.scrollWidth > e.clientWidth + 1).length,
  rising: press(5), falling: press(5), names: press(0),
};
document.body.innerHTML = "<pre id=found hidden>" + JSON.stringify(found) + "</pre>";
</script>
</body>"""


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_browser_shows_the_page_whole(ablation, browser, tmp_path, width):
    (tmp_path / "page.html").write_text((ablation / "report.html").read_text().replace("</body>", PROBE))
    with page_of(browser, (tmp_path / "page.html").as_uri(), width) as page:
        found = json.loads(page.locator("#found").text_content() or "")
    assert found["width"] == width
    assert found["content"] <= width
    assert found["overlaps"] == []
    assert found["clipped"] == 0
    assert found["columns"] == 1  # the cells of all rows end where those of the head do
    assert (found["images"], found["broken"]) == (2 * len(VARIANTS) * len(CLASSES), 0)
    mean = {name: row[5].value for name, row in zip(VARIANTS, variant_cells(read_results(ablation)), strict=True)}
    by_score = sorted(VARIANTS, key=lambda name: mean[name])
    assert found["rising"] == by_score
    assert found["falling"] == by_score[::-1]
    assert found["names"] == sorted(VARIANTS)
