"""Mistakes in a configuration are named when it is made."""

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.config import MimoModelConfig

LANGUAGE = ModuleSpec(module=object, params={"vocab_size": 100})
IMAGES = ModuleSpec(module=object)
ENCODING = ModuleSpec(module=object, submodules={"encoders": {"a": object}})
DECODING = ModuleSpec(module=object, submodules={"decoders": {"a": object}})
FEEDING = ModuleSpec(module=object, submodules={"generation_input": object})


def config(**changes) -> MimoModelConfig:
    settings = {
        "language_model": LANGUAGE,
        "modality_submodules": {"images": IMAGES, "audio": IMAGES},
        "special_token_ids": {"images": 10},
    }
    return MimoModelConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"language_model": object}, "language_model must be a ModuleSpec"),
        ({"modality_submodules": [IMAGES]}, "modality_submodules must be a mapping"),
        ({"modality_submodules": {"images": object}}, "must be a ModuleSpec, got type"),
        ({"modality_submodules": {3: IMAGES}}, "must be strings, got 3"),
        (
            {"modality_submodules": {"images": ModuleSpec(module=object, submodules=[1])}},
            "submodules of modality_submodules",
        ),
        ({"special_token_ids": {"images": 1.5}}, "must be an int, got float"),
        ({"special_token_ids": {"images": True}}, "must be an int, got bool"),
        ({"modality_loss_weights": {"images": "1"}}, "must be a number, got str"),
        ({"whole_spans": "images"}, "whole_spans must be a collection of names, got 'images'"),
    ],
)
def test_wrong_types_are_type_errors(changes, message):
    with pytest.raises(TypeError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"special_token_ids": {"video": 1}}, "names modality 'video'"),
        ({"generation_token_ids": {"video": 1}}, "names modality 'video'"),
        ({"special_token_ids": {"images": 1, "audio": 1}}, "token id 1 is used by two modalities"),
        ({"generation_token_ids": {"audio": 10}}, "token id 10 is used by two modalities"),
        ({"whole_spans": ["video"]}, "whole_spans names modality 'video'"),
        ({"modality_loss_weights": {"images": -1}}, "finite and >= 0"),
        ({"modality_loss_weights": {"images": float("nan")}}, "finite and >= 0"),
        ({"generation_token_ids": {"images": 100}}, r"outside the vocabulary \[0, 100\)"),
        ({"modality_submodules": {"text": IMAGES}}, "cannot name a modality"),
        ({"modality_submodules": {"a/b": IMAGES}}, "cannot name a modality"),
        ({"modality_submodules": {"images": IMAGES, "audio": ENCODING}}, "'audio' has encoders"),
        ({"modality_submodules": {"images": DECODING}}, "'images' has decoders"),
        ({"modality_submodules": {"images": FEEDING}}, "'images' has generation_input"),
        (
            {"modality_submodules": {"images": ModuleSpec(module=object, submodules={"encoder": {}})}},
            "submodules entry 'encoder'",
        ),
    ],
)
def test_wrong_values_are_value_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_generation_id_may_equal_the_special_id():
    assert config(generation_token_ids={"images": 10}).reading_tables == {"images": 10}


def test_a_fed_generation_token_may_lie_outside_the_vocabulary_and_has_its_own_table():
    made = config(modality_submodules={"images": FEEDING}, generation_token_ids={"images": -7})
    assert made.reading_tables == {"images": 10, "images/generation": -7}


def test_text_has_a_weight_too():
    assert config(modality_loss_weights={"text": 0.1}).modality_loss_weights["text"] == 0.1


def test_replacing_submodules_leaves_the_original_alone():
    original = config()
    other = ModuleSpec(module=int)
    replaced = original.with_submodules({"images": other})
    assert replaced.modality_submodules["images"] is other
    assert original.modality_submodules["images"] is IMAGES


def test_a_language_spec_without_its_configuration_is_refused():
    with pytest.raises(ValueError, match="language_model's params have no config"):
        _ = config(language_model=ModuleSpec(module=object, params={"vocab_size": 8})).language_config
