"""Files become records by number, the same in every process, and media are opened within bounds."""

import csv
import io
import json
import os
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.data.media import Limits, Video, open_image, open_sound, open_video, read_bytes
from megatron_mimo.data.messages import Medium, SampleError, conversation_of
from megatron_mimo.data.sources import Folder, JsonLines, Records, Table, open_source
from tests import data_samples as made

RECORDS = [{"text": f"text {index}", "image": f"{index}.png"} for index in range(5)]


def test_lines_are_found_by_their_bytes_blank_ones_left_out(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\n{"text": "one"}\r\n  \n{"text": "zw\xc3\xb6lf"}\n\n{"text": "three"}')
    source = JsonLines(path)
    assert [source.record(index)["text"] for index in range(len(source))] == ["one", "zwölf", "three"]
    assert source.where(1) == f"line at byte 21 of {path}"


def test_a_source_of_lines_reads_on_in_another_process(tmp_path):
    source = JsonLines(made.lines(tmp_path / "train.jsonl", RECORDS))
    first = source.record(0)
    assert pickle.loads(pickle.dumps(source)).record(0) == first == RECORDS[0]


def written(kind: str, tmp_path):
    """The same records in each form."""
    if kind == "jsonl":
        return made.lines(tmp_path / "train.jsonl", RECORDS)
    if kind == "json":
        (tmp_path / "train.json").write_text(json.dumps(RECORDS))
        return tmp_path / "train.json"
    for record in RECORDS:
        (tmp_path / record["image"]).write_bytes(made.png())
    named = [{"text": record["text"], "file_name": record["image"]} for record in RECORDS]
    if kind == "names":
        for record in RECORDS:
            (tmp_path / record["image"]).with_suffix(".txt").write_text(record["text"] + "\n")
    elif kind == "metadata.jsonl":
        made.lines(tmp_path / "metadata.jsonl", named)
    elif kind == "metadata.csv":
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "file_name"])
            writer.writeheader()
            writer.writerows(named)
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "json", "names", "metadata.jsonl", "metadata.csv"])
def test_every_form_gives_the_same_records(kind, tmp_path):
    source = open_source(written(kind, tmp_path), columns="write")
    assert [source.record(index) for index in range(len(source))] == RECORDS
    assert source.media_root == tmp_path
    assert source.columns == "write"


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved"])
def test_tables_give_records_with_encoded_media(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    png = made.png()
    table = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "image": [{"bytes": png, "path": None}] * 2},
        features=datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()}),
    )
    path = tmp_path / ("table.parquet" if kind == "parquet" else "table")
    if kind == "saved":
        table.save_to_disk(path)
    else:
        path.parent.mkdir(exist_ok=True)
        file = path if kind == "parquet" else path / "one.parquet"
        file.parent.mkdir(exist_ok=True)
        table.to_parquet(file)
    source = open_source(path)
    assert len(source) == 2
    conversation = conversation_of(source.record(1))
    assert open_image(conversation.media()[0][1].medium).size == (16, 16)


def test_a_path_that_holds_no_records_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="found nothing"):
        open_source(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"found none .media end with .png, .jpg, .*.wav"):
        open_source(tmp_path)
    (tmp_path / "one.json").write_text('{"text": 1}')
    with pytest.raises(ValueError, match="a JSON list"):
        open_source(tmp_path / "one.json")
    (tmp_path / "one.xml").write_text("")
    with pytest.raises(ValueError, match=r"expected .jsonl"):
        open_source(tmp_path / "one.xml")
    with pytest.raises(ValueError, match="'read' or 'write'"):
        Records([], columns="both")


@pytest.mark.parametrize("name", ["datasets", "soundfile", "av"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"megatron-mimo\[data\]"):
        if name == "datasets":
            Table(tmp_path)
        elif name == "av":
            open_video(Medium(data=b""), 1)
        else:
            open_sound(Medium(data=b""), 16000)


def test_media_without_a_text_are_told_and_are_records_where_they_are_asked_about(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(made.png())
    with pytest.raises(ValueError, match=r"a .txt of their name, found 3 without, such as a.png"):
        Folder(tmp_path)
    (tmp_path / "b.txt").write_text("A cat.")
    source = open_source(tmp_path)
    assert len(source) == 1 and source.alone == ("a.png", "sub/c.png")
    asked = open_source(tmp_path, unanswered=True)
    assert [asked.record(index) for index in range(len(asked))] == [
        {"image": "a.png"}, {"image": "b.png", "text": "A cat."}, {"image": "sub/c.png"},
    ]  # fmt: skip
    assert asked.alone == ()
    with pytest.raises(SampleError, match="expected 'messages'"):
        conversation_of(asked.record(0))
    (turn,) = conversation_of(asked.record(0), unanswered=True).turns
    assert turn.role == "user" and [part.kind for part in turn.parts] == ["image"]


def test_records_of_a_folder_that_cannot_be_read_say_why(tmp_path):
    written("names", tmp_path)
    source = Folder(tmp_path)
    (tmp_path / "0.txt").write_bytes(b"\xff")
    (tmp_path / "1.txt").unlink()
    for index, kind in enumerate(("encoding", "missing")):
        with pytest.raises(SampleError) as caught:
            source.record(index)
        assert caught.value.kind == kind
    made.lines(tmp_path / "metadata.jsonl", [{"file_name": "x.docx"}])
    with pytest.raises(SampleError, match="an image, a sound or a video"):
        Folder(tmp_path).record(0)


# Media ---------------------------------------------------------------------------------------


def test_images_come_upright_in_rgb():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("L", (4, 2)).save(file, "JPEG", exif=exif)
    image = open_image(Medium(data=file.getvalue()))
    assert (image.mode, image.size) == ("RGB", (2, 4))
    assert open_image(Medium(value=image)).size == (2, 4)


def test_sounds_come_in_one_channel_at_the_rate_that_is_asked_for():
    pytest.importorskip("soundfile")
    sound = open_sound(Medium(data=made.wav(seconds=0.5, rate=8000)), 16000)
    assert sound.rate == 16000 and len(sound.samples) == 8000 and sound.samples.dtype == np.float32
    both = np.stack([np.ones(80), -np.ones(80)])
    assert not open_sound(Medium(value=(both, 16000)), 16000).samples.any()


def video(seconds: float, rate: int, size=(16, 16)) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(int(seconds * rate)):
            pixels = np.full((size[1], size[0], 3), 10 * index % 256, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def test_frames_are_taken_by_their_rate():
    found = open_video(Medium(data=video(seconds=2, rate=10)), 2)
    assert isinstance(found, Video) and found.rate == 2
    assert found.frames.shape == (4, 16, 16, 3)
    assert np.abs(found.frames.mean((1, 2, 3)) - [0, 50, 100, 150]).max() < 5  # the codec's own error
    assert open_video(Medium(data=video(seconds=1, rate=4)), 30).rate == 4


def test_paths_are_followed_below_the_root_alone(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    (root / "in").mkdir(parents=True)
    outside.write_bytes(b"secret")
    (root / "in" / "a.png").write_bytes(b"mine")
    (root / "to_in.png").symlink_to("in/a.png")
    (root / "to_out.png").symlink_to(outside)
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    for path in ("in/a.png", "in/../in/a.png", str(root / "in" / "a.png"), "to_in.png"):
        assert read_bytes(Medium(path), root) == b"mine"
    refused = {
        "../outside.png": "outside",
        str(outside): "outside",
        "to_out.png": "outside",
        "absent.png": "missing",
        "loop.png": "missing",
        "in": "missing",
        "pipe.png": "missing",
        "nul\0.png": "missing",
        "x" * 5000: "missing",
    }
    for path, kind in refused.items():
        with pytest.raises(SampleError) as caught:
            read_bytes(Medium(path), root)
        assert caught.value.kind == kind, path
    with pytest.raises(SampleError, match="no media_root"):
        read_bytes(Medium("a.png"), None)


def test_media_beyond_a_limit_are_refused_by_their_header():
    small = Limits(bytes=10, pixels=100, seconds=0.05, frames=1)
    with pytest.raises(SampleError, match="at most 10 bytes"):
        read_bytes(Medium(data=b"x" * 11), None, small)
    roomy = Limits(pixels=100, seconds=0.05, frames=1)
    with pytest.raises(SampleError, match="at most 100 pixels"):
        open_image(Medium(data=made.png()), None, roomy)
    pytest.importorskip("soundfile")
    with pytest.raises(SampleError, match=r"at most 0.05 seconds"):
        open_sound(Medium(data=made.wav()), 16000, None, roomy)
    with pytest.raises(SampleError, match="at most 100 pixels"):
        open_video(Medium(data=video(1, 4)), 4, None, roomy)
    with pytest.raises(SampleError, match="at most 1 frames"):
        open_video(Medium(data=video(1, 4)), 4, None, Limits(frames=1))


@pytest.mark.parametrize(
    ("open_it", "value", "message"),
    [
        (open_image, 7, "an image of PIL"),
        (lambda medium: open_sound(medium, 16000), 7, "expected a file or"),
        (lambda medium: open_sound(medium, 16000), ([], 16000), "no samples"),
        (lambda medium: open_video(medium, 1), 7, "video: expected a file"),
    ],
)
def test_values_that_are_no_media_are_refused(open_it, value, message):
    pytest.importorskip("soundfile")
    with pytest.raises(SampleError, match=message):
        open_it(Medium(value=value))


def test_a_video_without_pictures_is_refused():
    with pytest.raises(SampleError, match="no pictures"):
        pytest.importorskip("av")
        open_video(Medium(data=made.wav()), 1)
