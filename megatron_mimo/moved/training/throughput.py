"""Moved; `megatron_mimo.moved` says where to."""

from megatron_mimo.moved import names_of

__getattr__ = names_of(__name__)
