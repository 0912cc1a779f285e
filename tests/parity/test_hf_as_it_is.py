"""Encoders and codecs of transformers in a model: projected, trained, saved, and loaded where their source has gone."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

import megatron_mimo
from megatron_mimo import AudioModalitySubmodules, HFCodec, HFEncoder, MimoModelConfig, VisionModalitySubmodules
from megatron_mimo.decoders import CodeTokenizer, DiscreteDecoder
from tests import checkpoints, tiny
from tests.parity import test_hf_codec, test_hf_encoder
from tests.parity.test_hf_llava import text_directory


def spec(name: str, directory: Path, **options) -> ModuleSpec:
    source, _, _ = test_hf_encoder.written(name, directory)
    return ModuleSpec(HFEncoder, params={"name_or_path": str(source), **options})


def parts(directory: Path) -> dict:
    """A language model that sees with DINOv2, hears with Whisper and says codes of EnCodec."""
    codec, _ = test_hf_codec.written("encodec", directory / "codec")
    tokenizer = ModuleSpec(
        CodeTokenizer,
        params={"module": ModuleSpec(HFCodec, params={"name_or_path": codec}), "grid": (4,), "codebooks": 4},
    )
    decoder = ModuleSpec(
        DiscreteDecoder,
        params={"width": checkpoints.HIDDEN, "codebook_sizes": [32] * 4, "tokenizer": tokenizer},
    )
    return dict(
        language_model=text_directory(directory / "text", "llama-2"),
        encoders={
            "images": {"tower": spec("dinov2", directory / "dinov2", layer=-2, select="patch")},
            "audio": {"tower": spec("whisper", directory / "whisper", frozen=True, dtype=torch.float64)},
        },
        special_tokens={"images": "<image>", "audio": "<sound>"},
        decoders={"speech": {"codes": decoder}},
        generation_tokens={"speech": "<say>"},
    )


def batch(model) -> dict:
    """A text around an image of 24 patches and a sound of 50 rows, of which 19 are no padding."""
    image, sound = model.mimo_config.special_token_ids["images"], model.mimo_config.special_token_ids["audio"]
    ids = checkpoints.ids(60).clamp(max=89)[:1]
    ids[0, 2:26], ids[0, 30:49] = image, sound
    mask = (torch.arange(100) < 37).long()[None]
    return dict(
        input_ids=ids,
        modality_inputs={
            "images": {"tower": {"pixel_values": test_hf_encoder.noise(1, 3, 16, 24)}},
            "audio": {"tower": {"input_features": test_hf_encoder.noise(1, 8, 100), "attention_mask": mask}},
        },
    )


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(**batch(model))[0].language


def test_a_model_of_them_is_what_it_was_after_its_sources_have_gone(single_process, tmp_path) -> None:
    model = megatron_mimo.from_pretrained(**parts(tmp_path / "sources"))
    assert isinstance(model.modality_submodules["images"], VisionModalitySubmodules)
    assert isinstance(model.modality_submodules["audio"], AudioModalitySubmodules)
    expected = logits(model)
    model.mimo_config = replace(model.mimo_config, whole_spans={"images"})
    megatron_mimo.save_pretrained(model, tmp_path / "saved")
    shutil.rmtree(tmp_path / "sources")
    again = megatron_mimo.from_pretrained(tmp_path / "saved")
    assert again.mimo_config.whole_spans == ("images",)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    assert torch.equal(logits(again), expected)
    megatron_mimo.save_pretrained(again, tmp_path / "once more")
    assert torch.equal(logits(megatron_mimo.from_pretrained(tmp_path / "once more")), expected)


def test_what_reads_trains_and_what_is_frozen_stays(single_process, tmp_path) -> None:
    model = megatron_mimo.from_pretrained(**parts(tmp_path)).train()
    given = batch(model)
    labels = given["input_ids"].roll(-1, 1)
    outputs, mask = model(**given, labels=labels)
    (outputs.language * mask).sum().backward()
    trained = model.modality_submodules["images"].encoders["tower"]
    frozen = model.modality_submodules["audio"].encoders["tower"]
    assert all(parameter.grad is not None for parameter in trained.parameters() if parameter.requires_grad)
    first = [one.grad for name, one in trained.named_parameters() if "layer.0.attention" in name and "weight" in name]
    assert first and all(gradient.any() for gradient in first)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for projection in (one.input_projections[0] for one in model.modality_submodules.values() if one.input_projections):
        assert projection.linear_1.weight.grad.any()


def test_it_takes_its_place_in_the_spec_of_any_model(single_process, tmp_path) -> None:
    images = ModuleSpec(
        VisionModalitySubmodules,
        submodules={
            "encoders": {"tower": spec("siglip", tmp_path)},
            "input_projections": [nn.Linear(32, tiny.HIDDEN)],
        },
    )
    config = MimoModelConfig(tiny.language_spec(), {"images": images}, {"images": -200})
    model = megatron_mimo.MimoModel(config)
    ids = torch.full((1, 20), 3)
    ids[0, 1:17] = -200
    rows = model.modality_submodules["images"].encode({"tower": {"pixel_values": test_hf_encoder.noise(1, 3, 16, 16)}})
    assert rows.shape == (16, tiny.HIDDEN)
    model(ids, modality_inputs={"images": {"tower": {"pixel_values": test_hf_encoder.noise(1, 3, 16, 16)}}})
    with pytest.raises(ValueError, match="sample 0 has 9 special tokens but 16 embeddings"):
        model(ids[:, :10], modality_inputs={"images": {"tower": {"pixel_values": test_hf_encoder.noise(1, 3, 16, 16)}}})


def test_the_error_of_an_unknown_tower_says_how_to_take_it_as_it_is(single_process, tmp_path) -> None:
    source, _, _ = test_hf_encoder.written("dinov2", tmp_path / "dinov2")
    with pytest.raises(ValueError, match=r"ModuleSpec\(megatron_mimo.HFEncoder, params="):
        megatron_mimo.from_pretrained(
            language_model=text_directory(tmp_path / "text"),
            encoders={"images": {"tower": source}},
            special_tokens={"images": "<image>"},
        )
