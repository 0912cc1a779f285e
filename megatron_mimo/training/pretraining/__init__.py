"""Megatron's own pretrain loop around a MimoModel."""

from megatron_mimo.moved import names_of

__getattr__ = names_of(__name__)
