"""A data source gives the same packs for any number of workers, and after any crash."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_mimo.data.blend import Order
from megatron_mimo.data.loading import PackedData, ReadingOptions
from megatron_mimo.data.messages import SampleError
from megatron_mimo.data.packing import PackShape, RowShape
from megatron_mimo.data.packs import Pack, padded
from megatron_mimo.data.progress import joined_states
from megatron_mimo.data.sources import JsonLines, Records
from tests import data_samples as made

COUNT = 60


def folder_of(path: Path, count: int = COUNT) -> Path:
    """Conversations with a picture to read in a third of them, one to write in another."""
    records = []
    for index in range(count):
        name = f"{index}.png"
        (path / name).write_bytes(made.png(8 + 8 * (index % 3), 8 + 8 * (index % 2), index))
        asked = [made.text("What is it " * (1 + index % 7)), *([made.image(name)] if index % 3 == 0 else [])]
        said = [made.text("A cat"), *([made.image(name)] if index % 3 == 1 else [])]
        records.append({"messages": [made.user(*asked), made.assistant(*said)]})
    return made.lines(path / "train.jsonl", records)


def data_of(path: Path, *, length: int = 64, weights=None, sources: int = 1, **more) -> PackedData:
    options = ReadingOptions(**{name: more.pop(name) for name in list(more) if name in ReadingOptions.__annotations__})
    shape = PackShape(length=length, multiple=2, buffer=8)
    files = [JsonLines(path)] * sources
    return PackedData(files, made.processor(), shape, weights=weights, options=options, **more)


def digest(pack: Pack) -> str:
    """A word for every bit of a pack."""
    found = hashlib.sha256()

    def add(node: object) -> None:
        if isinstance(node, torch.Tensor):
            found.update(str((node.dtype, tuple(node.shape))).encode())
            found.update(node.contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            for name in sorted(node):
                found.update(name.encode())
                add(node[name])
        else:
            found.update(repr(node).encode())

    for name, value in vars(pack).items():
        found.update(name.encode())
        add(value)
    return found.hexdigest()


def taken(data: PackedData, count: int) -> list[str]:
    packs = [digest(next(data)) for _ in range(count)]
    data.close()
    return packs


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def packs(path) -> list[str]:
    return taken(data_of(path), 24)


def test_packs_do_not_depend_on_the_number_of_workers(path, packs):
    assert len(set(packs)) == len(packs)
    assert taken(data_of(path, workers=2), 24) == packs


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 0)])
def test_a_run_goes_on_with_the_packs_that_it_would_have_had(path, packs, before, after):
    data = data_of(path, workers=before)
    for _ in range(7):
        next(data)
    state = json.loads(json.dumps(data.state_dict()))
    data.close()
    resumed = data_of(path, workers=after)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert taken(resumed, 17) == packs[7:]


def test_a_source_may_be_set_back_while_it_runs(path, packs):
    data = data_of(path)
    next(data)
    state = data.state_dict()
    taken(data, 3)
    data.load_state_dict(state)
    assert taken(data, 3) == packs[1:4]


KILLED = """
import json, sys
from pathlib import Path
from tests.unit import test_data_loading as own

if __name__ == "__main__":
    path, state, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    data = own.data_of(path, workers=workers)
    if state.exists():
        data.load_state_dict(json.loads(state.read_text()))
    for pack in data:
        print(own.digest(pack))
        temporary = state.with_suffix(".new")
        temporary.write_text(json.dumps(data.state_dict()))
        temporary.rename(state)
        print("saved", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
def test_after_kill_9_the_packs_go_on_bit_for_bit(tmp_path, path, packs, workers):
    found: list[str] = []
    for _ in range(2):
        run = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(tmp_path / "state.json"), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # its workers are to be killed with it
        )
        for _ in range(6):
            found.append(run.stdout.readline().strip())
            assert run.stdout.readline() == "saved\n"
            run.stdin.write("\n")
            run.stdin.flush()
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        # It may have saved one more between the last line and its end; that pack is this run's too.
        rest = PackedData.state_dict(_loaded(path, tmp_path / "state.json"))
        if rest != _state_after(path, len(found)):
            assert rest == _state_after(path, len(found) + 1)
            found.append(packs[len(found)])
    assert found == packs[: len(found)]


def _loaded(path: Path, state: Path) -> PackedData:
    data = data_of(path)
    data.load_state_dict(json.loads(state.read_text()))
    return data


def _state_after(path: Path, count: int) -> dict:
    data = data_of(path)
    taken(data, count)
    return data.state_dict()


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_ranks_sees_every_sample_of_the_epoch_once(path, first, then):
    seen = made.seen_by_other_ranks(partial(data_of, path, samples=COUNT), first, then)
    assert sorted(seen) == list(range(COUNT))


def test_an_epoch_ends_after_its_samples_and_the_last_pack_holds_what_is_left(path):
    data = data_of(path, samples=COUNT)
    assert sorted(position for pack in data for position in pack.positions) == list(range(COUNT))
    with pytest.raises(StopIteration):
        next(data)


def test_a_prefetching_source_ends_and_says_so_again(path):
    data = data_of(path, samples=COUNT, workers=2)
    assert sum(len(pack.positions) for pack in data) == COUNT
    with pytest.raises(StopIteration):
        next(data)
    data.close()


def test_each_epoch_is_shuffled_anew_and_holds_every_record_once():
    order = Order([5, 7], seed=3)
    epochs = [[order.at(12 * epoch + offset) for offset in range(12)] for epoch in range(2)]
    for places in epochs:
        assert sorted((place.source, place.index) for place in places) == [(0, i) for i in range(5)] + [
            (1, i) for i in range(7)
        ]
    assert [(p.source, p.index) for p in epochs[0]] != [(p.source, p.index) for p in epochs[1]]
    assert [place.epoch for place in epochs[1]] == [1] * 12


def test_a_blend_keeps_its_shares_and_uses_each_source_up_before_it_begins_anew():
    order = Order([10, 1000], weights=[0.75, 0.25])
    places = [order.at(position) for position in range(400)]
    assert sum(place.source == 0 for place in places) == 300
    first = [place.index for place in places if place.source == 0]
    assert all(sorted(first[at : at + 10]) == list(range(10)) for at in range(0, 300, 10))
    assert [order.at(position) for position in (399, 7, 123)] == [places[399], places[7], places[123]]
    for start in range(0, 400, 4):  # evenly spread, not in runs
        assert sum(place.source == 0 for place in places[start : start + 4]) == 3


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([], None, "at least one source"),
        ([0], None, "source 0 has no record"),
        ([1, 1], [1.0], "a weight for each of 2"),
        ([1, 1], [1.0, 0.0], "above 0"),
        ([1, 1], [1.0, 1e-6], "less than 1 in 1000"),
    ],
)
def test_blends_that_are_none_are_refused(lengths, weights, message):
    with pytest.raises(ValueError, match=message):
        Order(lengths, weights=weights)


def test_states_of_other_data_or_ranks_are_refused(path):
    data = data_of(path)
    state = data.state_dict()
    with pytest.raises(ValueError, match="of other data"):
        data_of(path, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="states of 2 ranks"):
        data.load_state_dict({**state, "size": 2})
    with pytest.raises(ValueError, match="different runs"):
        joined_states([state, data_of(path, seed=1).state_dict()])
    with pytest.raises(ValueError, match="rank 2 of 2"):
        data_of(path, rank=2, size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(corrupt="ignore"), "'skip' or 'stop'"),
        (dict(too_long="split"), "'drop', 'refuse' or 'cut'"),
        (dict(workers=-1), "workers >= 0"),
        (dict(prefetch=0), "prefetch >= 1"),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReadingOptions(**options)


# What cannot be used ----------------------------------------------------------------------------------


def of_records(records: list, **options) -> PackedData:
    sources = [Records(records)]
    shape = PackShape(length=32, buffer=4)
    return PackedData(
        sources, made.processor(), shape, options=ReadingOptions(shuffle=False, **options), samples=len(records)
    )


MIXED = [{"text": "fine"}, {"title": "no text"}, {"text": "a b " * 40}, {"text": "fine"}]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_cannot_be_used_are_left_out_and_counted(caplog, workers):
    data = of_records(MIXED, workers=workers)
    assert sorted(position for pack in data for position in pack.positions) == [0, 3]
    assert data.skipped == {"form": 1, "too_long": 1}
    assert sum("left out as form" in record.message for record in caplog.records) == 1
    data.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_or_they_stop_the_run_with_the_place_and_the_reason(workers):
    data = of_records(MIXED, corrupt="stop", workers=workers)
    with pytest.raises(SampleError, match="record 1 of memory: expected 'messages'"):
        list(data)
    data.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_data_of_which_nothing_can_be_used_end_a_run_that_has_no_end(workers):
    records = [{"title": "no text"}, {"text": "a b " * 40}] * 3
    options = ReadingOptions(workers=workers)
    data = PackedData([Records(records)], made.processor(), PackShape(length=32), options=options)
    with pytest.raises(
        ValueError, match=r"none among 12 in a row \(6 form, 6 too_long\), such as record \d of memory: "
    ):
        next(data)
    data.close()
    # One that can be used in each epoch is enough.
    data = PackedData([Records([*records, {"text": "fine"}])], made.processor(), PackShape(length=32), options=options)
    assert sum(len(next(data).positions) for _ in range(3)) >= 3
    data.close()


def test_samples_that_are_too_long_may_stop_the_run_or_be_cut():
    with pytest.raises(SampleError, match="at most 32 tokens"):
        list(of_records(MIXED, too_long="refuse"))
    packs = list(of_records(MIXED, too_long="cut"))
    assert sorted(position for pack in packs for position in pack.positions) == [0, 2, 3]
    assert max(pack.tokens for pack in packs) == 32


def test_a_file_that_is_gone_when_a_run_resumes_is_left_out(tmp_path):
    path = folder_of(tmp_path, 12)
    data = data_of(path, samples=12)
    seen = list(next(data).positions)
    state = data.state_dict()
    (rank,) = state["ranks"].values()
    for index in range(0, 12):
        if index % 3 != 2:
            (tmp_path / f"{index}.png").unlink()
    resumed = data_of(path, samples=12)
    resumed.load_state_dict(state)
    for pack in resumed:
        seen += pack.positions
    assert resumed.skipped["missing"] == 12 - len(seen)
    assert len(rank["waiting"]) > 1


# Rows -------------------------------------------------------------------------------------------------


def rows_of(path: Path, workers: int = 0, **more) -> PackedData:
    options = ReadingOptions(workers=workers)
    return PackedData([JsonLines(path)], made.processor(), RowShape(length=64, rows=3), options=options, **more)


def test_batches_of_rows_are_samples_in_their_order_and_go_on_exactly(path):
    data = rows_of(path)
    found = [next(data) for _ in range(8)]
    for number, batch in enumerate(found):
        assert batch.positions == tuple(range(3 * number, 3 * number + 3))
        samples = [data.sample_at(position)[1] for position in batch.positions]
        assert digest(batch) == digest(padded(samples, 64, positions=batch.positions))
        assert batch.input_ids.shape == (3, 64) and batch.cu_seqlens is None
    data = rows_of(path, workers=2)
    for _ in range(3):
        next(data)
    state = json.loads(json.dumps(data.state_dict()))
    data.close()
    resumed = rows_of(path)
    resumed.load_state_dict(state)
    assert taken(resumed, 5) == [digest(batch) for batch in found[3:]]


def test_the_last_batch_of_rows_has_what_is_left_and_a_sample_that_is_too_long_is_left_out(path):
    assert [len(batch.input_ids) for batch in rows_of(path, samples=8)] == [3, 3, 2]
    short = PackedData([Records(MIXED)], made.processor(), RowShape(length=32, rows=2), samples=len(MIXED))
    assert sorted(position for batch in short for position in batch.positions) != list(range(len(MIXED)))
    assert short.skipped["too_long"] == 1
    for sizes in (dict(length=0), dict(length=8, rows=0)):
        with pytest.raises(ValueError, match="RowShape: .* should be at least 1, found 0"):
            RowShape(**sizes)
