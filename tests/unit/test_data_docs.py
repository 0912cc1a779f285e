"""The example of docs/data.md and the docstrings' run as written."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

import megatron_mimo.data

TEXT = Path(__file__).parents[2].joinpath("docs/data.md").read_text()
MODULES = [module.name for module in pkgutil.iter_modules(megatron_mimo.data.__path__)]


def test_the_example_prints_what_the_page_says():
    code, printed = (re.search(rf"```{kind}\n(.*?)```", TEXT, re.S).group(1) for kind in ("python", "text"))
    found = io.StringIO()
    with contextlib.redirect_stdout(found):
        exec(compile(code, "docs/data.md", "exec"), {"__name__": "docs"})
    assert found.getvalue() == printed


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(f"megatron_mimo.data.{name}")).failed == 0
