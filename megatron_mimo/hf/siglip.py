"""SigLIP's vision tower, without its attention-pooling head."""

from __future__ import annotations

from typing import Any

from megatron_mimo.hf import clip
from megatron_mimo.hf.family import Family
from megatron_mimo.hf.table import Rule, Table, table, whole


def _head(c: Any) -> list[Rule]:
    """The pooling head, which a model that reads every patch has no use for."""
    hidden, ffn = c.hidden_size, c.intermediate_size
    shapes = {
        "probe": (1, 1, hidden),
        "attention.in_proj_weight": (3 * hidden, hidden),
        "attention.in_proj_bias": (3 * hidden,),
        "attention.out_proj.weight": (hidden, hidden),
        "attention.out_proj.bias": (hidden,),
        "layernorm.weight": (hidden,),
        "layernorm.bias": (hidden,),
        "mlp.fc1.weight": (ffn, hidden),
        "mlp.fc1.bias": (ffn,),
        "mlp.fc2.weight": (hidden, ffn),
        "mlp.fc2.bias": (hidden,),
    }
    return [whole(f"head.{name}", f"head.{name}", shape) for name, shape in shapes.items()]


def _table(c: Any, feature_layer: int | None = None) -> Table:
    hidden, patch = c.hidden_size, c.patch_size
    built = clip.layers_built(c, feature_layer)
    final = clip.norm("ln_post", "post_layernorm", c)
    rules = [
        whole("conv1.weight", "embeddings.patch_embedding.weight", (hidden, 3, patch, patch)),
        whole("conv1.bias", "embeddings.patch_embedding.bias", (hidden,)),
        whole("position_embeddings.weight", "embeddings.position_embedding.weight", (clip.positions(c), hidden)),
        *clip.layer(c),
    ]
    unused = clip.layers_left_out(c, built)
    if feature_layer is None:
        rules += final
    else:
        unused += final
    if getattr(c, "vision_use_head", True):  # a field since transformers 5.20
        unused += _head(c)
    return table(rules, built, unused=unused, ignored=[r"embeddings\.position_ids"])


FAMILY = Family(
    model_type="siglip_vision_model",
    architecture="SiglipVisionModel",
    fields=clip.FIELDS | {"vision_use_head": None},
    table=_table,
    constants=clip.CONSTANTS,
)
