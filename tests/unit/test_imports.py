"""Imports run in one direction, and importing has no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_mimo"

# A room imports only rooms above it in this list.
ROOMS = [
    "moved",
    "axes",
    "compat",
    "graphs",
    "fp8",
    "config",
    "losses",
    "deferred",
    "tally",
    "kernels",
    "placement",
    "sharding",
    "batch",
    "data",
    "draws",
    "idle",
    "assemble",
    "segment_kernels",
    "segments",
    "packed_rotary",
    "packed",
    "rotary",
    "cudnn",
    "attention",
    "cached_attention",
    "specs",
    "build",
    "sharded_state",
    "decoders",
    "modality",
    "output",
    "check",
    "labels",
    "route",
    "token_loss",
    "plan",
    "encode",
    "exchange",
    "lookup",
    "align",
    "attention_mask",
    "multi_token",
    "language",
    "hf",
    "generation",
    "megatron_model",
    "model",
    "exits",
    "hosts",
    "torchrun",
    "run",
    "launch",
    "layout",
    "pretrained",
    "training",
    "cli",
]
WITHOUT_MEGATRON = [
    "data",
    "config",
    "losses",
    "deferred",
    "tally",
    "kernels",
    "placement",
    "sharding",
    "batch",
    "check",
    "plan",
    "labels",
    "exchange",
]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("megatron_mimo.")}
    return rooms


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_room_has_its_place():
    assert {room_of(path) for path in modules()} <= set(ROOMS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_in_one_direction(path):
    room = room_of(path)
    above = set(ROOMS[: ROOMS.index(room)]) | {room}
    assert imported_rooms(path) <= above


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.process
def test_importing_the_package_prints_nothing_and_loads_nothing():
    loaded = "import sys, megatron_mimo; assert not {'torch', 'megatron'} & set(sys.modules)"
    assert python(loaded) == ""


@pytest.mark.process
def test_importing_the_training_package_loads_nothing_until_a_name_of_it_is_used():
    loaded = "import sys, megatron_mimo.training as t; dir(t); assert not {'torch', 'megatron'} & set(sys.modules)"
    used = (
        "t.add_mimo_args, t.forward_step, t.model_provider, t.pretrain; assert 'megatron.training' not in sys.modules"
    )
    python(f"{loaded}; {used}")


@pytest.mark.process
def test_integer_rooms_and_losses_do_without_megatron():
    imports = "; ".join(f"import megatron_mimo.{room}" for room in WITHOUT_MEGATRON)
    assert python(f"import sys; {imports}; assert 'megatron' not in sys.modules") == ""


#: What extras bring; the core is torch and Megatron-Core.
EXTRAS = (
    "safetensors", "transformers", "huggingface_hub", "tokenizers", "PIL", "av", "datasets", "soundfile", "soxr",
    "torchvision", "jinja2", "typer", "yaml", "diffusers", "sklearn", "matplotlib",
)  # fmt: skip


@pytest.mark.process
def test_what_extras_do_not_serve_is_imported_without_them():
    """In a cold process; only the command line's modules may need more, and tell it by themselves."""
    program = f"""
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
sys.modules.update(dict.fromkeys({EXTRAS}))  # None is what is not there
import megatron_mimo
for found in pkgutil.walk_packages(megatron_mimo.__path__, "megatron_mimo."):
    if not found.name.startswith("megatron_mimo.cli."):
        importlib.import_module(found.name)
from megatron_mimo.training import Trainer, pretrain
import examples.digits.train
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
