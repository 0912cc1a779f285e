"""A recipe's file, with what the command line changes of it, as a `Recipe`; whatever is wrong is one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.model_recipe import KINDS
from megatron_mimo.cli.nearest import unknown
from megatron_mimo.cli.recipe import Recipe

_SHIPPED = Path(__file__).with_name("recipes")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, and a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"found {sorted(twice)} twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with the library."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def read_recipe(path: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or a shipped one, with `key=value` changes.

    Args:
        path: of a file, or the name of a shipped recipe.
        changes: each a key with dots and a value in YAML; a list's entries are named by number, stages by name too.

    Raises:
        Refused: in one line, whatever is wrong with it.
    """
    file = shipped().get(path, Path(path))
    if not file.is_file():
        raise Refused(f"{path}: expected a recipe's file or one of {list(shipped())}, found nothing there")
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: expected YAML in UTF-8, found byte {error.start} of something else") from error
    given = _parsed(text, str(path))
    if not isinstance(given, dict):
        raise Refused(f"{path}: expected keys with values, found {type(given).__name__}")
    for change in changes:
        _change(given, change)
    model = given.get("model")
    if isinstance(model, dict) and isinstance(model.get("source"), str):  # the directory of a run stands for its model
        run = Path(model["source"])
        if (run / "recipe.yaml").is_file() and (run / "model").is_dir():
            model["source"] = str(run / "model")
    return checked(given, str(path))


def checked(given: Any, where: str) -> Recipe:
    """What a file holds as a recipe.

    Raises:
        Refused: naming each key that is wrong.
    """
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        told = "; ".join(_told(one) for one in error.errors())
        raise Refused(f"{where}: {told}") from error


def written(recipe: Recipe) -> str:
    """A recipe as YAML that `read_recipe` takes, with every value that it left out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise Refused(f"{where}: expected YAML: {' '.join(str(error).split())}") from error


def _change(given: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise Refused(f"{change!r}: expected key=value, such as stages.0.steps=100")
    *path, last = key.split(".")
    node: Any = given
    for word in path:
        node = _entered(node, word, key)
    parsed = _parsed(value, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = parsed
    else:
        node[last] = parsed


def _entered(node: Any, word: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, word, key)]
    if not isinstance(node.get(word), dict | list):
        node[word] = {}
    return node[word]


def _index(node: list[Any], word: str, key: str) -> int:
    names = [one.get("name") if isinstance(one, dict) else None for one in node]
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(node):
        return int(word)
    known = [str(name) for name in names if name is not None] or [str(number) for number in range(len(node))]
    raise Refused(f"{key}: {unknown('entry', word, known)}")


def _told(error: Any) -> str:
    """What pydantic found, as `place: what was expected, what was found`."""
    steps = [str(step) for step in error["loc"]]
    # After a field that has several kinds pydantic names the kind.
    place = ".".join(step for before, step in zip(("", *steps), steps) if before != "writes" or step not in KINDS)
    if error["type"] == "union_tag_invalid":
        return f"{place}.kind: {unknown('kind', error['ctx']['tag'], KINDS)}"
    if error["type"] == "union_tag_not_found":
        return f"{place}.kind: expected one of {list(KINDS)}, found none"
    if error["type"] == "missing":
        return f"{place}: expected a value, found none"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{place}: {said}" if place else said
    said = said.replace("Input should be", "expected")
    return f"{place}: {said}, found {error['input']!r:.80}"
