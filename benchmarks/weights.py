"""How long a pretrained model takes to come in, from the disk and from memory, and how much host memory that takes.

Makes a LLaVA with random weights in bfloat16 where the directory has none.

python -m benchmarks.weights --directory /tmp/llava-7b                             # 7 B parameters, on a GPU
torchrun --nproc-per-node 2 -m benchmarks.weights --shape 1gb --tensor-parallel 2   # anywhere
python -m benchmarks.weights --shape small                                          # anywhere, in seconds
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import megatron_mimo
from megatron_mimo.hf import llava
from megatron_mimo.hf.names import respelled
from megatron_mimo.hf.writing import Outgoing, write

#: Of the language model hidden and feed-forward width, layers, heads, vocabulary; of the tower image size at the end.
SHAPES = {
    "7b": ((4096, 11008, 32, 32, 32064), (1024, 4096, 24, 16, 336)),
    "1gb": ((1280, 3456, 22, 20, 32064), (256, 512, 4, 4, 112)),
    "small": ((512, 1408, 8, 8, 8064), (64, 128, 3, 4, 56)),
}
DTYPE = torch.bfloat16


class HostMemory:
    """Anonymous memory of this process while a block runs: what it was before, and its peak, in bytes."""

    def __enter__(self) -> "HostMemory":
        self.before = self.peak = anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Anonymous memory of this process; pages of mapped files, which the system can drop, are not among it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status: expected RssAnon, found none; this needs Linux.")


def config_of(shape: str) -> Any:
    (hidden, ffn, layers, heads, vocabulary), tower = SHAPES[shape]
    text = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocabulary, max_position_embeddings=4096,
    )  # fmt: skip
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    vision = transformers.CLIPVisionConfig(patch_size=14, **dict(zip(names, tower, strict=True)))
    return transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=vocabulary - 64, vision_feature_layer=-2,
        vision_feature_select_strategy="default", dtype=DTYPE, architectures=[llava.ARCHITECTURE],
    )  # fmt: skip


def make(directory: Path, shape: str) -> None:
    """A checkpoint of random weights, tensor by tensor. Every rank calls it; the first writes."""
    config = config_of(shape)
    with torch.device("meta"):
        shapes = transformers.LlavaForConditionalGeneration(config).state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensor(size: torch.Size) -> torch.Tensor | None:
        return torch.randn(size, device=device).mul_(0.02).to(DTYPE).cpu() if dist.get_rank() == 0 else None

    directory.mkdir(parents=True, exist_ok=True)
    write(
        directory,
        [
            Outgoing(name, tuple(one.shape), DTYPE, lambda size=one.shape: tensor(size))
            for name, one in respelled(shapes, llava.SPELLINGS).items()
        ],
    )
    if dist.get_rank() == 0:
        config.save_pretrained(directory)


def drop_cached(directory: Path) -> None:
    """Has the system forget what it holds of the files, so that they are read from the disk."""
    for file in directory.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def give_back_what_is_free() -> None:
    """Without this, memory that an earlier model left with the allocator would count as there before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def imported(directory: Path) -> dict[str, Any]:
    """One import: seconds, host memory, and this rank's share of the weights."""
    give_back_what_is_free()
    dist.barrier()
    began = time.perf_counter()
    with HostMemory() as memory:
        model = megatron_mimo.from_pretrained(directory)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    parameters = list(dict.fromkeys(model.parameters()))
    return {
        "seconds": seconds,
        "growth": memory.peak - memory.before,
        "share": sum(one.numel() * one.element_size() for one in parameters),
        "largest_tensor": max(one.numel() * one.element_size() for one in parameters),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--directory", type=Path, default=None, help="of the checkpoint; a temporary one by default")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="imports from memory, after the one from the disk")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file for the figures of all ranks")
    args = parser.parse_args()
    megatron_mimo.initialize(tensor_model_parallel_size=args.tensor_parallel)
    told = [str(args.directory or tempfile.mkdtemp()) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(told, src=0)
    directory = Path(told[0])
    if not (directory / "config.json").is_file():
        make(directory, args.shape)
    dist.barrier()
    if dist.get_rank() == 0:
        drop_cached(directory)
    results = {"cold": imported(directory)}
    rounds = [imported(directory) for _ in range(args.rounds)]
    results |= {f"warm {number}": one for number, one in enumerate(rounds, 1)}
    of_all: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, results)
    if dist.get_rank() == 0:
        report(directory, of_all)
        if args.output is not None:
            args.output.write_text(json.dumps(of_all))
        if args.directory is None:
            shutil.rmtree(directory)
    megatron_mimo.shutdown()


def report(directory: Path, of_all: list[dict[str, dict[str, float]]]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    print(f"{device}, torch {torch.__version__}, {len(of_all)} ranks, files of {size / 1e9:.2f} GB")
    for name in of_all[0]:
        worst = max(of_all, key=lambda results: results[name]["seconds"])[name]
        print(
            f"{name}: {worst['seconds']:.2f} s; host memory grew by {worst['growth'] / 1e9:.3f} GB at its peak, for a "
            f"share of {worst['share'] / 1e9:.3f} GB"
        )


if __name__ == "__main__":
    main()
