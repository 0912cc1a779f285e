"""What keeps the package readable: files and classes of a size that a reader holds in mind."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_mimo"
FILES = sorted(PACKAGE.rglob("*.py"))
KERNELS = PACKAGE / "kernels/triton.py"  # one kernel after the other, read apart


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_has_at_most_400_lines_and_a_class_20_public_methods(path: Path) -> None:
    text = path.read_text()
    assert path == KERNELS or len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
            assert len([name for name in methods if not name.startswith("_")]) <= 20, node.name
