"""The recipe, the script and the command lines of docs/training.md run as written, on the CPU."""

import os
import re
from pathlib import Path

import pytest

from tests import warm

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
TEXT = ROOT.joinpath("docs/training.md").read_text()
RECIPE, SCRIPT = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SHELL = "".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL))
SETUP, *COMMANDS = re.split(r"^torchrun --nproc-per-node 2 ", SHELL, flags=re.MULTILINE)
(ARGUMENTS,) = re.findall(r'ARGUMENTS="(.*?)"', SETUP, flags=re.DOTALL)
# What the page says to give without TransformerEngine and without a GPU.
ON_A_CPU = ARGUMENTS.replace("--bf16", "--transformer-impl local --no-rope-fusion --no-masked-softmax-fusion")

# What torchrun would start, in one process after another command: starting takes longer than training.
RUN = """
import runpy, sys
from tests.distributed.cases.pretrain import forget_megatron

if __name__ == "__main__":
    for line in sys.stdin:
        sys.argv = line.split()
        print("COMMAND", line, flush=True)
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__")
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        forget_megatron()
"""


def run(where: Path, commands: list[str]) -> warm.Done:
    commands = [command.replace("\\\n", " ").replace("$ARGUMENTS", ON_A_CPU) for command in commands]
    return warm.python(
        where / "run.py",
        stdin="\n".join(" ".join(command.split()) for command in commands),
        cwd=where,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A directory with what the page has."""
    where = tmp_path_factory.mktemp("page")
    for name, text in {"my_recipe": RECIPE, "my_pretrain": SCRIPT, "run": RUN}.items():
        (where / f"{name}.py").write_text(text)
    return where


@pytest.fixture(scope="module")
def said(page) -> list[str]:
    """What each of the page's commands printed, one after the other in one directory."""
    done = run(page, COMMANDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout.split("COMMAND")[1:]


def losses(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"\| loss: ([-+.\dE]+)", said)]


def test_every_command_of_the_training_page_trains_its_four_steps(said):
    assert [len(losses(each)) for each in said] == [4, 4, 4]


def test_the_second_stage_begins_with_the_weights_of_the_first(said):
    first, second, anew = map(losses, said)
    assert "successfully loaded checkpoint from aligned" in said[1]
    assert first[0] == anew[0] != second[0]  # on the same batch


def test_the_log_of_throughput_is_that_of_our_own_pretrain_alone(said):
    assert ["tokens/s" in each for each in said] == [True, True, False]


def test_a_script_of_ones_own_does_not_go_on_where_other_parts_trained(page, said):
    done = run(page, [COMMANDS[-1] + " --load aligned"])
    assert done.returncode != 0
    assert "aligned/iter_0000004 was written with" in done.stderr and "begin a second stage" in done.stderr
