"""Examples in docstrings and in the README run as written."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import megatron_mimo
from tests import warm

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.joinpath("megatron_mimo").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


PROCESS_WIDE = ["megatron_mimo.compat.cuda_on_cpu", "megatron_mimo.launch"]  # their examples would end our own run


@pytest.mark.process
@pytest.mark.parametrize("name", PROCESS_WIDE)
def test_docstring_examples_in_a_process_of_their_own(name):
    # Not `python -m doctest FILE`, which puts the file's folder first in sys.path, where a neighbour is named torch.
    program = f"import doctest, {name} as module; raise SystemExit(doctest.testmod(module).failed)"
    done = warm.python("-c", program)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in MODULES if name not in PROCESS_WIDE])
def test_docstring_examples(name, single_process):
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert found.failed == 0


def test_every_public_name_has_its_home():
    for name in megatron_mimo.__all__:
        assert getattr(megatron_mimo, name).__module__.startswith("megatron_mimo.")
    assert set(megatron_mimo.__all__) <= set(dir(megatron_mimo))
    with pytest.raises(AttributeError, match="no attribute 'Mimo'"):
        _ = megatron_mimo.Mimo


def test_readme_example(single_process):
    (code,) = re.findall(r"```python\n(.*?)```", ROOT.joinpath("README.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(code.replace("mimo.initialize()", "pass"), names)
    assert names["drawn"].shape == (1, 1, 8, 8)
    assert names["loss_mask"].tolist() == [[0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]]  # the first 127 opens the image
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 25


def test_readme_and_docs_point_at_files_that_exist():
    for document in [ROOT / "README.md", *ROOT.joinpath("docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert document.parent.joinpath(target).exists(), f"{document.name} -> {target}"
