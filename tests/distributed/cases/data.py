"""Training from a data source on several ranks: the same packs whatever the layout, and after a crash."""

import pytest
import torch
import torch.distributed as dist

from megatron_mimo.data.packs import Pack, padded
from megatron_mimo.data.samples import Sample
from megatron_mimo.launch import Run
from megatron_mimo.segments import span_mask
from megatron_mimo.training import DataSource, PackSource
from megatron_mimo.training.sources import batch_of
from tests import data_samples as made
from tests.distributed.cases.training import INTERLEAVED, PIPELINE, TENSOR, assert_close, losses, trainer
from tests.distributed.harness import case, relayout, shared_directory


class Everyone(DataSource):
    """The packs of all data-parallel ranks of another layout, as microbatches of one."""

    def __init__(self, path, size: int) -> None:
        self._sources = [PackSource(made.tiny_data(path, rank, size)) for rank in range(size)]

    def next_step(self):
        return [batch for source in self._sources for batch in source.next_step()]

    def state_dict(self):
        return {"order": {}, "size": 1, "ranks": {"0": {}}}

    def load_state_dict(self, state) -> None:
        raise AssertionError("this run is not resumed")


class Noted(PackSource):
    """Notes the positions of what it gave."""

    def __init__(self, data) -> None:
        super().__init__(data)
        self.seen: list[int] = []

    def next_step(self):
        pack = next(self.data)
        self.seen += pack.positions
        return [batch_of(pack)]


def written(name: str):
    """The records, written once for all ranks."""
    folder = shared_directory() / name
    if dist.get_rank() == 0:
        folder.mkdir()
        made.tiny_records(folder)
    dist.barrier()
    return folder / "train.jsonl"


@case(ranks=2, timeout_s=120)
def packs_train_alike_on_every_layout(run: Run) -> None:
    path = written("packs")
    first = trainer(run, path.parent / "out")
    start = first.save()
    expected = losses(first.train(PackSource(made.tiny_data(path, run.data_rank, 2))))
    for layout in (TENSOR, PIPELINE, INTERLEAVED):
        run = relayout(**layout)
        other = trainer(run, None)
        other.load(start)
        assert_close(losses(other.train(Everyone(path, 2))), expected)


@case(ranks=2, timeout_s=120)
def a_run_on_another_number_of_ranks_sees_each_sample_of_the_epoch_once(run: Run) -> None:
    path = written("epoch")
    source = Noted(made.tiny_data(path, run.data_rank, 2))
    first = trainer(run, path.parent / "out", steps=2)
    first.train(source)
    seen: list = [None, None]
    dist.all_gather_object(seen, source.seen)
    before = [position for rank in seen for position in rank]

    run = relayout(**PIPELINE)
    source = Noted(made.tiny_data(path))
    other = trainer(run, None, steps=25)
    assert other.load(path.parent / "out" / "step_00000002") == 2
    other.train(source)
    if run.groups.pp.rank() == 0:
        after = source.seen
        assert not set(before) & set(after) and len(set(after)) == len(after)
        assert set(range(40)) <= {*before, *after}
    else:
        assert source.seen == []  # the first stage read for both


PACKS = 2  # of a step


def alone(sample: Sample) -> dict:
    """A sample as a batch of its own, whose media see the whole of themselves by a mask that is written out."""
    pack, spans = padded([sample], 32), torch.full((32,), -1)
    for number, item in enumerate(sample.items):
        spans[item.start : item.start + item.length] = number
    return {**batch_of(pack), "attention_mask": ~span_mask(spans)[None, None]}


def packs_of(path, whole: bool) -> list[Pack]:
    data = made.tiny_data(path, whole=whole)
    return [next(data) for _ in range(4 * PACKS)]


@case(ranks=2, timeout_s=240)
def packs_with_attention_within_spans_train_as_their_samples_apart_at_tp_2_pp_2_and_dp_2(run: Run) -> None:
    """Apart is Megatron's own attention with a mask; losses after the first show that gradients are alike."""
    path = written("spans")
    data, packs = made.tiny_data(path, whole=True), packs_of(path, whole=True)

    def of_step(each: list[Pack], step: int, rank: int = 0, size: int = 1) -> list[Pack]:
        share = PACKS // size
        return each[PACKS * step : PACKS * (step + 1)][rank * share : (rank + 1) * share]

    def apart(step: int, rank: int, size: int) -> list[dict]:
        positions = [position for pack in of_step(packs, step) for position in pack.positions]
        return [alone(data.sample_at(position)[1]) for position in positions]

    run = relayout(**TENSOR)  # one data-parallel rank, which may have any number of samples
    first = trainer(run, path.parent / "out")
    with torch.no_grad():
        for name, parameter in first.models[0].named_parameters():
            if "linear_qkv.weight" in name or "linear_proj.weight" in name:
                parameter *= 10  # fresh attention is so small that nobody would see which positions it looks at
    first.sync_weights()
    start = first.save()
    history = first.train(apart)
    norms = [report.gradient_norm for report in history.steps]
    for layout in ({}, TENSOR, PIPELINE, INTERLEAVED):
        other = trainer(relayout(**layout), None)
        other.load(start)
        found = other.train(lambda step, rank, size: [batch_of(pack) for pack in of_step(packs, step, rank, size)])
        assert_close(losses(found), losses(history))
        assert [report.gradient_norm for report in found.steps] == pytest.approx(norms, rel=1e-5)
    causal = packs_of(path, whole=False)
    other = trainer(relayout(**TENSOR), None)
    other.load(start)
    found = other.train(lambda step, rank, size: [batch_of(pack) for pack in of_step(causal, step, rank, size)])
    assert losses(found)[0]["text"] != pytest.approx(losses(history)[0]["text"], rel=1e-4)
