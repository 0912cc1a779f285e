"""Prints which room of the package imports which, as text: ``python dev/imports.py [path of megatron_mimo]``.

A room is a file or folder of ``megatron_mimo/``. Each stands above all that it imports, so arrows run down. The number
is the longest way from it to a room that imports nothing. An arrow is left out where another way leads there already,
and so are imports for type checkers alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_mimo"


def graph(package: Path) -> dict[str, set[str]]:
    """Room -> the other rooms that its files import, within functions too."""
    rooms: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).with_suffix("").parts[0]
        if room != "__init__":
            rooms.setdefault(room, set()).update(imported(ast.parse(path.read_text()), package.name))
    return {room: (found & rooms.keys()) - {room} for room, found in rooms.items()}


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Rooms that a module imports when it runs."""
    for node in running(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith(f"{package}."))


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING:``."""
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from running(child)


def levels(rooms: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by depth: those that import nothing first, each other one after all that it imports.

    Raises:
        ValueError: rooms that import each other.
    """
    placed: list[list[str]] = []
    left = dict(rooms)
    while left:
        free = sorted(room for room, found in left.items() if not found & left.keys())
        if not free:
            raise ValueError(f"rooms: expected imports in one direction, found a circle among {sorted(left)}.")
        placed.append(free)
        left = {room: found for room, found in left.items() if room not in free}
    return placed


def drawn(rooms: dict[str, set[str]]) -> str:
    """The graph as text, rooms that import nothing last; no arrow to what the other arrows reach."""
    lines = []
    for depth, level in reversed(list(enumerate(levels(rooms)))):
        for room in level:
            reached = set().union(*(reachable(rooms, other) for other in rooms[room]))
            arrows = sorted(rooms[room] - reached)
            lines.append(f"{depth:2} {room:<16}" + (f" -> {', '.join(arrows)}" if arrows else ""))
    return "\n".join(line.rstrip() for line in lines)


def reachable(rooms: dict[str, set[str]], start: str) -> set[str]:
    """What `start` imports, directly or through others."""
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = rooms[ahead.pop()] - found
        found |= new
        ahead.extend(new)
    return found


if __name__ == "__main__":
    print(drawn(graph(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)))
