"""Qwen2-VL and Qwen2.5-VL: Qwen 2's layers with positions of time, row and column, and their own tower by grid."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.hf import llama, qwen2
from megatron_mimo.hf.encoder import HFEncoder
from megatron_mimo.hf.family import INERT, Family, Unmapped, rope
from megatron_mimo.hf.table import Table, table, whole
from megatron_mimo.hf.towers import as_json, find

#: Model type -> the class of transformers that export is for.
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
#: Where the tower is in a file; the language model's names have nothing in front.
TOWER = "visual."
#: The family of the tower as a part; its configuration is the whole model's.
TOWER_TYPE = "qwen_vl_tower"

# Tokens around media and of videos, which are text to the language model.
_FIELDS = {
    "text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "tie_word_embeddings", "vision_token_id",
}  # fmt: skip
#: Spellings of names -> the one in files; in memory transformers 5 has `model.` in front of both parts.
SPELLINGS = ((r"model\.language_model\.", "model."), (r"model\.visual\.", TOWER))


def text_config(config: Any) -> Any:
    """The language model's configuration, which says too whether its output layer is the embedding."""
    text = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def problems(config: Any) -> list[str]:
    """One line for each field of the whole model's own that is not mapped."""
    defaults = type(config)()
    return [
        f"{config.model_type}: {name} = {value!r}: not mapped"
        for name, value in config.to_dict().items()
        if name not in _FIELDS | INERT and name in vars(defaults) and value != getattr(defaults, name)
    ]


def tower_spec(config: Any) -> ModuleSpec:
    """The tower as transformers has it, with weights to be filled."""
    return ModuleSpec(HFEncoder, params={"config": as_json(config), "modality": "image"})


def tower_table(config: Any) -> Table:
    """The tensors of the tower, without their prefix: each rank has all of them."""
    found = find(config, "image")
    with torch.device("meta"):
        tower = found.kind(found.config)
    rules = [whole(f"encoder.{name}", name, tuple(tensor.shape)) for name, tensor in tower.state_dict().items()]
    return table(rules, 0)


def _mrope(value: Mapping[str, Any], config: Any) -> dict[str, object]:
    sections = value.get("mrope_section")
    if sections is None:
        raise Unmapped("expected an mrope_section: how many frequencies turn with time, row and column")
    if value.get("mrope_interleaved"):
        raise Unmapped("expected mrope_interleaved False")
    plain = {**value, "rope_type": "default" if value.get("rope_type") == "mrope" else value.get("rope_type")}
    return rope(plain, config) | {"position_embedding_type": "mrope", "mrope_section": list(sections)}


def _vocabulary(value: int, config: Any) -> dict[str, object]:
    return {"vocab_size": value, "share_embeddings_and_output_weights": config.tie_word_embeddings}


FAMILIES = {
    f"{model_type}_text": Family(
        model_type=f"{model_type}_text",
        architecture=architecture,
        fields=llama.FIELDS | qwen2.WINDOWS | {"rope_parameters": _mrope, "vocab_size": _vocabulary},
        table=qwen2.FAMILY.table,
        constants=qwen2.FAMILY.constants,
    )
    for model_type, architecture in ARCHITECTURES.items()
}
