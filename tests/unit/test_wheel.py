"""The wheel: what it holds is enough to train a recipe where the checkout is not."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

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


def run(*command: object, cwd: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=outside, capture_output=True, text=True, timeout=900
    )
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
