"""`make docs`: the pages, the notebooks and the API as one site in build/docs, without network.

The site has the shape of the repository: a page stands where its source does, so that links between sources are links
between pages. The API is that of the docstrings: of the public names, and of every room.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pdoc
from nbconvert import HTMLExporter
from pdoc.render_helpers import to_html

import repe

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "repe/testbed/model/README.md")
BESIDE = ("LICENSE", "notebooks/*.png")  # what pages show, or lead to, as it is
API = ("repe", *(f"repe.{name}" for name in dir(repe) if name not in (*repe.__all__, "cli")))
NO_API = "!repe.testbed.+"
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
LINKED_SOURCE = re.compile(r"\.(md|ipynb)(?=[\"#])")


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    pdoc.render.configure(docformat="google", template_directory=Path(__file__).parent)
    pdoc.pdoc(*API, NO_API, output_directory=SITE / "api")
    pages = {path: FRONT_MATTER.sub("", (ROOT / path).read_text(encoding="utf-8")) for path in sources(*PAGES)}
    pages[Path("commands.md")] = commands()
    notebooks = {path: nbformat.read(ROOT / path, as_version=4) for path in sources("notebooks/*.ipynb")}
    ways = {
        "Pages": {path: heading(text) for path, text in pages.items()},
        "Notebooks": {path: heading(notebook.cells[0].source) for path, notebook in notebooks.items()},
        "API": {Path("api", *name.split(".")): name for name in API},
    }
    for path, text in pages.items():
        write(path, page(path, text, ways))
    shutil.copy(SITE / "README.html", SITE / "index.html")
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="")
    for path, notebook in notebooks.items():
        write(path, exporter.from_notebook_node(notebook)[0])
    for path in sources(*BESIDE):
        shutil.copy(ROOT / path, SITE / path)
    if broken := sorted(broken_links()):
        sys.exit("links that lead nowhere:\n" + "\n".join(broken))
    print(SITE / "index.html")


def sources(*patterns: str) -> list[Path]:
    """The files of the repository that a pattern fits, from its root, in the order of the patterns."""
    return [path.relative_to(ROOT) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def commands() -> str:
    """The command line, as its help says it."""
    ask = [sys.executable, "-m", "typer", "repe.cli", "utils", "docs", "--name", "repe"]
    told = subprocess.run(ask, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return re.sub("^  repe", "      repe", told.replace("`repe`", "The command line", 1), flags=re.MULTILINE)


def heading(text: str) -> str:
    return re.findall("^# (.+)$", text, re.MULTILINE)[0]


def page(path: Path, text: str, ways: dict[str, dict[Path, str]]) -> str:
    """A page of Markdown, with the ways to all others beside it."""
    template = pdoc.render.env.get_template("page.html.jinja2")
    places = {kind: {p.with_suffix(".html").as_posix(): name for p, name in way.items()} for kind, way in ways.items()}
    return template.render(title=heading(text), content=to_html(text), ways=places, up="../" * (len(path.parts) - 1))


def write(path: Path, html: str) -> None:
    """Writes what became of a source, where links to sources become links to pages."""
    place = (SITE / path).with_suffix(".html")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(LINKED_SOURCE.sub(".html", html), encoding="utf-8")


class Links(HTMLParser):
    """The links of a page, and the places on it that links can lead to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links |= {value for name, value in attrs if value and name in {"href", "src"}}
        self.places |= {value for name, value in attrs if value and name == "id"}


def broken_links() -> Iterator[str]:
    """The links inside the site that lead to no file, or from a page of ours to no place on another."""
    read = {path: Links(path.read_text(encoding="utf-8")) for path in SITE.rglob("*.html")}
    for path, links in read.items():
        for link in links.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / url.path).resolve() if url.path else path
            is_place_there = target not in read or url.fragment in read[target].places or "api" in target.parts
            if not (target.is_file() and is_place_there):
                yield f"{path.relative_to(SITE)}: {link}"


if __name__ == "__main__":
    main()
