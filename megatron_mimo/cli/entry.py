"""The console script: it needs the extra `cli`, and says so in one line where it is missing."""

from __future__ import annotations

import sys

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
    app(prog_name="megatron-mimo")
