"""Names that are not known, told with the nearest that are."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(what: str, found: str, known: Iterable[str]) -> str:
    """A line that says that `found` is unknown, with the nearest known name, or with all where none is near.

    Example:
        >>> unknown("key", "langauge_model", ["source", "language_model"])
        "unknown key 'langauge_model'; did you mean 'language_model'?"
    """
    known = list(known)
    near = get_close_matches(found, known, n=1)
    if near:
        return f"unknown {what} {found!r}; did you mean {near[0]!r}?"
    return f"unknown {what} {found!r}; expected one of {known}" if len(known) < 20 else f"unknown {what} {found!r}"
