"""Llama 2 and 3, and what has their shape: Yi, Vicuna, SmolLM."""

from __future__ import annotations

from typing import Any

from megatron_mimo.hf.family import Family, Field, Unmapped, rope, silu
from megatron_mimo.hf.table import Rule, Table, columns, grouped, stacked, table, vocabulary, whole

# Names of layer {i}: ours and theirs.
OURS, THEIRS = "decoder.layers.{i}", "model.layers.{i}"
FREQUENCIES = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def _attention_bias(value: bool, config: Any) -> dict[str, object]:
    if value != config.mlp_bias:
        raise Unmapped(f"Megatron has biases in attention and MLP or in neither, found mlp_bias={config.mlp_bias}")
    return {"add_bias_linear": value}


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _heads(value: int, config: Any) -> dict[str, object]:
    return {"num_attention_heads": value, "kv_channels": head_dim(config)}


FIELDS: dict[str, Field] = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": _heads,
    "num_key_value_heads": "num_query_groups",
    "head_dim": None,
    "hidden_act": silu,
    "rms_norm_eps": "layernorm_epsilon",
    "rope_parameters": rope,
    "attention_dropout": "attention_dropout",
    "max_position_embeddings": "max_sequence_length",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
CONSTANTS = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "bias_activation_fusion": False,
}


def outer(c: Any) -> list[Rule]:
    """The embedding, the final norm and the output layer."""
    embedding, size = "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    if c.tie_word_embeddings:  # the last pipeline stage has a copy
        output = vocabulary("output_layer.weight", embedding, size, copy=True)
    else:
        output = vocabulary("output_layer.weight", "lm_head.weight", size)
    return [
        vocabulary("embedding.word_embeddings.weight", embedding, size),
        whole("decoder.final_layernorm.weight", "model.norm.weight", (c.hidden_size,)),
        output,
    ]


def layer(c: Any) -> list[Rule]:
    """Norms, attention and gated MLP of a layer, without biases."""
    hidden, ffn, groups = c.hidden_size, c.intermediate_size, c.num_key_value_heads
    queries, keys = c.num_attention_heads * head_dim(c), groups * head_dim(c)
    qkv = [f"{THEIRS}.self_attn.{one}_proj.weight" for one in "qkv"]
    gated = [f"{THEIRS}.mlp.{one}_proj.weight" for one in ("gate", "up")]
    return [
        whole(f"{OURS}.input_layernorm.weight", f"{THEIRS}.input_layernorm.weight", (hidden,)),
        grouped(f"{OURS}.self_attention.linear_qkv.weight", qkv, [(n, hidden) for n in (queries, keys, keys)], groups),
        columns(f"{OURS}.self_attention.linear_proj.weight", f"{THEIRS}.self_attn.o_proj.weight", (hidden, queries)),
        whole(f"{OURS}.pre_mlp_layernorm.weight", f"{THEIRS}.post_attention_layernorm.weight", (hidden,)),
        stacked(f"{OURS}.mlp.linear_fc1.weight", gated, (ffn, hidden)),
        columns(f"{OURS}.mlp.linear_fc2.weight", f"{THEIRS}.mlp.down_proj.weight", (hidden, ffn)),
    ]


def qkv_bias(c: Any) -> Rule:
    """Biases of queries, keys and values."""
    queries, keys = c.num_attention_heads * head_dim(c), c.num_key_value_heads * head_dim(c)
    names = [f"{THEIRS}.self_attn.{one}_proj.bias" for one in "qkv"]
    return grouped(
        f"{OURS}.self_attention.linear_qkv.bias", names, [(queries,), (keys,), (keys,)], c.num_key_value_heads
    )


def language_table(c: Any, rules: list[Rule]) -> Table:
    """The table of a language model whose layers have `rules`."""
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if c.tie_word_embeddings else {}
    return table([*outer(c), *rules], c.num_hidden_layers, optional=tied, ignored=[FREQUENCIES])


def _table(c: Any) -> Table:
    rules = layer(c)
    if c.attention_bias:
        hidden, gated = c.hidden_size, [f"{THEIRS}.mlp.{one}_proj.bias" for one in ("gate", "up")]
        rules += [
            qkv_bias(c),
            whole(f"{OURS}.self_attention.linear_proj.bias", f"{THEIRS}.self_attn.o_proj.bias", (hidden,)),
            stacked(f"{OURS}.mlp.linear_fc1.bias", gated, (c.intermediate_size,)),
            whole(f"{OURS}.mlp.linear_fc2.bias", f"{THEIRS}.mlp.down_proj.bias", (hidden,)),
        ]
    return language_table(c, rules)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    # transformers computes pretraining_tp > 1 as it does 1.
    fields=FIELDS | {"attention_bias": _attention_bias, "mlp_bias": None, "pretraining_tp": None},
    table=_table,
    constants=CONSTANTS,
)
