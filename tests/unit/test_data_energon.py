"""Megatron Energon's WebDataset and blends give the same packs after a crash, and their place is plain JSON."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from megatron_mimo.data import EnergonStream, PackedData, PackShape, ReadingOptions, load_energon_state
from megatron_mimo.data.energon import lively, plain
from megatron_mimo.training.pretraining.packs import opened
from tests import data_samples as made
from tests.unit.test_data_loading import taken

# Heavy (33 packages), so the test extra is without it; the long test of the wheel installs it and runs this file.
energon = pytest.importorskip("megatron.energon", reason="Megatron Energon is not installed (extra `energon`)")

SHARDS, EACH = 2, 12


def shards(where: Path, name: str, files_of) -> Path:
    """A WebDataset of two shards, prepared by Energon's own command."""
    from megatron.energon.cli.main import main

    folder = where / name
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(EACH):
                for end, data in files_of(shard * EACH + index).items():
                    member = tarfile.TarInfo(f"{name}{shard}{index:03d}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    arguments = ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1"]
    main(["prepare", str(folder), "--non-interactive", *arguments], standalone_mode=False)
    return folder


def conversation(index: int) -> dict[str, bytes]:
    """A record that names the files beside it: one picture to read, one to write."""
    turns = [
        made.user(made.text("Draw it " * (1 + index % 5)), made.image("in.png")),
        made.assistant(made.text(f"Here {index}"), made.image("out.png")),
    ]
    files = {"in.png": made.png(8, 16, index), "out.png": made.png(8, 8, index + 1)}
    return {"json": json.dumps({"messages": turns}).encode(), **files}


def caption(index: int) -> dict[str, bytes]:
    return {"txt": f"A cat {index}".encode(), "png": made.png(16, 8, index)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("energon")
    shards(where, "talk", conversation)
    shards(where, "captions", caption)
    (where / "blend.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        "      - {weight: 3, path: talk}\n      - {weight: 1, path: captions}\n"
    )
    return where


def data_of(path: Path, workers: int = 0, shuffle: int = 6, **more) -> PackedData:
    shape = PackShape(length=64, multiple=2, buffer=6)
    options = ReadingOptions(workers=workers)
    return PackedData(EnergonStream(path, shuffle=shuffle), made.processor(), shape, options=options, **more)


@pytest.mark.parametrize(("name", "before", "after"), [("blend.yaml", 0, 2), ("blend.yaml", 2, 0), ("talk", 0, 0)])
def test_a_run_goes_on_with_the_packs_that_it_would_have_had(folder, name, before, after):
    packs = taken(data_of(folder / name), 60)
    assert len(set(packs)) == len(packs)
    data = data_of(folder / name, before)
    for _ in range(33):
        next(data)
    state = json.loads(json.dumps(data.state_dict()))
    data.close()
    assert state["ranks"]["0"]["stream"]["at"] > 0  # a place of Energon's own, from which what waits is read again
    resumed = data_of(folder / name, after)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert taken(resumed, 27) == packs[33:]


def test_shares_of_a_blend_and_shards_of_ranks_are_energons(folder):
    stream = EnergonStream(folder / "blend.yaml")
    names = [one.name for one, _ in zip(stream.start(None, 0, 1), range(400))]
    assert sum("talk" in name for name in names) == pytest.approx(300, abs=40)
    ranks = [EnergonStream(folder / "talk").start(None, rank, 2) for rank in range(2)]
    first, second = ({one.name for one, _ in zip(records, range(40))} for records in ranks)
    assert len(first) == len(second) == EACH and not first & second


def test_media_of_a_crude_sample_stand_where_its_record_names_them(folder):
    (read,) = [one for one, _ in zip(EnergonStream(folder / "talk", shuffle=0).start(None, 0, 1), range(1))]
    index = int(read.name.split()[1].removeprefix("talk")[1:]) + EACH * int(read.name.split()[1][4])
    turns = read.conversation("read").media()
    expected = conversation(index)
    assert [part.medium.data for _, part in turns] == [expected["in.png"], expected["out.png"]]
    assert [turn.role for turn, _ in turns] == ["user", "assistant"]
    (read,) = [one for one, _ in zip(EnergonStream(folder / "captions").start(None, 0, 1), range(1))]
    assert [turn.role for turn, _ in read.conversation("write").media()] == ["assistant"]


def test_what_cannot_be_used_is_counted(tmp_path):
    def faulty(index: int) -> dict[str, bytes]:
        if index == 3:
            return {"json": b"{", "png": made.png()}
        return {"txt": b"A \xff cat", "png": made.png()} if index == 4 else caption(index)

    data = data_of(shards(tmp_path, "faulty", faulty), samples=SHARDS * EACH, shuffle=0)
    seen = [position for pack in data for position in pack.positions]
    assert len(seen) == SHARDS * EACH - 2
    assert data.skipped == {"json": 1, "encoding": 1}


def test_other_data_and_another_number_of_ranks_are_refused(folder, tmp_path):
    state = data_of(folder / "talk").state_dict()
    with pytest.raises(ValueError, match="of other data"):
        data_of(folder / "captions").load_state_dict(state)
    with pytest.raises(ValueError, match="state is of 1 data-parallel ranks, expected 2: the stream deals its records"):
        data_of(folder / "talk", rank=0, size=2).load_state_dict(state)
    assert isinstance(opened([str(folder / "blend.yaml")]), EnergonStream)  # what pretrain --data makes of a path
    with pytest.raises(FileNotFoundError, match="expected a directory with .nv-meta"):
        EnergonStream(tmp_path)
    crude = shards(tmp_path, "crude", lambda index: {"bin": b"1"})
    with pytest.raises(ValueError, match=r"found \['bin'\]. Give EnergonStream a record_of"):
        next(data_of(crude))


def test_energons_own_state_is_read_from_trusted_files_alone(folder, tmp_path):
    stream = EnergonStream(folder / "talk")
    records = stream.start(None, 0, 1)
    for _ in range(5):
        next(records)
    torch.save(stream._loader.save_state_rank(), tmp_path / "state.pt")
    expected = [next(records).name for _ in range(20)]
    with pytest.raises(ValueError, match="is a pickle, and reading it runs what it says"):
        load_energon_state(tmp_path / "state.pt")
    again = EnergonStream(folder / "talk").start(load_energon_state(tmp_path / "state.pt", trusted=True), 0, 1)
    assert [next(again).name for _ in range(20)] == expected
    torch.save([1], tmp_path / "other.pt")
    with pytest.raises(ValueError, match="expected the state of one rank's loader"):
        load_energon_state(tmp_path / "other.pt", trusted=True)


def test_a_state_is_plain_and_comes_back_as_it_was():
    state = {"a": [1, 2.5, None, True, ("x", b"\x00\xff")], 3: {"bytes": "text"}}
    assert lively(json.loads(json.dumps(plain(state)))) == state
    with pytest.raises(TypeError, match="found object"):
        plain({"a": object()})
    with pytest.raises(ValueError, match="expected a state as EnergonStream writes it"):
        lively({"reduce": "os.system"})
