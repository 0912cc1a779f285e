"""Angles of sections equal Megatron's in blocks and Qwen3-VL's interleaved, packed and cut over ranks too."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megatron_mimo import MimoModel
from megatron_mimo.rotary import GridGPT, GridRotary
from megatron_mimo.segments import segmented
from tests import tiny

DIM = 32


def frequencies(base: float = 10000.0) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, DIM, 2, dtype=torch.float32) / DIM)


def drawn(length: int = 24, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 500, (3, batch, length), generator=torch.Generator().manual_seed(2))


class Ranks:
    """A context-parallel group that is not there."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def test_blocks_equal_megatrons(single_process):
    expected = MultimodalRotaryEmbedding(DIM, 1.0)(drawn(), [4, 6, 6])
    found = GridRotary(frequencies(), interleaved=False)(drawn(), [4, 6, 6])
    assert torch.equal(found, expected)


def test_interleaved_sections_equal_qwen3_vls():
    config = Qwen3VLTextConfig(
        hidden_size=4 * DIM, num_attention_heads=4, head_dim=DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
    )  # fmt: skip
    cos, sin = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), drawn())
    found = GridRotary(frequencies(), interleaved=True)(drawn(), [6, 5, 5])[:, :, 0].transpose(0, 1)
    assert torch.equal(found.cos(), cos) and torch.equal(found.sin(), sin)


@pytest.mark.parametrize("rank", [0, 1])
def test_packed_sequences_cut_over_ranks_turn_by_their_own_positions(single_process, rank):
    """What Megatron's own angles get wrong: it cuts them once here and then by the boundaries again."""
    bounds = [0, 8, 24]
    positions = drawn(24, 1)
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    rows = torch.randn(24, 2, DIM, generator=torch.Generator().manual_seed(3))
    rotary = GridRotary(frequencies(), interleaved=True, cp_group=Ranks(rank, 2))
    rotary.packed = True
    angles = rotary(positions, [6, 5, 5])
    whole = apply_rotary_pos_emb(rows[:, None], angles, config=config, cp_group=Ranks(0, 1))[:, 0]
    mine = []
    for start, stop in itertools.pairwise(bounds):
        chunk = (stop - start) // 4
        for index in (rank, 3 - rank):
            mine += range(start + index * chunk, start + (index + 1) * chunk)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    found = apply_rotary_pos_emb(rows[mine], angles, config=config, cu_seqlens=cu_seqlens, cp_group=Ranks(rank, 2))
    torch.testing.assert_close(found, whole[mine], rtol=0, atol=1e-6)


def test_a_batch_that_is_not_packed_is_cut_here():
    group = Ranks(1, 2)
    whole = GridRotary(frequencies(), interleaved=True)(drawn(), [6, 5, 5])
    part = GridRotary(frequencies(), interleaved=True, cp_group=group)(drawn(), [6, 5, 5])
    assert torch.equal(part, whole[6:18])  # the second and third quarter


def language(interleaved: bool, **changes):
    config = tiny.language_config(mrope_section=[2, 1, 1], **changes.pop("config", {}))
    spec = tiny.language_spec(config, position_embedding_type="mrope", mrope_interleaved=interleaved)
    spec.module = GridGPT
    spec.params.update(changes)
    return spec


def model_of(spec) -> MimoModel:
    torch.manual_seed(0)
    return MimoModel(
        tiny.mimo_config(
            spec, modality_submodules={}, special_token_ids={}, generation_token_ids={}, modality_loss_weights={}
        )
    ).eval()


def test_a_model_turns_packed_samples_as_it_turns_them_alone(single_process):
    model = model_of(language(True))
    ids = torch.randint(0, 60, (1, 14), generator=torch.Generator().manual_seed(1))
    positions = drawn(14, 1)
    params = segmented(torch.tensor([0, 5, 14], dtype=torch.int32))
    together, _ = model(ids, position_ids=positions, packed_seq_params=params)
    for start, stop in ((0, 5), (5, 14)):
        alone, _ = model(ids[:, start:stop], position_ids=positions[..., start:stop])
        torch.testing.assert_close(together[:, start:stop], alone, rtol=0, atol=1e-5)
    blocks = model_of(language(False))
    blocks.load_state_dict(model.state_dict())
    assert not torch.allclose(blocks(ids, position_ids=positions)[0], model(ids, position_ids=positions)[0])


def test_what_it_cannot_turn_is_refused(single_process):
    with pytest.raises(ValueError, match=r"expected position_ids of \[3, B, S\]"):
        GridRotary(frequencies(), interleaved=True)(torch.zeros(2, 4), [6, 5, 5])
    with pytest.raises(ValueError, match="position_embedding_type='mrope'"):
        model_of(language(True, position_embedding_type="rope"))
    with pytest.raises(ValueError, match="apply_rope_fusion=False"):
        spec = language(True)
        spec.params["config"].apply_rope_fusion = True
        model_of(spec)
