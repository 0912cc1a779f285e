"""Angles of sections equal Megatron's in blocks and Qwen3-VL's interleaved, packed and cut over ranks too."""

import itertools
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb, rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch.overrides import TorchFunctionMode
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megatron_mimo import MimoModel
from megatron_mimo.packed import default_positions
from megatron_mimo.packed_rotary import turned_by, turns_packs
from megatron_mimo.rotary import GridGPT, GridRotary, asks_for_no_boundaries, rotary_kind, turn_of
from megatron_mimo.segments import SegmentedParams, segmented, turned
from megatron_mimo.sharding import sequence_shard
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


def test_what_does_not_change_is_copied_to_a_device_once():
    """A copy from the host waits for the device, and no CUDA graph can hold one."""
    rotary = GridRotary(frequencies(), interleaved=True)
    positions = drawn()
    first = rotary(positions, [6, 5, 5])

    class Copied(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.tensor, torch.arange, torch.Tensor.to), function
            return function(*args, **(kwargs or {}))

    with Copied():
        assert torch.equal(rotary(positions, [6, 5, 5]), first)


def test_a_batch_that_is_not_packed_is_cut_here(single_process):
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
    with pytest.raises(ValueError, match="apply_rope_fusion=False, found True beside layers of Megatron's"):
        model_of(fused(language(True, transformer_layer_spec=tiny.megatrons_layers())))
    fusing = model_of(fused(language(True)))
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(AssertionError, match="apply_rope_fusion is not available"):  # as far as the kernel itself
        fusing(ids, position_ids=drawn(8, 1), packed_seq_params=segmented(torch.tensor([0, 4, 8], dtype=torch.int32)))
    language_model = fusing.language_model
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="packed sequences as MimoModel hands them on, found PackedSeqParams without"):
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        language_model(torch.zeros(1, 8, dtype=torch.long), drawn(8, 1), None, packed_seq_params=params)


def fused(spec):
    """As if TransformerEngine, without which Megatron refuses to build it, had the kernel."""
    spec.params["config"].apply_rope_fusion = True
    return spec


@pytest.mark.parametrize("kind", ["rope", "some layers without", "part of a head", "sections"])
def test_packs_turn_as_megatron_turns_them_and_ask_for_no_boundaries(single_process, monkeypatch, kind):
    """Bit by bit, and gradients too."""
    if kind == "sections":
        changed, theirs = language(True), language(True, transformer_layer_spec=tiny.megatrons_layers())
    else:
        config = dict(no_rope_freq=[1, 0]) if kind == "some layers without" else {}
        more = dict(rotary_percent=0.5) if kind == "part of a head" else {}
        changed, theirs = (
            tiny.language_spec(tiny.language_config(**config), **more, **layers)
            for layers in ({}, {"transformer_layer_spec": tiny.megatrons_layers()})
        )
    model, expected = model_of(changed), model_of(theirs)
    expected.load_state_dict(model.state_dict())
    assert turns_packs(model.language_model.decoder) and not turns_packs(expected.language_model.decoder)
    ids = torch.randint(0, 60, (1, 14), generator=torch.Generator().manual_seed(1))
    positions = drawn(14, 1) if kind == "sections" else None
    params = segmented(torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 5, 14], dtype=torch.int32))

    def gradients_of(model: MimoModel) -> list[torch.Tensor]:
        found, _ = model(ids, position_ids=positions, packed_seq_params=params)
        return [found, *torch.autograd.grad(found.square().sum(), [*model.parameters()])]

    theirs = gradients_of(expected)
    with monkeypatch.context() as patch:
        patch.setattr(rope_utils, "_apply_rotary_pos_emb_thd", Mock(side_effect=AssertionError("asks for boundaries")))
        ours = gradients_of(model)
        with pytest.raises(AssertionError, match="asks for boundaries"):
            gradients_of(expected)
    assert all(map(torch.equal, ours, theirs))


def test_a_longest_that_leaves_padding_out_is_enough(single_process):
    """Of plain PackedSeqParams the host does not know whether it counts padding."""
    model = model_of(tiny.language_spec())
    ids = torch.randint(0, 60, (1, 14), generator=torch.Generator().manual_seed(1))
    own, padded = (torch.tensor(each, dtype=torch.int32) for each in ([0, 4, 9], [0, 5, 14]))
    told = segmented(own, padded)
    plain = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=own, cu_seqlens_kv=own, cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded, max_seqlen_q=5, max_seqlen_kv=5,
    )  # fmt: skip
    expected, found = (model(ids, packed_seq_params=params)[0] for params in (told, plain))
    real = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert torch.equal(found[:, real], expected[:, real])


@pytest.mark.parametrize("padded", [False, True])
def test_a_longest_below_a_sequence_is_refused_and_turns_nothing_wrongly(single_process, padded):
    model = model_of(tiny.language_spec())
    bounds = torch.tensor([0, 4, 16], dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=4, max_seqlen_kv=4,
        cu_seqlens_q_padded=bounds if padded else None, cu_seqlens_kv_padded=bounds if padded else None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="max_seqlen_q is 4, but a packed sequence is 12 long"):
        model(torch.zeros(1, 16, dtype=torch.long), packed_seq_params=params)


class PositionsOfThePack(RotaryEmbedding):
    """A row for each position of the pack, which Megatron tells by their number."""

    def forward(self, max_seq_len, offset=0, packed_seq=False, cp_group=None):
        return self.get_emb(16, offset)


def test_angles_of_another_class_are_left_to_megatron(single_process):
    model = model_of(tiny.language_spec())
    language, params = model.language_model, segmented(torch.tensor([0, 4, 16], dtype=torch.int32))
    assert rotary_kind(language) == "rope" and asks_for_no_boundaries(language)
    language.rotary_pos_emb = PositionsOfThePack(8, 1.0, use_cpu_initialization=True)
    assert rotary_kind(language) is None and not asks_for_no_boundaries(language)
    ids = torch.randint(0, 60, (1, 16), generator=torch.Generator().manual_seed(1))
    asked = Mock(wraps=rope_utils._apply_rotary_pos_emb_thd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope_utils, "_apply_rotary_pos_emb_thd", asked)
        model(ids, packed_seq_params=params)
    assert asked.called


def test_what_is_not_packed_is_not_turned_as_if_it_were(single_process):
    """Another format's angles are cut over context-parallel ranks already."""
    model, told = model_of(tiny.language_spec()), []

    def look(module: torch.nn.Module, given: tuple, named: dict) -> None:
        told.append(turned_by(named["packed_seq_params"]))
        raise InterruptedError  # plain torch's attention has no other format

    model.language_model.decoder.register_forward_pre_hook(look, with_kwargs=True)
    other = PackedSeqParams(qkv_format="sbhd", max_seqlen_q=8, max_seqlen_kv=8)
    for params in (other, segmented(torch.tensor([0, 8], dtype=torch.int32)), None):
        with pytest.raises(InterruptedError):
            model(torch.zeros(1, 8, dtype=torch.long), packed_seq_params=params)
    assert told[0] is None and told[2] is None and torch.equal(told[1], torch.arange(8))


def test_a_longest_that_nobody_tells_is_asked_for(single_process):
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    with pytest.raises(ValueError, match="'rope': expected max_seqlen_q and max_seqlen_kv, found None and None"):
        model_of(tiny.language_spec())(torch.zeros(1, 8, dtype=torch.long), packed_seq_params=params)


class Foreign(PackedSeqParams):
    """With a constructor of its own."""

    def __init__(self, bounds: torch.Tensor) -> None:
        super().__init__(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=8, max_seqlen_kv=8)
        self.told = "mine"


def test_parameters_are_not_made_anew(monkeypatch):
    turn, narrow = torch.arange(8), torch.tensor([0, 8], dtype=torch.int32)
    given = Foreign(narrow)
    assert turned(given, turn) is given and turned(None, turn) is None
    found = turned(Foreign(narrow.long()), turn)
    assert type(found) is Foreign and found.told == "mine" and found.cu_seqlens_q.dtype is torch.int32
    plain = PackedSeqParams(qkv_format="thd", cu_seqlens_q=narrow, cu_seqlens_kv=narrow, max_seqlen_q=8)
    plain.told = "mine"
    monkeypatch.setattr(PackedSeqParams, "__post_init__", Mock(side_effect=AssertionError("waits")))
    for params in (plain, turned(plain, turn)):
        found = turned(params, turn)
        assert (type(found), found.turn is turn, found.told) == (SegmentedParams, True, "mine")
        assert found.cu_seqlens_q is narrow and found.boundaries is None
    assert not hasattr(plain, "turn")


@pytest.mark.parametrize("rank", [0, 1])
def test_packs_cut_over_context_parallel_ranks_turn_as_megatron_turns_them(single_process, rank):
    bounds = torch.tensor([0, 8, 24, 24], dtype=torch.int32)
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    shard = sequence_shard(24, cp_rank=rank, cp_size=2, tp_size=2, tp_rank=1, cu_seqlens=bounds)
    angles = RotaryEmbedding(DIM, 1.0, use_cpu_initialization=True)(16, packed_seq=True)
    rows = torch.randn(12, 2, DIM, generator=torch.Generator().manual_seed(3))
    packed = segmented(bounds)
    counted = default_positions(torch.zeros(1, 24, dtype=torch.long), bounds)
    turn = turn_of("rope", shard, counted, packed)
    found = apply_rotary_pos_emb(rows[:, None], angles[turn], config=config, cp_group=Ranks(rank, 2))[:, 0]
    expected = apply_rotary_pos_emb(rows, angles, config=config, cu_seqlens=bounds, cp_group=Ranks(rank, 2))
    assert torch.equal(found, expected)
    sections = GridRotary(frequencies(), interleaved=True, cp_group=Ranks(rank, 2))
    sections.packed = True
    whole = sections(drawn(24, 1), [6, 5, 5])
    turn = turn_of("mrope", shard, counted, packed)
    found = apply_rotary_pos_emb(rows[:, None], whole[turn], config=config, cp_group=Ranks(rank, 2))[:, 0]
    expected = apply_rotary_pos_emb(rows, whole, config=config, cu_seqlens=bounds, cp_group=Ranks(rank, 2))
    assert torch.equal(found, expected)
