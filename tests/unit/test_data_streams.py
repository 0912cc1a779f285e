"""Streams of `datasets` give the same packs after any crash, and what would not is refused."""

import json
from functools import partial

import datasets
import pytest

from megatron_mimo.data import DatasetsStream, PackedData, PackShape, ReadingOptions, loading, show
from megatron_mimo.data.messages import SampleError
from tests import data_samples as made
from tests.unit.test_data_loading import digest, taken

COUNT = 150


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Two Parquet files of conversations, some with a picture as bytes."""
    where = tmp_path_factory.mktemp("stream")
    rows = [
        {
            "question": "What is it " * (1 + index % 5),
            "answer": f"A cat {index}",
            "image": {"bytes": made.png(8, 8 + 8 * (index % 2), index), "path": None} if index % 3 else None,
        }
        for index in range(COUNT)
    ]
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    paths = [str(where / f"{part}.parquet") for part in range(2)]
    for part, path in enumerate(paths):
        share = rows[: COUNT // 3] if part == 0 else rows[COUNT // 3 :]
        datasets.Dataset.from_list(share, features=features).to_parquet(path)
    return paths


def stream_of(files: list[str], **more) -> DatasetsStream:
    return DatasetsStream(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True), **more)


def data_of(files: list[str], workers: int = 0, stream: DatasetsStream | None = None, **more) -> PackedData:
    options = ReadingOptions(workers=workers)
    shape = PackShape(length=64, multiple=2, buffer=8)
    return PackedData(stream or stream_of(files), made.processor(), shape, options=options, **more)


@pytest.fixture(scope="module")
def packs(files) -> list[str]:
    """Of more than an epoch."""
    return taken(data_of(files), 60)


def test_a_stream_of_which_nothing_can_be_used_ends_a_run_that_has_no_end(files, monkeypatch):
    monkeypatch.setattr(loading, "_IN_A_ROW", 2 * COUNT)
    data = PackedData(stream_of(files), made.processor(), PackShape(length=2))
    with pytest.raises(ValueError, match=f"none among {2 * COUNT} in a row .{2 * COUNT} too_long."):
        next(data)


def test_records_come_in_their_order_epoch_after_epoch(files, packs):
    data = data_of(files)
    positions = [position for _ in packs for position in next(data).positions]
    assert max(positions) > COUNT and len(set(positions)) == len(positions)
    assert len(set(packs)) == len(packs)  # positions tell epochs apart
    first = data_of(files, samples=COUNT)
    assert sorted(position for pack in first for position in pack.positions) == list(range(COUNT))
    assert taken(data_of(files, workers=2), len(packs)) == packs


@pytest.mark.parametrize(("at", "before", "after"), [(7, 0, 0), (7, 0, 2), (40, 2, 0), (57, 0, 0)])
def test_a_run_goes_on_with_the_packs_that_it_would_have_had(files, packs, at, before, after):
    data = data_of(files, before)
    for _ in range(at):
        next(data)
    state = json.loads(json.dumps(data.state_dict()))
    data.close()
    resumed = data_of(files, after)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert taken(resumed, len(packs) - at) == packs[at:]


def test_a_run_that_resumes_twice_within_what_it_reads_again_goes_on_too(files, packs):
    data = data_of(files)
    for at in (3, 4, 9):
        while True:
            found = digest(next(data))
            assert found in packs[: at + 1]
            if found == packs[at]:
                break
        state = json.loads(json.dumps(data.state_dict()))
        data.close()
        data = data_of(files)
        data.load_state_dict(state)
    assert taken(data, 10) == packs[10:20]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_ranks_sees_every_record_of_the_epoch_once(files, first, then):
    seen = made.seen_by_other_ranks(partial(data_of, files, samples=COUNT), first, then)
    assert sorted(seen) == list(range(COUNT))


def test_a_shuffled_stream_is_refused(files):
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    for shuffled in (dataset.shuffle(buffer_size=4), dataset.shuffle(seed=1).map(lambda record: record).take(5)):
        with pytest.raises(ValueError, match=r"expected a dataset without shuffle\(\)"):
            DatasetsStream(shuffled)
    mixed = datasets.interleave_datasets([dataset, dataset.shuffle(buffer_size=4)])
    with pytest.raises(ValueError, match=r"expected a dataset without shuffle\(\)"):
        DatasetsStream(mixed)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_whose_records_are_others_since_is_refused(files, workers):
    data = data_of(files)
    next(data)
    state = data.state_dict()
    resumed = data_of(files[::-1], workers)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="the stream does not go on as it was: its records 0 to "):
        next(resumed)
    resumed.close()
    with pytest.raises(ValueError, match="this state is of other data"):
        data_of(files, stream=stream_of(files, name="other")).load_state_dict(state)


def test_records_that_cannot_be_used_are_counted_and_named():
    rows = [{"text": "fine"}, {"text": None}, {"text": "fine"}]
    features = datasets.Features({"text": datasets.Value("string")})
    stream = DatasetsStream(datasets.Dataset.from_list(rows, features=features).to_iterable_dataset())
    data = data_of([], stream=stream, samples=3)
    assert [position for pack in data for position in pack.positions] == [0, 2]
    assert data.skipped == {"form": 1}
    stops = PackedData(
        stream, made.processor(), PackShape(length=64), options=ReadingOptions(corrupt="stop"), samples=3
    )
    with pytest.raises(SampleError, match="record 1 of datasets: expected 'messages'"):
        list(stops)


def test_what_a_stream_cannot_be_asked_for_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="a stream is one source, expected weights=None"):
        data_of(files, weights=[1.0])
    with pytest.raises(ValueError, match="expected 'read' or 'write'"):
        stream_of(files, columns="draw")
    with pytest.raises(ValueError, match="a stream has no sample by number"):
        show(data_of(files), tmp_path / "page.html", packs=1)
    features = datasets.Features({"text": datasets.Value("string")})
    empty = DatasetsStream(datasets.Dataset.from_list([{"text": "a"}], features=features).to_iterable_dataset().take(0))
    with pytest.raises(ValueError, match="expected at least one record, found none"):
        next(data_of([], stream=empty))
