"""A judge of pictures: somebody's own function or class, found by its import path."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_mimo.cli.errors import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

_CALLED = "judge(drawn, reference, text), two pictures of PIL, of which reference may be None, and the prompt's text"


class Judge:
    """Calls what an import path names, and refuses what gives no number.

    Args:
        given: "module:function" or "module:Class"; a class is made without arguments. Modules beside the working
            directory are found too.

    Raises:
        Refused: no such module or name, one that fails, or nothing that can be called.
    """

    def __init__(self, given: str) -> None:
        self.given = given
        found = found_judge(given)
        self.name = getattr(found, "__name__", given.partition(":")[2])
        try:
            self._judge: Callable[..., Any] = found() if isinstance(found, type) else found
        except Exception as error:
            raise Refused(f"judge {given}: {_raised(error)} when made without arguments; mend it") from error
        if not callable(self._judge):
            raise Refused(f"judge {given}: expected {_CALLED}, found nothing that can be called; give it __call__")

    def __call__(self, drawn: Image, reference: Image | None, text: str, where: str) -> dict[str, float]:
        """Scores of a picture, by name; one number has the judge's own name.

        Args:
            drawn: by the model.
            reference: what the record has for it; None where it has none.
            text: of the prompt.
            where: of the record, for the message.

        Raises:
            Refused: it raises, or gives neither a number nor names with numbers.
        """
        try:
            told = self._judge(drawn, reference, text)
        except Exception as error:
            raise Refused(f"judge {self.given}: {_raised(error)} at {where}; it is called as {_CALLED}") from error
        scores = dict(told) if isinstance(told, Mapping) else {self.name: told}
        found = {str(name): _number(score) for name, score in scores.items()}
        wrong = [name for name, score in found.items() if score is None]
        if wrong or not found:
            raise Refused(
                f"judge {self.given}: expected it to give a finite number, or a dict of them, at {where}, found "
                f"{' '.join(repr(told).split())[:80]}"
            )
        return {name: score for name, score in found.items() if score is not None}


def found_judge(given: str) -> Any:
    """What an import path names; nothing is called.

    Raises:
        Refused: as `Judge`.
    """
    module, colon, name = given.partition(":")
    if not (module and colon and name):
        raise Refused(f"judge {given!r}: expected module:function or module:Class, such as judges:sharpness")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise Refused(
            f"judge {given}: importing {module} {_raised(error)}; run the command beside {module.split('.')[0]}.py, or "
            "install it"
        ) from error
    try:
        for word in name.split("."):
            found = getattr(found, word)
    except AttributeError:
        raise Refused(f"judge {given}: {module} has no {name}; name a function or class that it has") from None
    return found


def _number(score: object) -> float | None:
    """A score as a float; None where it is no finite number."""
    try:
        found = float(score)  # type: ignore[arg-type]  # numbers of NumPy and torch, too
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and not isinstance(score, str | bytes) else None


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
