"""The wheel: what it holds is enough to train a recipe where the checkout is not."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import commands, warm
from tests.distributed.cases.pretrain import SIZES, TRAINING

ROOT = Path(__file__).parents[2]

TRAIN = """
import sys

import megatron_mimo
from examples.recipes import any_to_any_small
from megatron_mimo.training import pretrain

print("FROM", megatron_mimo.__file__, megatron_mimo.__version__)
sys.argv[1:] = {arguments}
pretrain(any_to_any_small)
"""


def outside() -> dict[str, str]:
    """This process's environment without what leads to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def process(*command: object, cwd: Path) -> warm.Done:
    """How a command ended, in a cold process that has nothing of this one."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=outside(), capture_output=True, text=True, timeout=900
    )
    return warm.Done(done.returncode, done.stdout, done.stderr)


def run(*command: object, cwd: Path) -> str:
    done = process(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def build(where: Path) -> Path:
    """The wheel of a copy of the checkout, since building leaves files behind."""
    source = where / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "megatron_mimo", source / "megatron_mimo", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", where, source, cwd=where)
    (wheel,) = where.glob("*.whl")
    return wheel


def trains(python: Path, where: Path) -> None:
    """Trains a recipe that was copied out of examples/ for two steps with `python`'s own megatron_mimo."""
    shutil.copytree(ROOT / "examples" / "recipes", where / "examples" / "recipes")
    arguments = [*SIZES, *TRAINING, "--train-iters", "2"]
    (where / "train.py").write_text(TRAIN.format(arguments=arguments))
    said = run(python, "train.py", cwd=where)
    home, version = re.search(r"FROM (\S+) (\S+)", said).groups()
    assert Path(home).is_relative_to(python.parents[1])
    assert f'version = "{version}"' in ROOT.joinpath("pyproject.toml").read_text()
    assert len(re.findall(r"\| loss: [-+.\dE]+", said)) == 2


@pytest.mark.process
def test_the_wheel_trains_a_copied_recipe_where_torch_and_megatron_are_installed(tmp_path):
    wheel = build(tmp_path)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # A path that a .pth names has its own .pth files left alone: the checkout's editable installation is not seen.
    (own / "installed.pth").write_text(sysconfig.get_path("purelib"))
    assert (own / "megatron_mimo" / "py.typed").exists()
    assert (own / "megatron_mimo" / "cli" / "recipes" / "caption.yaml").exists()
    assert run(tmp_path / "env" / "bin" / "megatron-mimo", "--help", cwd=tmp_path).startswith("Usage: megatron-mimo")
    trains(python, tmp_path)


@pytest.mark.long
@pytest.mark.process
def test_an_installation_from_nothing_trains_a_copied_recipe(tmp_path):
    wheel = build(tmp_path)
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    # The loop logs to TensorBoard where it is there; a recipe needs nothing beyond the wheel's own dependencies.
    constraints = ["--constraint", ROOT / "constraints.txt"]
    run(python, "-m", "pip", "install", wheel, *constraints, cwd=tmp_path)
    trains(python, tmp_path)


READS = """
import importlib.metadata, sys
import av, datasets, soundfile, soxr, torchvision, transformers
import torch
from torchvision.ops import nms
from transformers import Qwen2VLVideoProcessor, Qwen2VLImageProcessor

import megatron.core, megatron.energon
import megatron_mimo.data, megatron_mimo.pretrained

print("FROM", megatron_mimo.__file__, importlib.metadata.version("megatron-mimo"))
nms(torch.rand(3, 4), torch.rand(3), 0.5)  # a torchvision of another torch has no operators
Qwen2VLVideoProcessor()
"""


@pytest.mark.long
@pytest.mark.process
def test_the_extras_hf_data_and_energon_install_together_and_read_data(tmp_path):
    """Into an environment with nothing but pip; torch stays the one that the library is tested with."""
    wheel = build(tmp_path)
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    constraints = ["--constraint", ROOT / "constraints.txt"]
    run(python, "-m", "pip", "install", f"{wheel}[hf,data,energon]", *constraints, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    said = run(python, "-c", READS, cwd=tmp_path)
    assert Path(re.search(r"FROM (\S+)", said)[1]).is_relative_to(tmp_path / "env")
    code = re.search(r"```python\n(.*?)```", ROOT.joinpath("docs/data.md").read_text(), re.S)[1]
    printed = re.search(r"```text\n(.*?)```", ROOT.joinpath("docs/data.md").read_text(), re.S)[1]
    (tmp_path / "page.py").write_text(code)
    assert run(python, "page.py", cwd=tmp_path) == printed
    # The suite skips Energon's tests where it is absent; here it is present.
    run(python, "-m", "pip", "install", "pytest", "hypothesis", *constraints, cwd=tmp_path)
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    for name in ("data_samples.py", "tiny.py", "unit/test_data_loading.py", "unit/test_data_energon.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    said = run(python, "-m", "pytest", "-q", "tests/unit/test_data_energon.py", cwd=tmp_path)
    assert re.search(r"\d+ passed", said) and "skipped" not in said


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of an environment with nothing but pip, into which the wheel and the README's extras went."""
    where = tmp_path_factory.mktemp("installed")
    (extras,) = set(re.findall(r"pip install '\.\[(.*?)\]'", ROOT.joinpath("README.md").read_text()))
    run(sys.executable, "-m", "venv", where / "env", cwd=where)
    programs = where / "env" / "bin"
    constraints = ["--constraint", ROOT / "constraints.txt"]
    run(programs / "python", "-m", "pip", "install", f"{build(where)}[{extras}]", *constraints, cwd=where)
    run(programs / "python", "-m", "pip", "check", cwd=where)
    home = run(programs / "python", "-c", "import megatron_mimo; print(megatron_mimo.__file__)", cwd=where)
    assert Path(home.strip()).is_relative_to(where / "env")
    return programs


def killed(*command: object, cwd: Path, when: Callable[[], bool]) -> None:
    """Sends `command` SIGKILL as soon as `when` says so, which it does before its end."""
    with open(cwd / "killed.txt", "w+") as said:
        started = subprocess.Popen(
            [str(part) for part in command], cwd=cwd, env=outside(), stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            ended = time.monotonic() + 600
            while not when() and started.poll() is None and time.monotonic() < ended:
                time.sleep(0.005)
        finally:
            started.kill()
        assert started.wait() == -9, (cwd / "killed.txt").read_text()


def lines(file: Path) -> list[dict]:
    """The whole lines of a file; a process that was killed may have left half of one."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def steps(directory: Path) -> Counter:
    """How often each step stands in a run's log."""
    return Counter((one["stage"], one["step"]) for one in lines(directory / "log.jsonl") if one["kind"] == "train")


LOADS = """
import sys
import transformers

kind, directory = sys.argv[1:]
model, told = getattr(transformers, kind).from_pretrained(directory, output_loading_info=True)
assert not told["missing_keys"] and not told["unexpected_keys"], told
print(type(model).__name__, sum(one.numel() for one in model.parameters()))
"""


@pytest.mark.long
@pytest.mark.process
def test_the_readmes_model_prints_nothing_in_an_installation_from_nothing(installed: Path, tmp_path: Path) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", ROOT.joinpath("README.md").read_text(), re.S)
    (tmp_path / "readme.py").write_text(code)
    done = process(installed / "python", "readme.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "data", "loaded"),
    [
        (commands.caption, commands.pictures, ("LlavaForConditionalGeneration", "hf")),
        (commands.listen, commands.sounds, ("AutoModelForCausalLM", "hf/language_model")),
    ],
    ids=["pictures", "sounds"],
)
def test_an_installation_from_nothing_goes_from_a_folder_to_an_exported_model_and_on_after_kill_9(
    words: Callable[..., list[str]], data: Callable[[], Path], loaded: tuple[str, str], installed: Path, tmp_path: Path
) -> None:
    """Where nothing is but the wheel, what it needs, and the folder."""
    folder, directory = Path(shutil.copytree(data(), tmp_path / data().name)), tmp_path / "run"
    changes = ["stages.1.decay=constant", "checkpoints.every=5", f"data={folder.name}"]
    train = words(directory, *changes, steps=40)
    program = installed / "megatron-mimo"
    killed(program, *train, cwd=tmp_path, when=lambda: ("whole", 12) in steps(directory))
    assert not (directory / "model").exists()

    found = commands.whole_way(lambda *words: process(program, *words, cwd=tmp_path), train, folder, tmp_path)
    assert steps(directory) == Counter([*(("projector", n) for n in (1, 2)), *(("whole", n) for n in range(1, 41))])
    learned = [one["text"] for one in lines(directory / "log.jsonl") if one["kind"] == "train"]
    assert learned[-1] < learned[0] / 3
    right = [file.read_text() for file in sorted(folder.glob("*.txt"))]
    assert len(found) == len(right) and set(found) <= set(right)

    asking = ["generate", directory, folder, "--output", tmp_path / "broken", "--max-new-tokens", 12, "--batch-size", 1]
    parts = tmp_path / "broken" / "parts"
    killed(program, *asking, cwd=tmp_path, when=lambda: any(file.stat().st_size for file in parts.glob("*.jsonl")))
    assert not (tmp_path / "broken" / "answers.jsonl").exists()
    run(program, *asking, cwd=tmp_path)
    assert commands.texts(tmp_path / "broken") == found
    told = [line["index"] for part in parts.iterdir() for line in lines(part)]
    assert sorted(told) == list(range(len(right)))

    kind, place = loaded
    assert int(run(installed / "python", "-c", LOADS, kind, place, cwd=tmp_path).split()[1]) > 0
