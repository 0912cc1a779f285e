"""Private and undocumented names of Megatron, torch and Triton are used in `compat/` alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[2] / "megatron_mimo"
OTHERS = ("megatron", "torch", "triton", "transformer_engine", "argparse")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "compat" not in path.relative_to(PACKAGE).parts)

# Public by their spelling, documented nowhere; `compat` says what each is for.
#: Of Python itself: documented in spite of the underscore.
DOCUMENTED = {("os", "_exit"), ("sys", "_current_frames")}
UNDOCUMENTED = {
    "LNImpl", "WrappedTorchNorm", "float16_groups", "fp32_from_float16_groups", "is_stub_optimizer",
    "model_float16_groups", "shard_fp32_from_float16_groups",
    "assume_constant_result", "chained_optimizers", "compile_helpers",
    "get_device_arch_version", "get_megatron_optimizer_config", "get_tensor_model_parallel_group_if_none",
    "init_state_fn", "initialize_megatron", "packed_metadata",
}  # fmt: skip


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_private_names() -> set[str]:
    """Underscored names that the package itself defines: attributes set on `self`, methods, fields, functions."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return {name for name in names if private(name)} - OF_TORCH_MODULES


BY_NAME = ("getattr", "setattr", "hasattr", "delattr")
# Methods that a subclass of a torch class would override.
OF_TORCH_MODULES = {name for name in dir(torch.nn.Module) if private(name) and callable(getattr(torch.nn.Module, name))}
OWN = own_private_names()


def others_names(tree: ast.Module) -> set[str]:
    """Names in a module that stand for another library's module, class or function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] in OTHERS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OTHERS:
            found |= {a.asname or a.name for a in node.names}
    return found


def faults(source: str) -> Iterator[str]:
    """What a module does with private names of others, with the line."""
    tree = ast.parse(source)
    others = others_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OTHERS:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.lineno}: imports {n}" for n in names if private(n) or n in UNDOCUMENTED)
        elif isinstance(node, ast.Import):
            names = [n for a in node.names if a.name.split(".")[0] in OTHERS for n in a.name.split(".")]
            yield from (f"{node.lineno}: imports {n}" for n in names if private(n))
        elif isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "ctx")
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in DOCUMENTED:
                continue
            if node.attr in UNDOCUMENTED or (private(node.attr) and not (of_self and node.attr in OWN)):
                yield f"{node.lineno}: .{node.attr}"
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(node.ctx, ast.Store | ast.Del) and isinstance(root, ast.Name) and root.id in others:
                yield f"{node.lineno}: puts another {ast.unparse(node)} in place"
        elif isinstance(node, ast.FunctionDef) and node.name in OF_TORCH_MODULES:
            yield f"{node.lineno}: overrides {node.name}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant) and (private(name.value) or name.value in UNDOCUMENTED):
                yield f"{node.lineno}: {node.func.id} {name.value}"
            if node.func.id in ("setattr", "delattr") and isinstance(owner, ast.Name) and owner.id in others:
                yield f"{node.lineno}: puts another {ast.unparse(owner)}.{ast.unparse(name)} in place"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_of_another_library_is_used_outside_compat(path: Path) -> None:
    found = list(faults(path.read_text()))
    assert not found, f"{path.relative_to(PACKAGE)}: {found}. Put them behind a function of megatron_mimo/compat."


@pytest.mark.parametrize(
    "source",
    [
        "from torch import _dynamo",
        "from torch._dynamo.trace_rules import clear_lru_cache",
        "import torch._inductor",
        "from megatron.training.checkpointing import _load_base_checkpoint",
        "from megatron.core.models.vision.vit_layer_specs import LNImpl",
        "import torch\ntorch._C._cuda_clearCublasWorkspaces()",
        "def hooks(module):\n    return module._forward_pre_hooks",
        "class A:\n    def hooks(self):\n        return self._forward_pre_hooks",
        "getattr(optimizer, '_set_main_param_and_optimizer_states')",
        "getattr(optimizer, 'chained_optimizers', [])",
        "def take(each):\n    each.init_state_fn = None",
        "from megatron.training import training\ntraining.train_step = None",
        "from megatron.core.datasets import utils\nsetattr(utils, 'anything', None)",
        "from megatron.core import utils\ndel utils.anything",
        "class A:\n    def _apply(self, fn):\n        pass",
        "def actions(parser):\n    return parser._actions",
    ],
)
def test_the_search_finds_each_way_to_use_one(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.zeros(1)",
        "class A:\n    def __init__(self):\n        self._row_blocks = self.__dict__",
        "from megatron.core.utils import unwrap_model\nunwrap_model(model).config = 1",
    ],
)
def test_the_search_leaves_public_names_alone(source: str) -> None:
    assert not list(faults(source))
