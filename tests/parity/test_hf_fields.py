"""Every field of every family's configuration: read wrongly, it would be refused or be seen in the result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_mimo
from megatron_mimo.hf.blueprint import LANGUAGE_MODELS, TOWERS
from megatron_mimo.hf.qwen_vl import FAMILIES as QWEN_VL
from tests import checkpoints
from tests.checkpoints import TOLERANCE, difference

#: Field -> another value than the models below have. A field that a family gains needs one here.
OTHERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "hidden_act": "relu",
    "rms_norm_eps": 1e-1,
    "layer_norm_eps": 1e-1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "vocab_size": 99,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": checkpoints.WINDOW - 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": False,
    "image_size": 28,
    "patch_size": 2,
    "num_channels": 1,
    "vision_use_head": False,
}
#: Field -> why no logits of ours depend on it.
WITHOUT_EFFECT = {
    "attention_dropout": "training alone",
    "max_position_embeddings": "rotary positions have no table",
    "pretraining_tp": "transformers computes it as 1",
    "max_window_layers": "layer_types says it",
    "projection_dim": "of the two-tower model",
}
WITHOUT_EFFECT_IN_CLIP = {"vocab_size": "of the two-tower model's text"}
#: In files of transformers 5 these stand beside `layer_types`, which alone is read by it and by us.
SAID_BY_LAYER_TYPES = {"sliding_window": ("qwen3",), "use_sliding_window": ("qwen2", "qwen3")}

MODELS = {"llama": "llama-2", "mistral": "mistral", "qwen2": "qwen2-windows", "qwen3": "qwen3"}


def changed(directory: Path, field: str, value: object, part: str | None = None) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part])[field] = value
    path.write_text(json.dumps(config))
    return directory


def cases(families: dict) -> list[tuple[str, str]]:
    found = [(kind, field) for kind, family in families.items() for field in family.fields]
    ours = {"clip_vision_model": WITHOUT_EFFECT_IN_CLIP}
    return [(kind, field) for kind, field in found if field not in WITHOUT_EFFECT | ours.get(kind, {})]


def seen(directory: Path, compute, expected: torch.Tensor) -> bool:
    """Whether the import is refused, or computes something else."""
    try:
        model = megatron_mimo.from_pretrained(directory)
    except ValueError as error:
        assert "differences" in str(error) or "transformers does not read it" in str(error)
        return True
    return difference(compute(model), expected) > 10 * TOLERANCE


def test_every_family_of_a_language_model_and_of_a_tower_is_tried() -> None:
    assert set(MODELS) | set(QWEN_VL) == set(LANGUAGE_MODELS)
    assert set(TOWERS) == {"clip_vision_model", "siglip_vision_model"}
    fields = {field for family in [*LANGUAGE_MODELS.values(), *TOWERS.values()] for field in family.fields}
    assert fields >= WITHOUT_EFFECT.keys() and not WITHOUT_EFFECT.keys() & OTHERS.keys()


@pytest.mark.parametrize(("kind", "field"), cases({kind: LANGUAGE_MODELS[kind] for kind in MODELS}))
def test_a_field_of_a_language_model_read_wrongly_would_be_seen(single_process, tmp_path, kind, field) -> None:
    if kind in SAID_BY_LAYER_TYPES.get(field, ()):
        assert LANGUAGE_MODELS[kind].fields[field] is None
        return
    theirs = checkpoints.language_model(MODELS[kind])
    with torch.no_grad():
        expected = theirs(checkpoints.ids()).logits
    value = OTHERS[field]
    if field == "tie_word_embeddings":
        value = not theirs.config.tie_word_embeddings
    directory = changed(checkpoints.written(theirs, tmp_path / "model"), field, value)

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(checkpoints.ids())[0]

    assert seen(directory, logits, expected)


@pytest.mark.parametrize(("kind", "field"), cases(TOWERS))
def test_a_field_of_a_tower_read_wrongly_would_be_seen(single_process, tmp_path, kind, field) -> None:
    theirs = checkpoints.llava(kind.removesuffix("_vision_model"))
    pixels, ids = checkpoints.images_and_ids()
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
    directory = changed(checkpoints.written(theirs, tmp_path / "model"), field, OTHERS[field], "vision_config")

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, modality_inputs={"images": {"tower": {"pixel_values": pixels}}})[0]

    assert seen(directory, logits, expected)
