"""What torchrun says in its environment variables."""

from __future__ import annotations

import os


def under_torchrun() -> bool:
    """Whether this process was started as one rank of several, by torchrun or anything that sets its variables."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def torchrun_number(name: str, least: int, default: int) -> int:
    """The number in one of torchrun's variables."""
    value = os.environ.get(name, str(default))
    if not value.strip().isdecimal() or int(value) < least:
        raise ValueError(
            f"initialize: expected a whole number of at least {least} in the environment variable {name}, found "
            f"{value!r}. Start the ranks with torchrun, which sets it, or remove RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT to run one process alone."
        )
    return int(value)


def world_size() -> int:
    """Ranks that torchrun started, 1 under plain python."""
    if not under_torchrun():
        return 1
    rank, size = torchrun_number("RANK", 0, 0), torchrun_number("WORLD_SIZE", 1, 1)
    if rank >= size:
        raise ValueError(
            f"initialize: expected RANK below WORLD_SIZE in the environment, found {rank} and {size}. Start the "
            "ranks with torchrun, which sets both."
        )
    return size
