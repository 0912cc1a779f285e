"""Steps of models that write, as one CUDA graph: targets are drawn and encoded before it. Captures are recordings here;
`tests/gpu/test_whole_step_gpu.py` holds the same on a GPU."""

from dataclasses import replace

import pytest
import torch

from megatron_mimo import MimoModel
from megatron_mimo.decoders.prepared import Prepared
from megatron_mimo.training import StepGraphs
from tests import tiny
from tests.recorded_graphs import record_graphs
from tests.unit.test_whole_step import assert_same_steps, pair, trainer_of
from tests.writing import BEGIN, END, KINDS, ROWS, config_of

LENGTH = 24
READS = 4  # rows of an image


@pytest.fixture
def recorded(single_process, monkeypatch):
    """A run whose random numbers a graph could use, and captures that are recordings."""
    record_graphs(monkeypatch)
    return replace(single_process, graph_safe_rng=True)


def target_of(kind: str, rows: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """What a decoder of `tests.writing` learns at so many rows."""
    if kind in ("codes", "speech"):
        return {"codes": torch.stack([torch.randint(0, size, (rows,), generator=draw) for size in (10, 6)], dim=1)}
    return {"target": torch.randn(rows, 4, generator=draw), "weight": torch.rand(rows, generator=draw)}


def batch_of(kind: str, seed: int, spans: int = 2, reads: bool = True) -> dict:
    """Two samples that read an image each and write a span each, at places of their own; ten labels count."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (2, LENGTH), generator=draw)
    for sample in range(2):
        at = 1 + (seed + sample) % 3
        if reads:
            ids[sample, at : at + READS] = tiny.READ
        at += READS + 2 + (seed + 2 * sample) % 5
        if sample < spans:
            ids[sample, at : at + ROWS + 2] = torch.tensor([BEGIN, *[tiny.WRITE] * ROWS, END])
    mask = torch.zeros(2 * LENGTH)
    mask[torch.randperm(2 * LENGTH, generator=draw)[:10]] = 1
    batch = dict(
        input_ids=ids,
        labels=ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1),
        loss_mask=mask.view(2, LENGTH),
        modality_inputs={"images": {"patches": {"x": torch.randn(2, READS, tiny.PIXELS, generator=draw)}}},
        modality_targets={"images": {"out": target_of(kind, spans * ROWS, draw)}},
    )
    if not reads:
        del batch["modality_inputs"]
    if not spans:
        del batch["modality_targets"]
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_replayed_steps_of_changing_batches_equal_eager_ones_bit_by_bit(recorded, kind):
    eager, graphed = pair(recorded, StepGraphs(warmup=1), config=config_of(kind))
    assert_same_steps(eager, graphed, lambda step: [batch_of(kind, 2 * step), batch_of(kind, 2 * step + 1)], 20)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 19, 1)


def test_draws_of_each_microbatch_are_its_own_in_every_replay(recorded, monkeypatch):
    """With one batch and weights that stay, nothing else moves the loss."""
    trainer = trainer_of(recorded, StepGraphs(warmup=1), config=config_of("flow"))
    trainer.optimizer.step = lambda: (True, 1.0, None)
    batch = batch_of("flow", 0)
    losses = [trainer.train_step(lambda *_: [batch, batch]).losses["images/out"] for _ in range(6)]
    assert trainer.graphs.counts.replayed == 5 and len(set(losses)) == 6


def test_a_step_with_other_spans_is_another_shape(recorded):
    eager, graphed = pair(recorded, StepGraphs(warmup=1), config=config_of("codes"))
    shapes = [(2, True), (2, True), (1, True), (0, True), (2, False), (1, True), (0, True), (2, False)]
    data = [[batch_of("codes", step, spans, reads)] for step, (spans, reads) in enumerate(shapes)]
    assert_same_steps(eager, graphed, lambda step: data[step], len(shapes))
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (4, 4, 4)


def test_reading_and_writing_at_one_token_counts_its_rows_in_the_shape(recorded):
    """Nothing else of a batch whose media fill a bucket says how many hidden states are read there."""
    config = config_of("token", write=tiny.READ, begin=None, end=None)
    eager, graphed = pair(recorded, StepGraphs({"images": 4}, warmup=1), config=config)

    def reading(step: int, images: int) -> list[dict]:
        batch = batch_of("token", step, spans=0)
        batch["input_ids"][images:][batch["input_ids"][images:] == tiny.READ] = 7
        patches = batch["modality_inputs"]["images"]["patches"]
        patches["x"] = patches["x"][:images]
        return [batch]

    images = [2, 2, 1, 1, 2]
    for step, number in enumerate(images):
        expected, found = (each.train_step(lambda *_: reading(step, number)) for each in (eager, graphed))
        # A bucket's items of zeros move the sums of the encoder's gradient by rounding.
        torch.testing.assert_close(dict(found.losses), dict(expected.losses), rtol=1e-6, atol=1e-6)
    assert (graphed.graphs.counts.captured, graphed.graphs.counts.replayed) == (2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_batch_that_was_checked_on_the_host_is_looked_at_no_more(single_process, kind):
    model, batch = MimoModel(config_of(kind)), batch_of(kind, 0)
    placement = model.place(batch["input_ids"]).bound().counting(batch["loss_mask"])
    settled = model.settle({**batch, "placement": placement})
    assert settled.settled and not placement.settled
    looked: list[object] = []
    model.checks.look = lambda *given: looked.append(given) if not model.checks.settled else None
    model(**batch, placement=settled)
    assert not looked
    model(**batch, placement=placement)
    assert looked, "one that nobody checked is looked at again"


def test_rows_are_counted_without_draws_or_tokenizers(single_process, monkeypatch):
    model, batch = MimoModel(config_of("flow")), batch_of("flow", 0)
    monkeypatch.setattr(type(model.modality_submodules["images"].decoders["out"]), "prepare", None)
    placement = model.place(batch["input_ids"]).bound()
    assert model.settle({**batch, "placement": placement}).settled


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda target: {**target, "target": target["target"][:-1]}, "weight must have shape \\[5\\]"),
        (
            lambda target: {"target": target["target"][:-1]},
            "images: sample 1 has 3 generation tokens but 2 target rows",
        ),
        (lambda target: {**target, "weight": -target["weight"]}, "targets of images/out: .*weight"),
        (lambda target: {"clean": target["target"]}, "lack \\['target'\\]"),
    ],
)
def test_bad_targets_are_refused_on_the_host(single_process, change, match):
    model, batch = MimoModel(config_of("vectors")), batch_of("vectors", 0)
    batch["modality_targets"]["images"]["out"] = change(batch["modality_targets"]["images"]["out"])
    with pytest.raises(ValueError, match=match):
        model.settle({**batch, "placement": model.place(batch["input_ids"]).bound()})


def test_a_token_without_a_predecessor_is_refused_on_the_host(single_process):
    model, batch = MimoModel(config_of("vectors", begin=None, end=None)), batch_of("vectors", 0)
    batch["input_ids"][0] = batch["input_ids"][0].roll(-int((batch["input_ids"][0] == tiny.WRITE).nonzero()[0]))
    with pytest.raises(ValueError, match="position 0 of sample 0 opens its sequence"):
        model.settle({**batch, "placement": model.place(batch["input_ids"]).bound()})


def test_prepared_targets_are_not_prepared_again(single_process):
    model, batch = MimoModel(config_of("flow")), batch_of("flow", 0)
    prepared = model.prepare(batch["modality_targets"])
    again = model.prepare(prepared)
    assert isinstance(again["images"]["out"], Prepared) and again["images"]["out"] is prepared["images"]["out"]
