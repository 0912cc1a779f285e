"""Megatron's own pretrain loop around a MimoModel."""
