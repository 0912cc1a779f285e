"""Qwen 3, dense: Llama's layers whose queries and keys are normalised."""

from typing import Any

from megatron_mimo.hf import llama
from megatron_mimo.hf.family import Family, only
from megatron_mimo.hf.qwen2 import WINDOWS
from megatron_mimo.hf.table import Table, whole


def _table(c: Any) -> Table:
    norms = [
        whole(
            f"{llama.OURS}.self_attention.{ours}_layernorm.weight",
            f"{llama.THEIRS}.self_attn.{ours}_norm.weight",
            (llama.head_dim(c),),
        )
        for ours in "qk"
    ]
    return llama.language_table(c, [*llama.layer(c), *norms])


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=llama.FIELDS | WINDOWS | {"attention_bias": only(False)},
    table=_table,
    constants=llama.CONSTANTS | {"qk_layernorm": True},
)
