"""examples/quickstart.ipynb prints what it holds, top to bottom; `python -m tests.unit.test_quickstart` renews that."""

import contextlib
import io
import json
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest

from tests.commands import command

pytestmark = pytest.mark.process
NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"


def printed(source: str, names: dict) -> str:
    """What a cell prints to standard output in the directory of the process; `!` lines are commands."""
    found = io.StringIO()
    with contextlib.redirect_stdout(found):
        if source.startswith("!"):
            for line in source.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line.removeprefix("!"))
                assert program == "megatron-mimo"
                done = command(*words, cwd=Path.cwd())
                assert done.returncode == 0, (words, done.stderr)
                print(done.stdout, end="")
        else:
            exec(compile(source, str(NOTEBOOK), "exec"), names)
    return found.getvalue()


def ran(where: Path) -> list[tuple[str, str]]:
    """What each code cell holds as its output, and what it prints now."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict = {"__name__": "__main__"}
    with contextlib.chdir(where):
        return [
            ("".join(text for one in cell["outputs"] for text in one["text"]), printed("".join(cell["source"]), names))
            for cell in cells
        ]


def test_the_notebook_runs_top_to_bottom_and_prints_what_it_holds(tmp_path: Path) -> None:
    told = ran(tmp_path)
    assert len(told) >= 6 and [now for _, now in told] == [held for held, _ in told]
    assert "It is red." in told[5][1]


def test_the_notebook_is_one_that_jupyter_opens() -> None:
    content = json.loads(NOTEBOOK.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", one) for one in ids)
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


def renew() -> None:
    """Writes what the cells print into the notebook."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as where:
        outputs = iter(ran(Path(where)))
    content = json.loads(NOTEBOOK.read_text())
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            text = next(outputs)[1].splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    NOTEBOOK.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    renew()
