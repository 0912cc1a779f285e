"""Megatron models that read and write several modalities."""

from megatron_mimo.launch import initialize, shutdown

__all__ = ["initialize", "shutdown"]
