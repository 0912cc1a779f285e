"""EnCodec and Mimi as tokenizers: the codes and sounds of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_mimo.decoders.tokenizers import CodeTokenizer
from megatron_mimo.hf.codec import HFCodec
from tests import checkpoints

ENCODEC: dict[str, Any] = dict(
    num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=16, upsampling_ratios=[4, 2], num_residual_layers=1,
    num_lstm_layers=1, sampling_rate=400, target_bandwidths=[0.25, 0.5, 1.0], normalize=False,
)  # fmt: skip
MIMI: dict[str, Any] = dict(
    num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=8, upsampling_ratios=[4, 2], num_residual_layers=1,
    upsample_groups=16, num_quantizers=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    intermediate_size=24, vector_quantization_hidden_dimension=8, sampling_rate=400, frame_rate=25.0,
)  # fmt: skip

#: Of sounds, and of the states that codebooks quantise.
LOUDNESS, SPREAD = 100.0, 2.0


def written(kind: str, directory: Path, **changes: Any) -> tuple[Path, Any]:
    config: Any = {"encodec": transformers.EncodecConfig, "mimi": transformers.MimiConfig}[kind]
    options = {"encodec": ENCODEC, "mimi": MIMI}[kind] | changes
    model = checkpoints.randomized(transformers.AutoModel.from_config(config(**options)))
    # Codebooks begin as zeros. Far from what they quantise, they would have one code for every sound.
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("original0"):  # the norm of a layer's weight
                parameter.fill_(2.0)
    for name, buffer in model.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            buffer.copy_(SPREAD * torch.randn(buffer.shape, generator=draw))
    return checkpoints.written(model, directory), model


@pytest.mark.parametrize(("kind", "codebooks"), [("encodec", None), ("encodec", 2), ("mimi", None), ("mimi", 3)])
def test_codes_and_sounds_are_those_of_transformers(tmp_path, kind, codebooks) -> None:
    directory, theirs = written(kind, tmp_path)
    codec = HFCodec(directory, codebooks)
    length = 20 * codec.samples_per_token
    tokenizer = CodeTokenizer(codec, grid=(codec.tokens(length),), codebooks=codec.codebooks)
    sounds = LOUDNESS * torch.randn(2, 1, length, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.encode(sounds)
    with torch.no_grad():
        if kind == "encodec":
            bandwidth = {2: 0.5, 4: 1.0}[codec.codebooks]
            expected = theirs.encode(sounds, bandwidth=bandwidth).audio_codes
            heard = theirs.decode(expected, [None]).audio_values
            expected = expected[0]
        else:
            expected = theirs.encode(sounds, num_quantizers=codebooks).audio_codes
            heard = theirs.decode(expected).audio_values
    assert codec.codebooks == expected.shape[1] == (codebooks or 4)
    assert torch.equal(codes, expected.transpose(1, 2).flatten(0, 1))
    assert len(codes.unique(dim=0)) > 2 and codes.max() < codec.codebook_size
    assert torch.equal(tokenizer.decode(codes), heard)
    assert torch.equal(tokenizer.encode(sounds[:, 0]), codes)


def test_what_codes_alone_do_not_make_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected one of .'encodec', 'mimi'."):
        HFCodec(checkpoints.written(checkpoints.language_model("llama-2"), tmp_path / "llama"))
    with pytest.raises(ValueError, match="normalize=True"):
        HFCodec(written("encodec", tmp_path / "loud", normalize=True)[0])
    plain, _ = written("encodec", tmp_path / "plain")
    with pytest.raises(ValueError, match=r"expected one of \[1, 2, 4\].*found 3"):
        HFCodec(plain, 3)
    with pytest.raises(ValueError, match="expected samples in multiples of 8, found 9"):
        HFCodec(plain).tokens(9)
    with pytest.raises(ValueError, match="expected 2 to 4, found 5"):
        HFCodec(written("mimi", tmp_path / "mimi")[0], 5)
    tensors = load_file(plain / "model.safetensors")
    tensors["decoder.more"] = tensors.pop(next(name for name in tensors if name.startswith("decoder")))
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys.*unexpected_keys"):
        HFCodec(plain)
