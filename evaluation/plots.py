"""Pages that a browser reads from disk, without a network, and figures in one look, for a page and for a paper."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

COLORS = ["#4477AA", "#EE6677", "#228833", "#AA3377", "#CC8800", "#33A6C2", "#888888", "#6655CC", "#996633", "#DD44AA"]
MARKERS = "osD^vPX<>*"
INK = "#010203"  # stands for the page's own text colour
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "pdf.fonttype": 42,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
WIDTH, LINE = 4.6, 0.18  # inches: of a figure, and of a line of its legend

TEMPLATES = FileSystemLoader(Path(__file__).parent / "pages")
PAGES = Environment(loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def page(template: str, **values: object) -> str:
    """A file of `evaluation/pages`, filled in; what is filled in is text unless its template says else."""
    return PAGES.get_template(template).render(values)


def draw(plot: Callable[[Any], bool]) -> Any:
    """matplotlib's figure of what `plot` puts on its axes, a legend below; None where it finds nothing to draw."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        axes = figure.subplots()
        if not plot(axes):
            return None
        if names := axes.get_legend_handles_labels()[1]:
            columns = legend_columns(names)
            figure.set_figheight(figure.get_figheight() + LINE * max(0, -(-len(names) // columns) - 2))
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.15, color=INK, linewidth=0.6)
    return figure


def svg_of(figure: Any, name: str) -> str:
    """For a page, in its text colour, whichever that is; `name` tells its parts from other figures' on the page."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def legend_columns(names: list[str]) -> int:
    """As many as the longest name leaves room for, at most four."""
    return max(1, min(4, len(names), int(WIDTH / (0.066 * max(map(len, names)) + 0.5))))


def color(number: int) -> str:
    """Of a variant, by its place; told apart by people who do not see all colours."""
    return COLORS[number % len(COLORS)]


def marker(number: int) -> str:
    """Of a variant: another one when colours begin again."""
    return MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
