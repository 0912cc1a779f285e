"""Packs in a step's CUDA graph: wherever their samples begin, one graph runs them. Captures are recordings here."""

from dataclasses import fields, replace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import functional as F

from megatron_mimo import segment_kernels
from megatron_mimo.segments import _host_facts, on_device, reads_boundaries_there, segmented
from megatron_mimo.training import StepGraphs
from megatron_mimo.training.parts.buckets import with_packs_alike
from tests import tiny
from tests.recorded_graphs import record_graphs
from tests.unit.test_whole_step import ROWS, assert_same_steps, batch_of, config_of, trainer_of

LENGTH = 48


def pack_of(seed: int, lengths: list[int], counted: int = 10) -> dict:
    """Samples of these lengths, padded to multiples of 4, an image in the first two; `counted` labels count."""
    draw = torch.Generator().manual_seed(seed)
    rooms = [-(-length // 4) * 4 for length in lengths]
    rooms[-1] += LENGTH - sum(rooms)
    own, padded = (F.pad(torch.tensor(each).cumsum(0), (1, 0)).int() for each in (lengths, rooms))
    ids = torch.randint(0, 60, (1, LENGTH), generator=draw)
    for start in padded[:2].tolist():
        ids[0, start + 1 : start + 1 + ROWS] = tiny.READ
    real = torch.cat([torch.arange(start, start + n) for start, n in zip(padded.tolist(), lengths)])
    mask = torch.zeros(1, LENGTH)
    mask[0, real[torch.randperm(len(real), generator=draw)[:counted]]] = 1
    labels = ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1)
    inputs = {"images": {"patches": {"x": torch.randn(2, ROWS, tiny.PIXELS, generator=draw)}}}
    return dict(
        input_ids=ids, labels=labels, loss_mask=mask, modality_inputs=inputs, packed_seq_params=segmented(own, padded)
    )


#: The longest of each has room for 17 to 32 positions.
LENGTHS = [[18, 9, 11], [30, 16], [7, 7, 7, 20], [22, 22], [6, 7, 3, 8, 20], [25, 13]]


def varlen(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, *, scale, causal) -> Tensor:
    """In place of the kernel: all that it reads of the boundaries it reads as a tensor."""
    assert longest >= boundaries.diff().max()
    place = torch.arange(len(query))
    sample = torch.searchsorted(boundaries[1:].long(), place, right=True)
    sees = (sample[:, None] == sample) & (place[:, None] >= place)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)
    return found[0].transpose(0, 1)


def rotating(**changes):
    language = tiny.language_config(**changes.pop("language", {}))
    return config_of(tiny.language_spec(language, **changes))


@pytest.fixture
def recorded(single_process, monkeypatch):
    record_graphs(monkeypatch)
    return replace(single_process, graph_safe_rng=True)


@pytest.fixture
def on_the_device(monkeypatch):
    """Attention reads boundaries as a GPU's kernel does."""
    monkeypatch.setattr(segment_kernels, "takes_varlen", lambda *given: True)
    monkeypatch.setattr(segment_kernels, "varlen", varlen)


def pair(run, **settings):
    eager, graphed = (trainer_of(run, graphs, config=rotating()) for graphs in (None, StepGraphs(warmup=1, **settings)))
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    return eager, graphed


def test_twenty_replayed_packs_that_begin_elsewhere_equal_eager_ones_bit_by_bit(recorded, on_the_device):
    eager, graphed = pair(recorded)
    packs = lambda step: [pack_of(2 * step + i, LENGTHS[(step + 3 * i) % 6]) for i in range(2)]  # noqa: E731
    assert_same_steps(eager, graphed, packs, 20)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 19, 1)


def test_as_many_samples_as_there_are_and_their_longest_are_rounded_up_to_few_shapes(recorded, on_the_device):
    eager, graphed = pair(recorded, packed_sequences=4)
    lengths = [[18, 9, 11], [30, 16], [5, 5, 4, 4, 4, 18], [39, 6], [5, 5, 5, 17], [38, 7]]
    assert_same_steps(eager, graphed, lambda step: [pack_of(step, lengths[step % 6])], 12)
    counts = graphed.graphs.counts  # four samples or eight, and a sample of two thirds of the pack
    assert (counts.captured, counts.replayed, counts.eager) == (3, 9, 3)


def test_packs_that_the_host_cuts_replay_where_their_samples_begin_again(recorded):
    eager, graphed = pair(recorded)
    lengths = [LENGTHS[0]] * 3 + LENGTHS[1:3] + [LENGTHS[0]]
    assert_same_steps(eager, graphed, lambda step: [pack_of(step, lengths[step])], 6)
    assert (graphed.graphs.counts.captured, graphed.graphs.counts.replayed) == (1, 3)


def test_layers_that_ask_for_boundaries_run_without_a_graph(recorded, on_the_device):
    config = rotating(transformer_layer_spec=tiny.megatrons_layers())
    trainer = trainer_of(recorded, StepGraphs(warmup=1), config=config)
    for step in range(3):
        trainer.train_step(lambda *_: [pack_of(step, LENGTHS[0])])
    assert (trainer.graphs.counts.captured, trainer.graphs.counts.eager) == (0, 3)


def test_layers_without_rotary_positions_ask_for_none(recorded, on_the_device):
    """Megatron's own too."""
    config = rotating(position_embedding_type="learned_absolute", transformer_layer_spec=tiny.megatrons_layers())
    trainer = trainer_of(recorded, StepGraphs(warmup=1), config=config)
    for step in range(3):
        trainer.train_step(lambda *_: [pack_of(step, LENGTHS[step])])
    assert (trainer.graphs.counts.captured, trainer.graphs.counts.eager) == (1, 1)


def test_hybrid_models_of_attention_and_mlp_layers_are_captured(recorded, on_the_device):
    def config():
        language = tiny.language_config(num_layers=4)
        return config_of(tiny.hybrid_spec(language))

    eager, graphed = (trainer_of(recorded, graphs, config=config()) for graphs in (None, StepGraphs(warmup=1)))
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    assert_same_steps(eager, graphed, lambda step: [pack_of(step, LENGTHS[step])], 5)
    assert graphed.graphs.counts.replayed == 4


def test_a_batch_that_says_that_nothing_is_packed_is_captured(recorded):
    trainer = trainer_of(recorded, StepGraphs(warmup=1))
    for step in range(3):
        trainer.train_step(lambda *_: [{**batch_of(step), "packed_seq_params": None}])
    assert (trainer.graphs.counts.captured, trainer.graphs.counts.replayed) == (1, 2)


def test_packs_of_which_no_graph_can_come_stay_as_they_are(single_process, on_the_device):
    model = trainer_of(single_process, config=rotating(transformer_layer_spec=tiny.megatrons_layers())).models[0]
    batch = pack_of(0, LENGTHS[0])
    assert with_packs_alike(batch, 16, model) is batch


def test_boundaries_that_nobody_told_run_without_a_graph(recorded, on_the_device):
    """TransformerEngine would compare them on the device, layer by layer."""
    trainer = trainer_of(recorded, StepGraphs(warmup=1), config=rotating())
    for step in range(3):
        batch = pack_of(step, LENGTHS[0])
        told = batch["packed_seq_params"]
        plain = {field.name: getattr(told, field.name) for field in fields(PackedSeqParams)}
        trainer.train_step(lambda *_: [{**batch, "packed_seq_params": PackedSeqParams(**plain)}])
    assert (trainer.graphs.counts.captured, trainer.graphs.counts.eager) == (0, 3)


def test_a_placement_made_beforehand_has_as_many_boundaries(single_process, on_the_device):
    model = trainer_of(single_process, config=rotating()).models[0]
    batch = pack_of(0, LENGTHS[0])
    placed = {**batch, "placement": model.place(batch["input_ids"], batch["packed_seq_params"])}
    alike = with_packs_alike(placed, 8, model)
    assert alike["placement"].cu_seqlens.tolist() == alike["packed_seq_params"].cu_seqlens_q_padded.tolist()
    assert len(alike["placement"].cu_seqlens) == 9
    expected, found = (model(**one)[0] for one in (placed, alike))
    assert torch.equal(found, expected)


def test_dropout_and_kernels_that_are_not_there_leave_boundaries_with_the_host(single_process, on_the_device):
    params, cpu = segmented(torch.tensor([0, 8, LENGTH])), torch.device("cpu")

    def reads(**language) -> bool:
        model = trainer_of(single_process, config=rotating(language=language)).models[0]
        return reads_boundaries_there(model.language_model.decoder, params, cpu)

    assert reads() and not reads(attention_dropout=0.1)


def test_boundaries_on_the_device_alone_are_never_taken_for_none():
    params = on_device(segmented(torch.tensor([0, 8, LENGTH])), 4)
    params.cu_seqlens_q_padded = params.cu_seqlens_q_padded.to("meta")
    with pytest.raises(ValueError, match="the boundaries are on meta alone"):
        _host_facts(params)
