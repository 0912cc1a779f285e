"""Mistral: Llama's layers, whose attention sees a window."""

from megatron_mimo.hf import llama
from megatron_mimo.hf.family import Family, window

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=llama.FIELDS | {"sliding_window": window},
    table=lambda c: llama.language_table(c, llama.layer(c)),
    constants=llama.CONSTANTS,
)
