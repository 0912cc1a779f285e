"""What a training loop waits for its data: `vlm_clip_1b` on packs of PNG files that are made on the spot.

    python -m benchmarks.data_gpu                              # 1.2 B, packs of 4,096, 100 steps, on a GPU
    python -m benchmarks.data_gpu --small --steps 3            # toy sizes, on the CPU too

A step is `Trainer.train_step`: two packs, Adam, the gradient's norm read at its end. Of its time the loop spends

    waiting    for the next pack that workers and the packing thread have not made yet
    reading    in all: waiting, placing, and copying the step's batches into one pinned buffer each

Both are shares of the steps' time after `--warmup` steps. Records hold one to four images of 336 to 448 pixels
and text.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer import OptimizerConfig
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

import megatron_mimo
from benchmarks.data import write_records
from benchmarks.step import FULL, SMALL, Size, configs
from examples.recipes import vlm_clip_1b as recipe
from megatron_mimo import MimoModelConfig, specs
from megatron_mimo.batch import Batch
from megatron_mimo.data import (
    PLAIN_TEMPLATE,
    ChatText,
    Handling,
    ImageReader,
    JsonLines,
    PackedData,
    PackShape,
    ReadingOptions,
    SampleProcessor,
)
from megatron_mimo.training import PackSource, Trainer, TrainerSettings, forward

WORDS = [f"word{index}" for index in range(400)]
PICTURES = 64


def write_data(folder: Path, count: int, longest: int, images: int, side: int) -> Path:
    """JSON lines beside PNG files: up to `images` a record, and text up to `longest` tokens in all."""
    draw = np.random.default_rng(0)
    for index in range(PICTURES):
        low = draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        width, height = draw.integers(side, side * 4 // 3, 2)
        Image.fromarray(low).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    records = []
    for _ in range(count):
        media = [
            {"type": "image", "image": f"{draw.integers(PICTURES)}.png"} for _ in range(draw.integers(1, images + 1))
        ]
        asked, said = (" ".join(draw.choice(WORDS, draw.integers(1, longest // 8))) for _ in range(2))
        records.append((media, asked, said))
    return write_records(folder, records)


def process(config: MimoModelConfig, size: Size, dtype: torch.dtype) -> SampleProcessor:
    """Images as the recipe's encoder takes them, text by words."""
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "<end>", *WORDS])}
    machine = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    machine.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=machine, pad_token="<pad>", eos_token="<end>")
    clip = CLIPImageProcessor(size={"shortest_edge": size.side}, crop_size=size.side)
    rows = (size.side // recipe.PATCH) ** 2 + 1
    reader = ImageReader(clip, encoder="clip", rows=rows, keywords={"pixel_values": "images"}, dtype=dtype)
    return SampleProcessor(
        ChatText(tokenizer, template=PLAIN_TEMPLATE), {"image": Handling.of(config, "images", reader=reader)}
    )


class Waited(PackSource):
    """A source that tells how long it was waited for."""

    def __init__(self, data: PackedData, microbatches: int) -> None:
        super().__init__(data, microbatches)
        self.waited: list[float] = []

    def next_step(self) -> Sequence[Batch]:
        """The next step's packs."""
        started = time.perf_counter()
        batches = super().next_step()
        self.waited.append(time.perf_counter() - started)
        return batches


@dataclass
class Reading:
    """What `read_step` took of each step while it is entered."""

    seconds: list[float] = field(default_factory=list)

    def __enter__(self) -> Reading:
        self._read = forward.read_step

        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            found = self._read(*given, **named)
            self.seconds.append(time.perf_counter() - started)
            return found

        forward.read_step = timed
        return self

    def __exit__(self, *error: object) -> None:
        forward.read_step = self._read


def main() -> None:
    """Trains, and prints what of the steps' time was spent on data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "transformer_engine"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--prefetch", type=int, default=8, help="samples each worker is ahead, and packs made ahead")
    parser.add_argument("--packs", type=int, default=2, help="microbatches of a step")
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="file of JSON for the figures")
    arguments = parser.parse_args()

    run = megatron_mimo.initialize(seed=1)
    size = SMALL if arguments.small else FULL
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    backend = specs.choose_backend(arguments.backend)
    language, images = configs(size, backend, dtype)
    if backend == "torch":  # whose fused attention keeps no samples apart
        language.params["transformer_layer_spec"] = specs.language_layer_spec(language.params["config"], backend)
    config = MimoModelConfig(language, {"images": images}, {"images": recipe.IMAGE_TOKEN})
    steps = arguments.warmup + arguments.steps
    trainer = Trainer(
        config, run, TrainerSettings(steps=steps, progress=False), optimizer=OptimizerConfig(lr=1e-5, clip_grad=1.0)
    )
    with tempfile.TemporaryDirectory() as folder, Reading() as reading:
        rows = (size.side // recipe.PATCH) ** 2 + 1
        most = max(1, min(recipe.IMAGES, size.length // (2 * rows)))
        path = write_data(Path(folder), arguments.records, size.length, most, size.side)
        options = ReadingOptions(workers=arguments.workers, prefetch=arguments.prefetch)
        data = PackedData([JsonLines(path)], process(config, size, dtype), PackShape(size.length), options=options)
        source = Waited(data, arguments.packs)
        history = trainer.train(source)
        data.close()
    kept = slice(arguments.warmup, None)
    seconds = [report.seconds for report in history.steps][kept]
    waited, read = source.waited[kept], reading.seconds[kept]
    results = {
        "steps": len(seconds),
        "step ms": 1e3 * statistics.median(seconds),
        "waiting %": 100 * sum(waited) / sum(seconds),
        "longest wait ms": 1e3 * max(waited),
        "reading %": 100 * sum(read) / sum(seconds),
        "reading ms": 1e3 * statistics.median(read),
        "skipped": dict(data.skipped),
    }
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine()
    print(
        f"{device}, {backend}: {results['steps']} steps of {results['step ms']:.1f} ms (median); waiting for the next "
        f"pack {results['waiting %']:.2f} % (longest {results['longest wait ms']:.1f} ms), reading in all "
        f"{results['reading %']:.2f} % ({results['reading ms']:.1f} ms)"
    )
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": sys.argv, "device": device, "torch": torch.__version__, "backend": backend}
        arguments.output.write_text(json.dumps({**facts, "results": results}, indent=1))
    megatron_mimo.shutdown()


if __name__ == "__main__":
    main()
