"""Janus's VQ-VAE as a tokenizer: the codes and pictures of transformers, read alone or out of a whole Janus."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_mimo.decoders.tokenizers import CodeTokenizer
from megatron_mimo.hf.image_codec import HFImageCodec, image_codes
from tests import checkpoints

VQ: dict[str, Any] = dict(
    embed_dim=4, num_embeddings=32, latent_channels=8, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
    num_patches=4,
)  # fmt: skip
LAYERS: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def written(kind: str, directory: Path) -> tuple[Path, Any]:
    """A directory, and transformers' own VQ-VAE of it, whatever was drawn before."""
    torch.manual_seed(1)
    own = transformers.JanusVQVAEConfig(**VQ)
    if kind == "alone":
        model = transformers.JanusVQVAE(own)
        return checkpoints.written(model, directory), model
    text = transformers.LlamaConfig(**LAYERS, intermediate_size=16, vocab_size=32)
    sees = transformers.JanusVisionConfig(**LAYERS, patch_size=4, image_size=16, projection_dim=16)
    config = transformers.JanusConfig(
        text_config=text.to_dict(), vision_config=sees.to_dict(), vq_config=own.to_dict()
    )  # fmt: skip
    whole = transformers.JanusForConditionalGeneration(config)
    return checkpoints.written(whole, directory), whole.model.vqmodel


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["alone", "whole"])
def test_codes_and_pictures_are_those_of_transformers(tmp_path, kind) -> None:
    directory, theirs = written(kind, tmp_path)
    codec = HFImageCodec(directory)
    assert (codec.codes.codebook_size, codec.codes.side) == (32, 2) and codec.codes == image_codes(directory)
    tokenizer = CodeTokenizer(codec, grid=codec.codes.grid((8, 8)))
    given = pictures(8, 8)
    codes = tokenizer.encode(given)
    with torch.no_grad():
        expected = theirs.encode(given * 2 - 1).image_tokens
        drawn = theirs.decode(expected.view(3, 16))
    assert torch.equal(codes, expected) and len(codes.unique()) > 4
    assert torch.equal(tokenizer.decode(codes), (drawn + 1) / 2)  # theirs lie in [-1, 1]


def test_pictures_of_another_size_than_the_codec_was_trained_on_come_back_at_theirs(tmp_path) -> None:
    codec = HFImageCodec(written("alone", tmp_path)[0])
    tokenizer = CodeTokenizer(codec, grid=codec.codes.grid((6, 12)))
    codes = tokenizer.encode(pictures(6, 12))
    assert codes.shape == (3 * 3 * 6,)
    assert tokenizer.decode(codes).shape == (3, 3, 6, 12)


def test_another_model_a_size_that_squares_do_not_fill_and_tensors_that_are_not_there_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected Janus or its VQ-VAE, found model_type 'llama'"):
        HFImageCodec(checkpoints.written(checkpoints.language_model("llama-2"), tmp_path / "llama"))
    directory, _ = written("alone", tmp_path / "alone")
    with pytest.raises(ValueError, match=r"size: expected multiples of 2, .* found \[8, 9\]"):
        HFImageCodec(directory).encode(pictures(8, 9))
    with pytest.raises(ValueError, match="expected a name or a directory, or a config"):
        image_codes()
    tensors = load_file(directory / "model.safetensors")
    tensors["decoder.more"] = tensors.pop("decoder.conv_in.weight")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"2 differences(.|\n)*missing: decoder.conv_in.weight(.|\n)*surplus: dec"):
        HFImageCodec(directory)
