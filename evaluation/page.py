"""Pages that a browser reads from disk, without a network; what is filled in is text unless its template says else."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(template: str, **values: object) -> str:
    """A file of `evaluation/pages`, filled in."""
    return PAGES.get_template(template).render(values)
