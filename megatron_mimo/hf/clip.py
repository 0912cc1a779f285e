"""CLIP's vision tower."""

from __future__ import annotations

from typing import Any

from megatron_mimo.hf.family import Family, Field, activation, only
from megatron_mimo.hf.table import Rule, Table, columns, grouped, rows, table, whole

OURS, THEIRS = "decoder.layers.{i}", "encoder.layers.{i}"

FIELDS: dict[str, Field] = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "hidden_act": activation,
    "layer_norm_eps": "layernorm_epsilon",
    "attention_dropout": "attention_dropout",
    "num_channels": only(3),
    "image_size": "image_size",
    "patch_size": "patch_size",
}
CONSTANTS = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "gated_linear_unit": False,
    "bias_activation_fusion": False,
}


def layer(c: Any) -> list[Rule]:
    """Norms, attention and MLP of a layer, all with biases."""
    hidden, ffn = c.hidden_size, c.intermediate_size
    rules = []
    for kind, of_hidden, of_ffn in (("weight", (hidden, hidden), (ffn, hidden)), ("bias", (hidden,), (ffn,))):
        qkv = [f"{THEIRS}.self_attn.{one}_proj.{kind}" for one in "qkv"]
        shared = columns if kind == "weight" else whole  # a row-parallel layer's bias is added after its sum
        down = (hidden, ffn) if kind == "weight" else (hidden,)
        rules += [
            whole(f"{OURS}.input_layernorm.{kind}", f"{THEIRS}.layer_norm1.{kind}", (hidden,)),
            grouped(f"{OURS}.self_attention.linear_qkv.{kind}", qkv, [of_hidden] * 3, c.num_attention_heads),
            shared(f"{OURS}.self_attention.linear_proj.{kind}", f"{THEIRS}.self_attn.out_proj.{kind}", of_hidden),
            whole(f"{OURS}.pre_mlp_layernorm.{kind}", f"{THEIRS}.layer_norm2.{kind}", (hidden,)),
            rows(f"{OURS}.mlp.linear_fc1.{kind}", f"{THEIRS}.mlp.fc1.{kind}", of_ffn),
            shared(f"{OURS}.mlp.linear_fc2.{kind}", f"{THEIRS}.mlp.fc2.{kind}", down),
        ]
    return rules


def positions(c: Any) -> int:
    """Patches of an image."""
    return (c.image_size // c.patch_size) ** 2


def norm(ours: str, theirs: str, c: Any) -> list[Rule]:
    """A norm's weight and bias."""
    return [whole(f"{ours}.{kind}", f"{theirs}.{kind}", (c.hidden_size,)) for kind in ("weight", "bias")]


def layers_left_out(c: Any, built: int) -> list[Rule]:
    """Rules of the layers after the first `built`, which nothing is computed with."""
    return [rule.of(i=i) for i in range(built, c.num_hidden_layers) for rule in layer(c)]


def layers_built(c: Any, feature_layer: int | None) -> int:
    """How many layers give the states of `feature_layer`, counted as `hidden_states` of transformers is."""
    count = c.num_hidden_layers
    return count if feature_layer is None else feature_layer % (count + 1)


def _table(c: Any, feature_layer: int | None = None) -> Table:
    hidden, patch = c.hidden_size, c.patch_size
    built = layers_built(c, feature_layer)
    rules = [
        whole("conv1.weight", "embeddings.patch_embedding.weight", (hidden, 3, patch, patch)),
        whole("class_token", "embeddings.class_embedding", (hidden,)),
        whole("position_embeddings.weight", "embeddings.position_embedding.weight", (positions(c) + 1, hidden)),
        *norm("ln_pre", "pre_layrnorm", c),
        *layer(c),
    ]
    unused = [*layers_left_out(c, built), *norm("ln_post", "post_layernorm", c)]
    return table(rules, built, unused=unused, ignored=[r"embeddings\.position_ids"])


FAMILY = Family(
    model_type="clip_vision_model",
    architecture="CLIPVisionModel",
    # Of the two-tower model that the tower is part of.
    fields=FIELDS | {"projection_dim": None, "vocab_size": None},
    table=_table,
    constants=CONSTANTS,
)
