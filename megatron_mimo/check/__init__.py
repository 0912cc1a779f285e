"""Every refusal of a batch, before its first collective."""

from megatron_mimo.check.batch import BatchCheck, Media, Nested, Shown, check_modalities, with_data
from megatron_mimo.check.tokens import check_whole_spans

__all__ = ["BatchCheck", "Media", "Nested", "Shown", "check_modalities", "check_whole_spans", "with_data"]
