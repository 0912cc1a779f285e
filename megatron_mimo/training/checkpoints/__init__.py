"""Saving and resuming a run."""

from megatron_mimo.moved import names_of

__getattr__ = names_of(__name__)
