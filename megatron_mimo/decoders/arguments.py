"""What constructors refuse: sizes that are none, options that nobody knows, one thing said twice."""

from __future__ import annotations


def at_least_one(owner: str, **sizes: int) -> None:
    """Refuses sizes that are no positive int.

    Raises:
        ValueError: naming the owner, the option and its value.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{owner}: {name} must be an int of at least 1, got {size!r}")


def one_of(owner: str, option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses an option outside its allowed values.

    Raises:
        ValueError: naming the owner, the option, its value and the allowed ones.
    """
    if value not in allowed:
        raise ValueError(f"{owner}: {option} must be one of {list(allowed)}, got {value!r}")


def not_both(owner: str, **named: object) -> None:
    """Refuses settings beside the description that holds them; None is no setting.

    Raises:
        ValueError: naming the owner and the settings.
    """
    given = [name for name, value in named.items() if value is not None]
    if given:
        raise ValueError(f"{owner}: expected `targets` alone to describe the targets, found {given} beside it")
