"""Encoders of transformers as they are: their rows, the padding that is left out, and what trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mimo.hf.encoder import HFEncoder
from tests import checkpoints

SMALL: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
IMAGES: dict[str, Any] = SMALL | dict(patch_size=4, image_size=16)
TEXT: dict[str, Any] = SMALL | dict(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SPEECH: dict[str, Any] = SMALL | dict(
    conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), feat_extract_norm="layer", do_stable_layer_norm=True,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=20,
)  # fmt: skip
QWEN: dict[str, Any] = dict(
    depth=3, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, out_hidden_size=24, window_size=16,
    fullatt_block_indexes=[1], spatial_merge_size=2, temporal_patch_size=2,
)  # fmt: skip
WHISPER: dict[str, Any] = dict(
    d_model=32, encoder_layers=3, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, num_mel_bins=8, max_source_positions=50, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qwen_vl(**_: Any) -> Any:
    text = TEXT | dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1]))
    config = transformers.Qwen2_5_VLConfig(vision_config=QWEN, text_config=text | dict(rope_theta=1e4))
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


#: Name -> the model that is written, the encoder in it, its inputs as its processor names them.
FIXED: dict[str, tuple[Any, Any, dict[str, Tensor]]] = {
    "clip": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig(vision_config=IMAGES, text_config=TEXT)),
        lambda model: model.vision_model,
        {"pixel_values": noise(2, 3, 16, 16)},
    ),
    "clip alone": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGES)),
        lambda model: model,
        {"pixel_values": noise(2, 3, 16, 16)},
    ),
    "in llava": (
        lambda: transformers.LlavaForConditionalGeneration(checkpoints.llava_config(image_size=16)),
        lambda model: model.model.vision_tower,
        {"pixel_values": noise(2, 3, 16, 16)},
    ),
    "siglip": (
        lambda: transformers.SiglipModel(transformers.SiglipConfig(vision_config=IMAGES, text_config=TEXT)),
        lambda model: model.vision_model,
        {"pixel_values": noise(2, 3, 16, 16)},
    ),
    "dinov2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**IMAGES)),
        lambda model: model,
        {"pixel_values": noise(2, 3, 16, 24)},
    ),
    "dinov2 with registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(num_register_tokens=3, **IMAGES)
        ),
        lambda model: model,
        {"pixel_values": noise(2, 3, 16, 16)},
    ),
    "dinov3": (
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(num_register_tokens=2, **IMAGES)),
        lambda model: model,
        {"pixel_values": noise(2, 3, 16, 24)},
    ),
    "whisper": (
        lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)),
        lambda model: model.model.encoder,
        {"input_features": noise(2, 8, 100)},
    ),
    "wav2vec2": (
        lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SPEECH)),
        lambda model: model,
        {"input_values": noise(2, 400)},
    ),
}  # fmt: skip
#: How many class and register tokens stand in front.
IN_FRONT = {
    "clip": 1,
    "clip alone": 1,
    "in llava": 1,
    "siglip": 0,
    "dinov2": 1,
    "dinov2 with registers": 4,
    "dinov3": 3,
}


def written(name: str, directory: Path) -> tuple[Path, Any, dict[str, Tensor]]:
    """A directory, the encoder in it as transformers has it, and inputs."""
    make, inner, inputs = FIXED[name]
    model = checkpoints.randomized(make())
    return checkpoints.written(model, directory), inner(model), inputs


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("layer", [None, -2, 1])
def test_rows_are_the_states_that_transformers_gives(tmp_path, name, layer) -> None:
    directory, theirs, inputs = written(name, tmp_path)
    encoder = HFEncoder(directory, layer)
    with torch.no_grad():
        output = theirs(**inputs, output_hidden_states=True)
        found = encoder(**inputs)
    expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
    assert torch.equal(found.rows, expected)
    assert found.rows_per_item == [expected.shape[1]] * 2
    assert encoder.width == expected.shape[-1]


@pytest.mark.parametrize("name", IN_FRONT)
def test_patches_alone_leave_out_class_and_register_tokens(tmp_path, name) -> None:
    directory, theirs, inputs = written(name, tmp_path)
    with torch.no_grad():
        expected = theirs(**inputs).last_hidden_state[:, IN_FRONT[name] :]
        found = HFEncoder(directory, select="patch")(**inputs)
    height, width = inputs["pixel_values"].shape[-2:]
    assert found.rows_per_item == [(height // 4) * (width // 4)] * 2
    assert torch.equal(found.rows, expected)


def siglip2(directory: Path) -> tuple[Path, Any]:
    vision = SMALL | dict(patch_size=4, num_patches=16)
    model = checkpoints.randomized(
        transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=TEXT))
    )
    return checkpoints.written(model, directory), model.vision_model


@pytest.mark.parametrize("shapes", [[[4, 4], [4, 4]], [[4, 4], [2, 3]]], ids=["fixed", "ragged"])
@pytest.mark.parametrize("told", [False, True])
def test_siglip_2_gives_the_patches_of_each_image_without_padding(tmp_path, shapes, told) -> None:
    directory, theirs = siglip2(tmp_path)
    counts = [height * width for height, width in shapes]
    mask = torch.tensor([[1] * count + [0] * (16 - count) for count in counts])
    inputs = {"pixel_values": noise(2, 16, 48), "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}
    with torch.no_grad():
        states = theirs(**inputs).last_hidden_state
        found = HFEncoder(directory)(**inputs, rows_per_item=counts if told else None)
    assert found.rows_per_item == counts
    assert torch.equal(found.rows.flatten(0, -2), torch.cat([states[0, : counts[0]], states[1, : counts[1]]]))


@pytest.mark.parametrize(
    ("name", "lengths", "rows"), [("whisper", [100, 37], [50, 19]), ("wav2vec2", [400, 111], [39, 10])]
)
def test_sounds_of_different_lengths_give_the_rows_of_their_own_length(tmp_path, name, lengths, rows) -> None:
    directory, theirs, inputs = written(name, tmp_path)
    mask = torch.tensor([[1] * length + [0] * (lengths[0] - length) for length in lengths])
    inputs = inputs | {"attention_mask": mask}
    with torch.no_grad():
        states = theirs(**inputs).last_hidden_state
        found = HFEncoder(directory)(**inputs)
        counted = HFEncoder(directory)(**inputs, rows_per_item=rows)
    assert found.rows_per_item == counted.rows_per_item == rows
    assert torch.equal(found.rows, torch.cat([states[0, : rows[0]], states[1, : rows[1]]]))
    assert torch.equal(found.rows, counted.rows)


def test_padding_of_a_masked_sound_changes_none_of_its_rows(tmp_path) -> None:
    directory, _, _ = written("wav2vec2", tmp_path)
    encoder, short = HFEncoder(directory), noise(1, 111, seed=5)
    padded = torch.cat([short, torch.zeros(1, 289)], 1)
    mask = (torch.arange(400) < 111).long()[None]
    with torch.no_grad():
        found, alone = encoder(input_values=padded, attention_mask=mask), encoder(input_values=short)
    torch.testing.assert_close(found.rows, alone.rows[0], atol=1e-5, rtol=1e-5)  # convolutions of other lengths


@pytest.mark.parametrize("alone", [False, True])
def test_qwen_vl_s_tower_gives_merged_rows_of_images_of_any_size(tmp_path, alone) -> None:
    model = checkpoints.randomized(qwen_vl())
    theirs = model.model.visual
    directory = checkpoints.written(theirs if alone else model, tmp_path)
    grids = torch.tensor([[1, 4, 6], [2, 4, 4]])
    pixels = noise(24 + 32, 3 * 2 * 4 * 4)
    encoder = HFEncoder(directory)
    with torch.no_grad():
        expected = theirs(pixels, grid_thw=grids).pooler_output
        found = encoder(pixel_values=pixels, image_grid_thw=grids)
    assert found.rows_per_item == [6, 8]
    assert torch.equal(found.rows, expected)
    assert encoder.width == 24 == expected.shape[-1]


def test_a_frozen_encoder_keeps_its_dtype_and_mode_and_takes_no_gradient(tmp_path) -> None:
    directory, _, inputs = written("dinov3", tmp_path)
    frozen = HFEncoder(directory, dtype=torch.float64, frozen=True).bfloat16().train()
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.float64}
    assert not any(module.training for module in frozen.modules())
    rows = frozen(pixel_values=inputs["pixel_values"].double()).rows
    assert not rows.requires_grad
    trained = HFEncoder(directory).bfloat16().train()
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.bfloat16}
    tables = [name for name, _ in trained.named_buffers() if name not in trained.state_dict()]
    assert tables and {dict(trained.named_buffers())[name].dtype for name in tables} == {torch.float32}
    assert trained.encoder.training


@pytest.mark.parametrize("name", ["clip", "dinov2", "whisper"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(tmp_path, name) -> None:
    directory, _, inputs = written(name, tmp_path)
    found = []
    for checkpointing in (False, True):
        encoder = HFEncoder(directory, gradient_checkpointing=checkpointing).train()
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rows = encoder(**inputs).rows
        rows.square().mean().backward()
        found.append((sum(kept), {name: one.grad for name, one in encoder.named_parameters() if one.grad is not None}))
    (all_of_it, expected), (less, gradients) = found
    assert less < all_of_it / 2
    assert expected.keys() == gradients.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_missing_and_surplus_tensors_are_told(tmp_path) -> None:
    directory, _, _ = written("clip", tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.encoder.layers.9.mlp.fc1.bias"] = tensors.pop("vision_model.encoder.layers.1.mlp.fc1.bias")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="found 2 differences") as raised:
        HFEncoder(directory)
    assert "missing: encoder.layers.1.mlp.fc1.bias" in str(raised.value)
    assert "encoder.layers.9.mlp.fc1.bias" in str(raised.value)


def test_a_speech_model_without_the_mask_that_its_training_hears_masks_nothing(tmp_path) -> None:
    directory, _, _ = written("wav2vec2", tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["masked_spec_embed"]
    save_file(tensors, file, {"format": "pt"})
    assert not HFEncoder(directory).encoder.config.apply_spec_augment


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("whisper", {"select": "patch"}, "has no class token"),
        ("clip", {"select": "class"}, "expected 'all' or 'patch'"),
        ("clip", {"layer": 4}, "has hidden_states of 0 to 3"),
        ("clip", {"layer": -5}, "has hidden_states of 0 to 3"),
        ("clip", {"frozen": True, "gradient_checkpointing": True}, "Take one of them"),
        ("clip", {"modality": "audio"}, "expected an encoder of audio, found none"),
    ],
)
def test_options_that_an_encoder_lacks_are_refused(tmp_path, name, options, message) -> None:
    directory, _, _ = written(name, tmp_path)
    with pytest.raises(ValueError, match=message):
        HFEncoder(directory, **options)


def test_what_encodes_neither_images_nor_sound_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected an encoder of images or sound, found none"):
        HFEncoder(checkpoints.written(checkpoints.language_model("llama-2"), tmp_path))
    with pytest.raises(ValueError, match="expected a name or a directory, or a config"):
        HFEncoder()
    model = checkpoints.randomized(qwen_vl())
    with pytest.raises(ValueError, match="in the order of its windows"):
        HFEncoder(checkpoints.written(model, tmp_path / "qwen"), layer=-2)


def test_inputs_that_an_encoder_does_not_take_are_refused(tmp_path) -> None:
    directory, _, inputs = written("clip", tmp_path)
    encoder = HFEncoder(directory)
    with pytest.raises(TypeError, match="found .'input_features'"):
        encoder(**inputs, input_features=noise(2, 8, 100))
    with pytest.raises(ValueError, match="expected 2 counts of at most 17 rows"):
        encoder(**inputs, rows_per_item=[17, 18])
