"""What mkdocs is told beside mkdocs.yml: the order of pages, pages outside docs/, and API pages of the public names.

The order is docs/README.md's. What pages link to outside docs/ (README.md, examples, the log) is part of the site,
below repository/. An API page has the names of `__all__`.
"""

import re
from importlib import import_module
from pathlib import Path
from posixpath import dirname, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOMS = ("megatron_mimo", *(f"megatron_mimo.{room}" for room in ("data", "decoders", "generation", "training")))
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """The navigation: a section a heading of the index, a page a link to one in its lists."""
    sections: list[dict] = []
    for line in ROOT.joinpath("docs/README.md").read_text().splitlines():
        if line.startswith("## "):
            sections.append({line[3:]: []})
        elif sections and (named := re.match(r"(?:- |\d+\. )\[(.+?)\]\((\S+?\.md)\)", line)):
            (pages,) = sections[-1].values()
            pages.append({named[1]: in_site(normpath(f"docs/{named[2]}"))})
    config.nav = [{"Index": "README.md"}, *sections, {"API": [{room: f"api/{room}.md"} for room in ROOMS]}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds what is linked to outside docs/, and the API pages."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in links(page) - seen:
            seen.add(target)
            if not target.startswith("docs/") and ROOT.joinpath(target).is_file():
                files.append(File.generated(config, in_site(target), abs_src_path=str(ROOT / target)))
                waiting += [target] * target.endswith(".md")
    for room in ROOMS:
        names = "".join(f"\n::: {room}.{name}\n" for name in import_module(room).__all__)
        files.append(File.generated(config, f"api/{room}.md", content=f"# `{room}`\n{names}"))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages of the site."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = normpath(f"{dirname(in_repository(here))}/{link[1]}").lstrip("/")
        if "://" in link[1] or not ROOT.joinpath(target).exists():
            return link[0]
        return f"]({relpath(in_site(target), dirname(here) or '.')}{link[2] or ''})"

    parts = CODE.split(markdown)
    return "".join(part if place % 2 else LINK.sub(moved, part) for place, part in enumerate(parts))


def links(page: str) -> set[str]:
    """Files of the repository that a page of it links to."""
    text = CODE.sub("", ROOT.joinpath(page).read_text())
    return {normpath(f"{dirname(page)}/{link}").lstrip("/") for link, _ in LINK.findall(text) if "://" not in link}


def in_site(path: str) -> str:
    """Where a file of the repository stands in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def in_repository(uri: str) -> str:
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"
