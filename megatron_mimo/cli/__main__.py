"""``python -m megatron_mimo.cli`` is the command `megatron-mimo`, and what its ranks run."""

from megatron_mimo.cli.entry import main

if __name__ == "__main__":
    main()
