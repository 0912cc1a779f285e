"""The pages' links lead somewhere, and the index names every page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("dev/*.md"), *ROOT.glob("examples/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_the_index_names_every_page() -> None:
    index = ROOT.joinpath("docs/README.md").read_text()
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_each_test_of_a_silent_fault_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", ROOT.joinpath("dev/silent_faults.md").read_text())
    assert len(named) > 50
    for file, function in named:
        path = ROOT / "tests" / ("distributed" if file.startswith("cases/") else "unit") / file
        assert f"\ndef {function}(" in path.read_text(), (file, function)
