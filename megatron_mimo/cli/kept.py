"""The recipe that a run's directory keeps: a run goes on with the recipe it began with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.reading import checked, read_recipe
from megatron_mimo.cli.recipe import Recipe

#: What may change while a run goes on: how it is run, looked at and kept.
_FREE = {"directory", "layout", "evaluation", "checkpoints", "loggers", "megatron", "graphs"}


def check_kept(recipe: Recipe) -> None:
    """Refuses a recipe that is not the one which its directory's run began with. One without a checkpoint begins anew.

    Raises:
        Refused: naming the keys.
    """
    file = recipe.directory / "recipe.yaml"
    goes_on = (recipe.directory / "model").is_dir() or any((recipe.directory / "stages").glob("*/*step_*"))
    if not file.is_file() or not goes_on:
        return
    both = (settled(read_recipe(str(file))), settled(recipe))
    before, now = (flat(one.model_dump(mode="json", exclude=_FREE)) for one in both)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = [key for key in changed if not key.startswith("processor.workers")]
    if changed:
        told = ", ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed[:4])
        raise Refused(
            f"{recipe.directory}: holds a run of another recipe ({told}); give directory=ANOTHER, or that recipe back"
        )


def settled(recipe: Recipe) -> Recipe:
    """A recipe whose local paths are whole, so that they hold wherever it is read again."""
    given = recipe.model_dump(mode="json")
    model = given["model"]
    places = [(model, "source"), (model, "language_model")]
    for modality in model["modalities"].values():
        places += [(modality["reads"], "name"), (modality["writes"], "codec")]
    stages = [source for stage in given["stages"] for source in stage["data"] or ()]
    for source in (*given["data"], *given["evaluation"]["data"], *stages):
        places += [(source, "path"), (source, "media_root")]
    for node, key in places:
        if node is not None and node.get(key) is not None and Path(node[key]).exists():
            node[key] = os.path.abspath(node[key])
    return checked(given, "recipe")


def flat(given: Any, path: str = "") -> dict[str, Any]:
    """Key with dots -> value.

    Example:
        >>> flat({"a": {"b": 1}, "c": [2]})
        {'a.b': 1, 'c.0': 2}
    """
    if isinstance(given, dict):
        entries = list(given.items())
    elif isinstance(given, list):
        entries = [(str(number), one) for number, one in enumerate(given)]
    else:
        return {path: given}
    found: dict[str, Any] = {}
    for key, one in entries:
        found |= flat(one, f"{path}.{key}" if path else str(key))
    return found
