"""Every refusal of a batch, before its first collective."""

from megatron_mimo.check.batch import BatchCheck, Media, Nested, Shown, check_modalities, with_data

__all__ = ["BatchCheck", "Media", "Nested", "Shown", "check_modalities", "with_data"]
