"""Adds to the mkdocs site: files at the root that documents link to, and an API page per package."""

import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
AT_THE_ROOT = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(\[[^]]*\])\((?!https?:|#)([^)#\s]+)((?:#[^)\s]*)?\))")  # text, path, anchor


def packages() -> list[str]:
    """Names of the packages with code."""
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    return [name for name in names if (ROOT / name.replace(".", "/") / "__init__.py").is_file()]


def page_of(package: str) -> str:
    names = sorted(path.stem for path in (ROOT / package.replace(".", "/")).glob("*.py") if path.stem != "__init__")
    return "\n\n".join([f"# {package}", f"::: {package}", *(f"::: {package}.{name}" for name in names)])


def title_of(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that documents link to, and the API pages."""
    documents = [*(ROOT / name for name in AT_THE_ROOT), *(ROOT / "docs").glob("*.md")]
    linked = {(path.parent / link[2]).resolve() for path in documents for link in LINK.finditer(path.read_text())}
    for path in sorted({ROOT / name for name in AT_THE_ROOT} | {path for path in linked if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("docs/"):
            files.append(File.generated(config, AT_THE_ROOT.get(name, name), abs_src_path=str(path)))
    for package in packages():
        files.append(File.generated(config, f"api/{package}.md", content=page_of(package)))
    listed = "".join(f"- [{package}]({package}.md)\n" for package in packages())
    where = "The [file map](../index.md#where-things-are) says what each package is for"
    content = f"# Python API\n\n{where}; these pages list its modules with their docstrings.\n\n{listed}"
    files.append(File.generated(config, "api/index.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links for the site's layout; a link whose text is a file name shows the document's title."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # it would list this page alone
    if page.file.src_uri.startswith("api/"):
        return markdown
    folder = ROOT if page.file.src_uri in AT_THE_ROOT.values() else ROOT / "docs"

    def moved(link: re.Match) -> str:
        path = (folder / link[2]).resolve()
        text = f"[{title_of(path)}]" if link[1].endswith(".md]") and path.is_file() else link[1]
        name = path.relative_to(ROOT).as_posix()
        return f"{text}({AT_THE_ROOT.get(name, name.removeprefix('docs/'))}{link[3]}"

    return LINK.sub(moved, markdown)
