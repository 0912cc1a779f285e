"""Saving and resuming a run."""

from importlib.util import find_spec

from megatron_mimo.moved import names_of

_moved = names_of(__name__)


def __getattr__(name: str) -> object:
    # A module of this package that is being imported is no name of 0.1.
    if find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _moved(name)
