"""The console script: it needs the extra `cli`, and says so in one line where it is missing."""

from __future__ import annotations

import os
import sys
from typing import Any

_NEEDED = ("typer", "pydantic", "yaml")


def main() -> None:
    """Runs the command line, and ends the process with its exit status."""
    try:
        _run()
    except KeyboardInterrupt:  # before a command has begun, which would say so
        print("megatron-mimo: interrupted", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    try:
        from megatron_mimo.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        print(f"megatron-mimo: {error.name} is missing: pip install 'megatron-mimo[cli,hf,data]'", file=sys.stderr)
        sys.exit(2)
    try:
        status = app(prog_name="megatron-mimo", standalone_mode=False)
    except Exception as error:
        # Those of typer's parser, whose classes lie elsewhere from version to version.
        if type(error).__name__ == "Abort":
            raise KeyboardInterrupt from None
        if not hasattr(error, "format_message"):
            raise
        _say_usage(error)
        sys.exit(2)
    if status == 130:  # of Ctrl-C while words were read
        raise KeyboardInterrupt
    sys.exit(status if isinstance(status, int) else 0)


def _say_usage(error: Any) -> None:
    """A word that no command has, as one line; of a command without any word its help."""
    if os.environ.get("RANK", "0") != "0":
        return  # which the first rank says
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    said = " ".join(error.format_message().split()).removesuffix(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "megatron-mimo"
    print(f"megatron-mimo: {said}; see {command} --help", file=sys.stderr)
