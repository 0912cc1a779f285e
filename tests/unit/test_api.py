"""The public names and their signatures are those of api.txt; `python -m tests.unit.test_api` renews it."""

import difflib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("api.txt")
MODULES = ["megatron_mimo", "megatron_mimo.decoders", "megatron_mimo.training"]


def public_api() -> Iterator[str]:
    """A line a public name, and one a public method of each public class."""
    for module in MODULES:
        for name in sorted(import_module(module).__all__):
            value = getattr(import_module(module), name)
            yield f"{module}.{name}{signature(value)}"
            if inspect.isclass(value) and not issubclass(value, tuple):
                yield from (f"{module}.{name}.{line}" for line in methods(value))


def methods(owner: type) -> Iterator[str]:
    """Public methods and properties that our own classes give `owner`, those of its public parents left out."""
    for name in sorted(dir(owner)):
        home = next((base for base in owner.__mro__ if name in vars(base)), object)
        inherited = home is not owner and home in public_classes()  # which has a line of its own
        if name.startswith("_") or inherited or not home.__module__.startswith("megatron_mimo"):
            continue
        value = inspect.getattr_static(owner, name)
        if isinstance(value, property):
            yield name
        elif callable(value) or isinstance(value, classmethod | staticmethod):
            yield f"{name}{signature(getattr(owner, name))}"


@cache
def public_classes() -> frozenset[type]:
    named = [getattr(import_module(module), name) for module in MODULES for name in import_module(module).__all__]
    return frozenset(value for value in named if inspect.isclass(value))


def signature(value: object) -> str:
    if not callable(value):
        return ""
    shown = str(inspect.signature(value))
    return re.sub(r" at 0x[0-9a-f]+|__main__\.", "", shown)


def test_the_public_api_is_the_one_written_down():
    found, written = list(public_api()), SNAPSHOT.read_text().splitlines()
    changed = "\n".join(difflib.unified_diff(written, found, "api.txt", "found", lineterm="", n=0))
    assert not changed, (
        f"the public API changed; where you mean it, renew with `python -m tests.unit.test_api`:\n{changed}"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(public_api()) + "\n")
