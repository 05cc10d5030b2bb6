"""HTML pages that work offline, and figures in a common style for pages and papers."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

COLORS = ["#4477AA", "#EE6677", "#228833", "#AA3377", "#CC8800", "#33A6C2", "#888888", "#6655CC", "#996633", "#DD44AA"]
MARKERS = "osD^vPX<>*"
INK = "#010203"  # placeholder for the page's text colour
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "pdf.fonttype": 42,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
WIDTH, LINE = 4.6, 0.18  # in inches: width of a figure, and height of a line of its legend

TEMPLATES = FileSystemLoader(Path(__file__).parent / "pages")
PAGES = Environment(loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render_page(template: str, **values: object) -> str:
    """Render a template of `evaluation/pages`. Values are escaped unless the template marks them as safe."""
    return PAGES.get_template(template).render(values)


def make_figure(plot: Callable[[Any], bool]) -> Any:
    """Create a figure with a legend below; None if `plot`, which draws on the axes, returns False."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if not plot(axes):
            return None
        if names := axes.get_legend_handles_labels()[1]:
            columns = legend_columns(names)
            figure.set_figheight(figure.get_figheight() + LINE * max(0, -(-len(names) // columns) - 2))
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        axes.grid(alpha=0.15, color=INK, linewidth=0.6)
    return figure


def figure_to_svg(figure: Any, name: str) -> str:
    """Convert a figure to SVG in the page's text colour. `name` makes its ids unique on the page."""
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
    """Number of columns that fit, judged by the longest name; at most four."""
    return max(1, min(4, len(names), int(WIDTH / (0.066 * max(map(len, names)) + 0.5))))


def color(number: int) -> str:
    """Colour of a variant by its index, from a palette for colour-blind readers."""
    return COLORS[number % len(COLORS)]


def marker(number: int) -> str:
    """Marker of a variant by its index; it differs for variants of the same colour."""
    return MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
