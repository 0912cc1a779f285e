"""Corrupt inputs of ten kinds: each is counted under its word, and the same file without the fault passes."""

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_mimo.data.chat import ChatText
from megatron_mimo.data.loading import PackedData, ReadingOptions
from megatron_mimo.data.packing import PackShape
from megatron_mimo.data.readers import SoundReader
from megatron_mimo.data.samples import Handling, SampleProcessor
from megatron_mimo.data.sources import JsonLines
from tests import data_samples as made

DRAWN = 100
LINE = 50_000  # bytes; a line of this test with a fault is longer


def number(draw: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=draw))


def asked(*parts: dict, answer: object = "A cat") -> dict:
    return {"messages": [made.user(*parts), {"role": "assistant", "content": answer}]}


@dataclass
class Case:
    """A record with the fault, as a line, and the same without it."""

    broken: bytes
    sound: bytes


def case(broken: dict, sound: dict) -> Case:
    return Case(json.dumps(broken).encode(), json.dumps(sound).encode())


def files(folder: Path, name: str, broken: bytes, sound: bytes, kind: str = "image") -> Case:
    (folder / f"bad_{name}").write_bytes(broken)
    (folder / f"good_{name}").write_bytes(sound)
    part = {"type": kind}
    return case(asked({**part, kind: f"bad_{name}"}), asked({**part, kind: f"good_{name}"}))


def cut_png(folder: Path, index: int, draw: torch.Generator) -> Case:
    data = made.png(seed=index)
    return files(folder, f"{index}.png", data[: number(draw, 0, len(data) - 20)], data)


def wrong_wav(folder: Path, index: int, draw: torch.Generator) -> Case:
    data = bytearray(made.wav())
    # Letters of the four marks that a reader goes by; sizes and rates that are off may still be played.
    at = [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14][number(draw, 0, 11)]
    broken = bytearray(data)
    broken[at] ^= 1 << number(draw, 0, 5)
    return files(folder, f"{index}.wav", bytes(broken), bytes(data), "audio")


def bad_utf8(folder: Path, index: int, draw: torch.Generator) -> Case:
    found = case(asked(made.text("What is it")), asked(made.text("What is it")))
    at = found.sound.index(b"What") + number(draw, 0, 10)
    byte = bytes([[0xFF, 0xC0, 0x80, 0xED][number(draw, 0, 4)]])
    return Case(found.sound[:at] + byte + found.sound[at:], found.sound)


def missing_path(folder: Path, index: int, draw: torch.Generator) -> Case:
    name = "".join("abc/."[number(draw, 0, 3)] for _ in range(8))
    return Case(json.dumps(asked(made.image(f"absent/{name}"))).encode(), _good(folder))


def outside(folder: Path, index: int, draw: torch.Generator) -> Case:
    secret = folder.parent / "outside.png"
    secret.write_bytes(made.png())
    if index % 2:
        (folder / f"link{index}.png").symlink_to(secret)
        return Case(json.dumps(asked(made.image(f"link{index}.png"))).encode(), _good(folder))
    path = ["../outside.png", "./x/../../outside.png", str(secret), "/etc/passwd"][number(draw, 0, 4)]
    return Case(json.dumps(asked(made.image(path))).encode(), _good(folder))


def bomb(folder: Path, index: int, draw: torch.Generator) -> Case:
    side = number(draw, 20_000, 60_000)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * side))
        + chunk(b"IEND", b"")
    )
    return files(folder, f"{index}.png", data, made.png(seed=index))


def million_placeholders(folder: Path, index: int, draw: torch.Generator) -> Case:
    typed = made.SPECIAL[number(draw, 0, len(made.SPECIAL))]
    return Case(f"million {typed}".encode(), json.dumps(asked(made.text(f"{typed} {typed}"))).encode())


def tags_off(folder: Path, index: int, draw: torch.Generator) -> Case:
    (folder / "tag.png").write_bytes(made.png())
    tags, media = number(draw, 0, 4), number(draw, 1, 4)
    tags += tags == media or (tags == 0 and media == 1)
    tags += tags == media

    def tagged(count: int) -> dict:
        return {**asked(answer="A cat"), "messages": [
            {"role": "user", "content": "<image>" * count + "What is it"},
            {"role": "assistant", "content": "A cat"},
        ], "images": ["tag.png"] * media}  # fmt: skip

    return case(tagged(tags), tagged(media))


def empty_turn(folder: Path, index: int, draw: torch.Generator) -> Case:
    nothing = [[], "", " \n", None, [made.text("")], [made.text(" "), made.text("\t")]][number(draw, 0, 6)]
    broken = asked(made.text("What is it"))
    broken["messages"][number(draw, 0, 2)]["content"] = nothing
    return case(broken, asked(made.text("What is it")))


def huge_line(folder: Path, index: int, draw: torch.Generator) -> Case:
    found = asked(made.text("What is it"))
    return case({**found, "note": "x" * (LINE + number(draw, 0, 1000))}, {**found, "note": "x"})


def _good(folder: Path) -> bytes:
    (folder / "good.png").write_bytes(made.png())
    return json.dumps(asked(made.image("good.png"))).encode()


MILLIONS = "a million placeholders typed in a text"
KINDS: dict[str, tuple[Callable[[Path, int, torch.Generator], Case], str]] = {
    "a cut PNG": (cut_png, "media"),
    "a WAV with a wrong header": (wrong_wav, "media"),
    "bad UTF-8": (bad_utf8, "encoding"),
    "a missing path": (missing_path, "missing"),
    "a path or link outside the root": (outside, "outside"),
    "a decompression bomb": (bomb, "too_large"),
    MILLIONS: (million_placeholders, "too_long"),
    "tags and media that differ in number": (tags_off, "tags"),
    "an empty turn": (empty_turn, "empty"),
    "a huge line": (huge_line, "huge_line"),
}


@cache
def processor() -> SampleProcessor:
    tokenizer = made.tokenizer()
    known = made.ids(tokenizer)
    chat = ChatText(tokenizer, placeholders={"image": "<|image_pad|>"})
    sounds = Handling(
        "audio", special=known["<|audio_pad|>"], reader=SoundReader(rate=16000, rows=lambda samples: -(-samples // 400))
    )
    images = Handling("images", special=known["<|image_pad|>"], reader=made.Patches())
    return SampleProcessor(chat, {"image": images, "audio": sounds})


def read(path: Path, count: int, workers: int = 0) -> tuple[list[int], dict[str, int]]:
    source = JsonLines(path, max_line_bytes=2**26 if b"million" in path.name.encode() else LINE)
    data = PackedData(
        [source],
        processor(),
        PackShape(length=256),
        options=ReadingOptions(workers=workers, shuffle=False),
        samples=count,
    )
    positions = sorted(position for pack in data for position in pack.positions)
    skipped = data.skipped
    data.close()
    return positions, skipped


# Lines of some megabytes each: a hundred of them take a minute of a busy disk.
@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        *((name, DRAWN) for name in KINDS if name != MILLIONS),
        (MILLIONS, 5),
        pytest.param(MILLIONS, DRAWN, marks=pytest.mark.long),
    ],
)
def test_a_corrupt_sample_is_counted_and_the_same_without_its_fault_passes(tmp_path, name, drawn):
    if "WAV" in name:
        pytest.importorskip("soundfile")
    make, kind = KINDS[name]
    folder = tmp_path / "data"
    folder.mkdir()
    draw = torch.Generator().manual_seed(7)
    cases = [make(folder, index, draw) for index in range(drawn)]
    if kind == "too_long":
        # A line of some megabytes each: one file a line keeps the disk small, and the reader the same.
        _check_millions(folder, cases)
        return
    path = made.lines(folder / "train.jsonl", [line for one in cases for line in (one.broken, one.sound)])
    workers = 2 if name in ("a cut PNG", "a huge line") else 0
    positions, skipped = read(path, 2 * DRAWN, workers)
    assert skipped == {kind: DRAWN}
    assert positions == list(range(1, 2 * DRAWN, 2))


def _check_millions(folder: Path, cases: list[Case]) -> None:
    kept = 0
    for one in cases:
        typed = one.broken.decode().split(" ", 1)[1]
        broken = json.dumps(asked(made.text(typed * 1_000_000))).encode()
        path = made.lines(folder / "million.jsonl", [broken, one.sound])
        positions, skipped = read(path, 2)
        assert (positions, skipped) == ([1], {"too_long": 1})
        kept += 1
    assert kept == len(cases)
