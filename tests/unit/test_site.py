"""The site of docs/ is built in strict mode: every link and anchor leads somewhere, every public name has its page."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from tests.unit.test_api import MODULES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(where)))
    return where


@pytest.mark.parametrize("module", [*MODULES, "megatron_mimo.data", "megatron_mimo.generation"])
def test_the_site_has_the_docstring_of_every_public_name(site: Path, module: str) -> None:
    page = site.joinpath("api", module, "index.html").read_text()
    assert set(import_module(module).__all__) - set(re.findall(rf'id="{re.escape(module)}\.(\w+)"', page)) == set()


def test_the_site_goes_through_the_pages_in_the_order_of_the_index(site: Path) -> None:
    text = ROOT.joinpath("docs/README.md").read_text()
    index = re.findall(r"^(?:- |\d+\. )\[(.*?)\]\(\S+\.md\)", text, flags=re.MULTILINE)
    home = site.joinpath("index.html").read_text()
    menu = re.findall(r'toctree-l1"><a class="reference internal" href="[^"]*">(.*?)</a>', home)
    assert menu[: len(index)] == index


@pytest.mark.parametrize("wrong", ["[a](nowhere.md)", "[a](#nowhere)", "[a](other.md#nowhere)", "[a](../nowhere.py)"])
def test_a_link_that_leads_nowhere_ends_the_build(wrong: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    docs.joinpath("README.md").write_text(f"# Here\n\n{wrong}\n")
    docs.joinpath("other.md").write_text("# Other\n")
    options = dict(strict=True, docs_dir=str(docs), site_dir=str(tmp_path / "site"), plugins=[], hooks=[])
    with pytest.raises(Abort, match="warning"):
        build(load_config(str(ROOT / "mkdocs.yml"), **options))
