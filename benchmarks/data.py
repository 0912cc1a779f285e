"""From files to packs: samples a second and wasted positions, beside Megatron Energon and a padding collator.

    python -m benchmarks.data                         # 2,000 drawn samples, two workers
    python -m benchmarks.data --samples 200 --workers 0 --output out/data.json

All of them read the same JSON lines and pictures, and make samples of them with the same code, in one run: 30 % text,
35 % one image of 576 positions, 25 % one to twelve tiles of 256, 10 % a video as four to twenty-four frames of 128.
What differs is how samples are found, ordered, buffered and laid together:

    ours       PackedData: first-fit decreasing over a buffer of 64, the emptiest pack carried over
    energon    Energon's loader (extra `energon`); it has no packer, so next fit on longest-first over its buffer of 64
    padding    torch's DataLoader in random order, four samples a batch padded to the longest

The device plays no part. A sample that is longer than a pack is left out by all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from megatron_mimo.data import (
    PLAIN_TEMPLATE,
    ChatText,
    Handling,
    JsonLines,
    Limits,
    PackedData,
    PackShape,
    Reading,
    ReadingOptions,
    Sample,
    SampleProcessor,
    conversation_of,
    packed,
    padded,
)

logger = logging.getLogger(__name__)

WORDS = [f"word{index}" for index in range(1000)]
PATCH = 14  # pixels along a row's side
SHARES = (0.30, 0.35, 0.25, 0.10)  # text, one image, tiles, video
BATCH = 4  # samples of a padded batch


class Rows:
    """Reads an image as one row for every 14 x 14 pixels."""

    rate, limits = 0.0, Limits()

    def __call__(self, medium: Image.Image) -> Reading:
        """Patches `[rows, 588]` float32."""
        pixels = torch.from_numpy(np.asarray(medium, dtype=np.float32)) / 255
        h, w = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
        patches = pixels[: h * PATCH, : w * PATCH].reshape(h, PATCH, w, PATCH, 3).permute(0, 2, 1, 3, 4)
        patches = patches.reshape(h * w, -1)
        return Reading(h * w, {"tower": {"patches": patches}}, ((1, h, w),), cost=float(patches.numel()))


def process() -> SampleProcessor:
    """The one way from a record to a sample that all contenders take."""
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "<end>", "<image>", *WORDS])}
    machine = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    machine.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=machine, pad_token="<pad>", eos_token="<end>")
    chat = ChatText(tokenizer, template=PLAIN_TEMPLATE)
    return SampleProcessor(chat, {"image": Handling("images", special=words["<image>"], reader=Rows())})


def write_data(folder: Path, count: int) -> Path:
    """The drawn mixture: JSON lines beside PNG files."""
    draw = np.random.default_rng(0)
    sizes = {576: (336, 336), 256: (224, 224), 128: (112, 224)}
    for rows, size in sizes.items():
        for index in range(16):
            low = draw.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
            Image.fromarray(low).resize((size[1], size[0])).save(folder / f"{rows}_{index}.png")
    records = []
    for _ in range(count):
        kind = draw.choice(4, p=SHARES)
        rows, items = [(0, 0), (576, 1), (256, draw.integers(1, 13)), (128, draw.integers(4, 25))][kind]
        media = [{"type": "image", "image": f"{rows}_{draw.integers(16)}.png"} for _ in range(items)]
        asked = " ".join(draw.choice(WORDS, draw.integers(10, 300)))
        said = " ".join(draw.choice(WORDS, draw.integers(10, 300)))
        records.append((media, asked, said))
    return write_records(folder, records)


def write_records(folder: Path, records: list[tuple[list[dict], str, str]]) -> Path:
    """A file of JSON lines: media and a question of the user's, and what is to be said, each record."""
    lines = [
        json.dumps(
            {"messages": [
                {"role": "user", "content": [*media, {"type": "text", "text": asked}]},
                {"role": "assistant", "content": said},
            ]}
        )
        for media, asked, said in records
    ]  # fmt: skip
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclasses.dataclass
class Read:
    """What a contender gave: samples, positions that hold something, and positions in all."""

    samples: int = 0
    tokens: int = 0
    positions: int = 0

    def add(self, samples: int, tokens: int, positions: int) -> None:
        """Adds a pack or batch."""
        self.samples, self.tokens, self.positions = (
            self.samples + samples,
            self.tokens + tokens,
            self.positions + positions,
        )


def ours(path: Path, shape: PackShape, workers: int) -> Iterator[tuple[int, int, int]]:
    """Samples, tokens and positions of each pack, without end."""
    data = PackedData([JsonLines(path)], process(), shape, options=ReadingOptions(workers=workers))
    try:
        for pack in data:
            yield len(pack.names), pack.tokens, pack.input_ids.numel()
    finally:
        data.close()


class _Records(torch.utils.data.Dataset):
    def __init__(self, path: Path, length: int) -> None:
        self._source, self._process, self._length = JsonLines(path), process(), length

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample | None:
        sample = self._process(conversation_of(self._source.record(index)), self._source.media_root)
        return sample if len(sample) <= self._length else None


def padding(path: Path, shape: PackShape, workers: int) -> Iterator[tuple[int, int, int]]:
    """The same of batches that are padded to their longest sample."""

    def together(samples: list[Sample | None]) -> Any:
        kept = [sample for sample in samples if sample is not None]
        return padded(kept, max(map(len, kept))) if kept else None

    while True:
        for batch in DataLoader(_Records(path, shape.length), BATCH, True, num_workers=workers, collate_fn=together):
            if batch is not None:
                yield len(batch.names), batch.tokens, batch.input_ids.numel()


def next_fit(sizes: list[int], length: int) -> list[list[int]]:
    """Indices of each pack: the longest first, a new pack as soon as one does not fit the last."""
    packs: list[list[int]] = []
    room = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if sizes[index] > room:
            packs.append([])
            room = length
        packs[-1].append(index)
        room -= sizes[index]
    return packs


def energon(path: Path, shape: PackShape, workers: int) -> Iterator[tuple[int, int, int]]:
    """The same with Energon's loader."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        SkipSample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon import Sample as EnergonSample

    @edataclass
    class Cooked(EnergonSample):
        record: Any

    @edataclass
    class Encoded(EnergonSample):
        sample: Any

    @stateless
    def cook(sample: dict) -> Cooked:
        return Cooked(**basic_sample_keys(sample), record=sample["json"])

    make, root = process(), path.parent

    class Encoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)

        @stateless
        def encode_sample(self, sample: Cooked) -> Encoded:
            found = make(conversation_of(sample.record), root)
            if len(found) > shape.length:
                raise SkipSample()
            return Encoded.derive_from(sample, sample=found)

        def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
            packs = next_fit([shape.padded(len(one.sample)) for one in samples], shape.length)
            return [[samples[index] for index in pack] for pack in packs]

        @stateless
        def pack_selected_samples(self, samples: list[Encoded]) -> Encoded:
            return Encoded.derive_from(samples[0], sample=packed([one.sample for one in samples], shape))

        def batch(self, samples: list[Encoded]) -> Any:
            return samples[0].sample

    tool = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(path)]
    subprocess.run(tool, check=True, capture_output=True)
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = get_train_dataset(
        path, worker_config=config, batch_size=1, shuffle_buffer_size=64, max_samples_per_sequence=100,
        packing_buffer_size=shape.buffer, task_encoder=Encoder(),
    )  # fmt: skip
    for pack in get_savable_loader(dataset):
        yield len(pack.names), pack.tokens, pack.input_ids.numel()


CONTENDERS: dict[str, Callable] = {"ours": ours, "energon": energon, "padding": padding}


def measured(
    contenders: dict[str, Callable], path: Path, shape: PackShape, workers: int, samples: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Of each contender samples a second (the median of `rounds`, after a first one that starts workers) and waste.

    Contenders take turns, so that a drift of the machine meets all of them.
    """
    packs = {name: contender(path, shape, workers) for name, contender in contenders.items()}
    rates: dict[str, list[float]] = {name: [] for name in packs}
    whole = {name: Read() for name in packs}
    for turn in range(rounds + 1):
        for name in packs:
            read, started = Read(), time.perf_counter()
            while read.samples < samples:
                read.add(*next(packs[name]))
            if turn:
                rates[name].append(read.samples / (time.perf_counter() - started))
                whole[name].add(read.samples, read.tokens, read.positions)
    for each in packs.values():
        each.close()
    return {
        name: {
            "samples a second": statistics.median(rates[name]),
            "slowest": min(rates[name]),
            "fastest": max(rates[name]),
            "waste": 1 - whole[name].tokens / whole[name].positions,
            "tokens a sample": whole[name].tokens / whole[name].samples,
        }
        for name in packs
    }


def main() -> None:
    """Runs every contender that is installed, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="records of the data, and samples of a round")
    parser.add_argument("--length", type=int, default=4096, help="positions of a pack")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--output", type=Path, help="file of JSON for the figures")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        path = write_data(Path(folder), arguments.samples)
        contenders = {name: CONTENDERS[name] for name in arguments.contenders}
        shape = PackShape(arguments.length)
        results = measured(contenders, path, shape, arguments.workers, arguments.samples, arguments.rounds)
    for name, found in results.items():
        print(
            f"{name:8} {found['samples a second']:8.0f} samples/s "
            f"({found['slowest']:.0f} to {found['fastest']:.0f})"
            f"  waste {found['waste']:6.2%}  {found['tokens a sample']:.0f} tokens a sample"
        )
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": sys.argv, "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        arguments.output.write_text(json.dumps({**facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
