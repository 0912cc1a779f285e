"""Training from a data source on several ranks: the same packs whatever the layout, and after a crash."""

import torch.distributed as dist

from megatron_mimo.launch import Run
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
