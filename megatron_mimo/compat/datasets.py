"""Private names of `datasets`, one function each: version, reason, and what to do when the name goes.

Checked by `tests/unit/test_compat.py` on the installed version; last read in datasets 5.2.
"""

from __future__ import annotations

from typing import Any


def shuffles(dataset: Any) -> bool:
    """Whether an `IterableDataset` shuffles, here or in one that it is made of.

    Private: `IterableDataset._ex_iterable`, whose parts are named `...Shuffled...`, there since datasets 2.
    Reason: what a shuffle buffer holds does not come back with `load_state_dict`, and nothing public tells of one.
    When it goes: leave the refusal to the comparison of records at resume.

    Example:
        >>> shuffles(object())
        False
    """
    parts = [getattr(dataset, "_ex_iterable", None)]
    while parts:
        part = parts.pop()
        if "Shuffled" in type(part).__name__:
            return True
        more = getattr(part, "__dict__", {})
        parts += [value for name, value in more.items() if name == "ex_iterable"]
        parts += list(more.get("ex_iterables", ()))
    return False
