"""Alignment against its peers, in one process and on the same tensors: time, memory floor, peak memory.

    python -m benchmarks.align                        # every size; on the CPU if there is no GPU
    python -m benchmarks.align --sizes small --runs 200 --output out/align.json

Peers: Megatron-Core's `MimoModel.align_embeddings_by_token_positions` with its text lookup, from the installed
wheel; full lookup and `masked_scatter`, as Hugging Face models do it; full lookup and `index_copy_` at given
indices. Ours with the plan given, and with the plan built on the device. All of them give the same [S, B, H] rows,
which is checked before anything is timed.

On a GPU a call is timed with CUDA events in two states: `busy`, queued behind half a millisecond of other work (which
clears the L2 cache too), as in the middle of a step, so that host time shows only where the host waits for the device;
and `idle`, on an empty queue, so that every launch shows. The floor is the bytes that must move, each once, over the
copy bandwidth that this device reaches here. Under sequence and context parallelism one of four ranks is measured,
its collectives replaced by torch's fake process group, which allocates and moves nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_mimo.align import align
from megatron_mimo.placement import build_placement
from megatron_mimo.sharding import sequence_shard

logger = logging.getLogger(__name__)

SPAN = 64  # positions of one image
BUSY_CYCLES = 1_000_000  # half a millisecond: longer than the host takes for any call that does not wait
RANKS = 4  # of the sequence- and context-parallel measurements


@dataclass(frozen=True)
class Size:
    """One problem: B samples of S positions, H wide, a vocabulary of V, a share of the positions images."""

    name: str
    batch: int
    length: int
    hidden: int
    vocabulary: int
    share: float
    modalities: int
    dtype: str = "bfloat16"


GPU_SIZES = [
    Size(f"{name}, {label}, {modalities} mod.", *shape, share, modalities)
    for name, shape in {
        "large": (2, 8192, 4096, 128256),
        "small": (1, 4096, 2048, 50304),
        "long": (1, 131072, 4096, 128256),
    }.items()
    for label, share in {"half": 0.5, "tenth": 0.1}.items()
    for modalities in (1, 3)
]
CPU_SIZES = [
    Size(f"cpu, {label}, {modalities} mod.", 1, 8192, 1024, 50304, share, modalities, "float32")
    for label, share in {"half": 0.5, "tenth": 0.1}.items()
    for modalities in (1, 3)
]


class Problem:
    """The tensors of one size, and every contender on them.

    Args:
        size: the size.
        device: where the tensors live.
        group: the tensor-parallel group of the embedding.
        sequence_parallel: whether the sequence is split over `group`.
        cp_size: how many context-parallel ranks split the sequence; this is rank 0.
    """

    def __init__(
        self,
        size: Size,
        device: torch.device,
        group: dist.ProcessGroup,
        sequence_parallel: bool = False,
        cp_size: int = 1,
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self.size, self.device, self.group, self.sequence_parallel = size, device, group, sequence_parallel
        self.dtype = getattr(torch, size.dtype)
        self.special = {f"modality{k}": -200 - k for k in range(size.modalities)}
        self.ids = self._ids(draw).to(device)
        self.embedding = self._embedding()
        self.tables = {
            name: torch.randn(int((self.ids == token).sum()), size.hidden, dtype=self.dtype, device=device)
            for name, token in self.special.items()
        }
        self.shard = sequence_shard(
            size.length,
            cp_size=cp_size,
            tp_size=group.size() if sequence_parallel else 1,
            device=device,
        )
        self.placement = self.place(self.ids.cpu()).to(device)
        self.adapter = self._adapter(cp_size)

    def _ids(self, draw: torch.Generator) -> Tensor:
        """int64 [B, S]: text ids at random, a share of the spans special tokens, modality after modality."""
        size = self.size
        ids = torch.randint(0, size.vocabulary, (size.batch, size.length), generator=draw)
        spans = ids.view(size.batch, -1, SPAN)
        for sample in spans:
            chosen = torch.randperm(len(sample), generator=draw)[: round(size.share * len(sample))]
            for number, span in enumerate(chosen.sort().values):
                sample[span] = -200 - number % size.modalities
        return ids

    def _embedding(self):
        from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=1,
            hidden_size=self.size.hidden,
            num_attention_heads=RANKS,
            hidden_dropout=0.0,
            params_dtype=self.dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
            tensor_model_parallel_size=self.group.size(),
            sequence_parallel=self.sequence_parallel,
        )
        # The peer insists that the embedding does not scatter by itself.
        embedding = LanguageModelEmbedding(
            config,
            self.size.vocabulary,
            self.size.length,
            position_embedding_type="rope",
            scatter_to_sequence_parallel=False,
            tp_group=self.group,
        ).to(self.device)
        torch.nn.init.normal_(embedding.word_embeddings.weight)
        return embedding

    def _adapter(self, cp_size: int):
        from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig

        if cp_size == 1 and not self.sequence_parallel:
            return None
        return PartitionAdapter(
            PartitionConfig(
                seq_parallel=self.sequence_parallel,
                use_cp=cp_size > 1,
                tp_comm_overlap=False,
                max_seq_len=self.size.length,
                cp_group=dist.group.WORLD if cp_size > 1 else None,
                tp_group=self.group,
            )
        )

    @property
    def weight(self) -> Tensor:
        return self.embedding.word_embeddings.weight

    def inputs(self, frozen: bool) -> list[Tensor]:
        """What the gradient is asked of; sets `requires_grad` accordingly."""
        self.weight.requires_grad_(not frozen)
        for table in self.tables.values():
            table.requires_grad_()
        return [*self.tables.values(), *([] if frozen else [self.weight])]

    # The contenders

    def place(self, ids: Tensor):
        return build_placement(ids, self.special, vocabulary_size=self.size.vocabulary)

    def ours(self, placement=None) -> Tensor:
        return align(
            self.embedding,
            self.ids,
            None,
            self.tables,
            placement or self.placement,
            self.shard,
            self.group,
            self.sequence_parallel,
        )

    def ours_with_plan(self) -> Tensor:
        return self.ours(self.place(self.ids))

    @cached_property
    def _upstream(self):
        """Megatron-Core's model, as far as its alignment looks at it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.models.mimo import MimoModel

        language_model = SimpleNamespace(embedding=self.embedding)
        return MimoModel, SimpleNamespace(language_model=language_model, partition_adapter=self.adapter)

    def megatron(self) -> Tensor:
        upstream, model = self._upstream
        text = upstream.get_text_embeddings(model, self.ids, None, self.special)
        rows = upstream.align_embeddings_by_token_positions(
            model, {**self.tables, "text": text}, self.ids, self.special
        )
        return rows if self.adapter is None else self.adapter.shard(rows, None, None)[0]

    def masked_scatter(self) -> Tensor:
        outside = (self.ids < 0) | (self.ids >= self.size.vocabulary)
        rows = F.embedding(self.ids.masked_fill(outside, 0), self.weight)
        for name, token in self.special.items():
            mask = (self.ids == token).unsqueeze(-1).expand_as(rows)
            rows = rows.masked_scatter(mask, self.tables[name])
        return rows.transpose(0, 1).contiguous()

    @cached_property
    def _indices(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Text ids in range, and each modality's rows of the flattened [S, B], made ahead of the timing."""
        ids = self.ids.t().contiguous()
        order = torch.arange(self.size.batch * self.size.length, device=self.device)
        order = order.view(self.size.batch, self.size.length) % self.size.length * self.size.batch + (
            torch.arange(self.size.batch, device=self.device).unsqueeze(1)
        )
        return ids.clamp(min=0), {name: order[self.ids == token] for name, token in self.special.items()}

    def index_copy(self) -> Tensor:
        ids, indices = self._indices
        rows = F.embedding(ids, self.weight)
        for name, index in indices.items():
            rows.view(-1, self.size.hidden).index_copy_(0, index, self.tables[name])
        return rows

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "megatron-core": self.megatron,
            "masked_scatter": self.masked_scatter,
            "index_copy": self.index_copy,
            "ours": self.ours,
            "ours + plan": self.ours_with_plan,
        }

    # Bytes that must move, each once

    def forward_bytes(self) -> int:
        """Distinct text rows and modality rows read, every output row written, the plan read."""
        row = self.size.hidden * self.dtype.itemsize
        text = int(torch.unique(self.ids[self.ids >= 0]).numel())
        modality = sum(table.shape[0] for table in self.tables.values())
        plan = self.ids.numel() * (8 + 4 + 4)
        return (text + modality + self.ids.numel()) * row + plan

    def table_gradient_bytes(self) -> int:
        """Modality rows' gradient read and written."""
        row = self.size.hidden * self.dtype.itemsize
        return sum(table.shape[0] for table in self.tables.values()) * (2 * row + 4)

    def vocabulary_gradient_bytes(self) -> int:
        """Text rows' gradient read, the dense gradient written."""
        row = self.size.hidden * self.dtype.itemsize
        return (int((self.ids >= 0).sum()) + self.size.vocabulary) * row


# Measuring


Calls = dict[str, Callable[[], object]]


def times(calls: Calls, device: torch.device, runs: int, state: str = "busy") -> dict[str, list[float]]:
    """Seconds of each run of each call. On the CPU the calls take turns: whatever else runs there hits them alike."""
    clocks: dict[str, list[float]] = {name: [] for name in calls}
    clock = _gpu_clock(device, state) if device.type == "cuda" else _cpu_seconds
    turns = 1 if device.type == "cuda" else runs
    for _ in range(turns):
        for name, call in calls.items():
            call()
            clocks[name] += [clock(call) for _ in range(runs // turns)]
    return clocks


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_clock(device: torch.device, state: str) -> Callable[[Callable[[], object]], float]:
    """A clock for one call in one state of the device; see the head of this file."""
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(call: Callable[[], object]) -> float:
        if state == "busy":
            cache.zero_()
            torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def summary(clocks: list[float]) -> dict[str, float]:
    """p20, median and p80 in microseconds."""
    clocks = sorted(clocks)
    p20, p80 = (clocks[min(int(len(clocks) * q), len(clocks) - 1)] for q in (0.2, 0.8))
    return {"p20": p20 * 1e6, "median": statistics.median(clocks) * 1e6, "p80": p80 * 1e6}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory held above what was held before, results included; None where torch does not count it."""
    if device.type == "cpu":
        return None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a plain copy of 1 GiB (64 MiB on the CPU)."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    clocks = times({"copy": lambda: target.copy_(source)}, device, 20)["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(clocks)


def forward_and_backward(forward: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], tuple]:
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def check_equal(problem: Problem) -> None:
    """Every contender's rows are bitwise ours, and its gradients ours to the dtype's rounding."""
    inputs = problem.inputs(frozen=False)
    expected = problem.ours()
    grad = torch.randn_like(expected)
    ours = forward_and_backward(problem.ours, inputs, grad)()
    for name, forward in problem.contenders().items():
        assert torch.equal(forward(), expected), f"{name} gives other rows"
        theirs = forward_and_backward(forward, inputs, grad)()
        for a, b in zip(ours, theirs, strict=True):
            scale = b.abs().max()
            assert (a - b).abs().max() <= 2 * torch.finfo(b.dtype).eps * scale, f"{name} gives other gradients"
        del theirs


def measure(size: Size, device: torch.device, group: dist.ProcessGroup, bandwidth: float, runs: int) -> Iterator[dict]:
    """One record for each contender and pass."""
    problem = Problem(size, device, group)
    check_equal(problem)
    forward_floor = problem.forward_bytes() / bandwidth
    frozen_floor = forward_floor + problem.table_gradient_bytes() / bandwidth
    floors = {
        "forward": forward_floor,
        "forward + backward, table frozen": frozen_floor,
        "forward + backward": frozen_floor + problem.vocabulary_gradient_bytes() / bandwidth,
    }
    states = ["busy", "idle"] if device.type == "cuda" else ["busy"]
    for stage, floor in floors.items():
        inputs = problem.inputs(frozen=stage.endswith("frozen"))
        grad = torch.randn_like(problem.ours())
        calls = {
            name: forward if stage == "forward" else forward_and_backward(forward, inputs, grad)
            for name, forward in problem.contenders().items()
        }
        clocks = {state: times(calls, device, runs, state) for state in states}
        for name, call in calls.items():
            yield {
                "size": size.name,
                "pass": stage,
                "contender": name,
                "floor_us": floor * 1e6,
                **{f"{state}_us": summary(clocks[state][name]) for state in states},
                "peak_bytes": peak_bytes(call, device),
            }


def measure_shards(device: torch.device) -> Iterator[dict]:
    """Peak memory of one rank of four at the long size; the collectives are fake."""
    size = next(size for size in GPU_SIZES if size.name.startswith("long, half, 1"))
    alone = dist.new_group([0])
    layouts = {
        f"SP {RANKS}": {"group": dist.group.WORLD, "sequence_parallel": True},
        f"CP {RANKS}": {"group": alone, "cp_size": RANKS},
    }
    for layout, settings in layouts.items():
        problem = Problem(size, device, **settings)
        inputs = problem.inputs(frozen=False)
        grad = torch.randn_like(problem.ours())
        for stage in ("forward", "forward + backward"):
            for name, forward in {"megatron-core": problem.megatron, "ours": problem.ours}.items():
                call = forward if stage == "forward" else forward_and_backward(forward, inputs, grad)
                yield {
                    "size": f"{size.name}, {layout}",
                    "pass": stage,
                    "contender": name,
                    "peak_bytes": peak_bytes(call, device),
                }
        del problem, inputs, grad
        torch.cuda.empty_cache()


# Reporting


def table(records: list[dict], state: str) -> str:
    """Markdown: one line a size and pass, times in microseconds, ours as a ratio to the peer and to the floor."""
    names = list(dict.fromkeys(record["contender"] for record in records))
    lines = [
        f"| size | pass | floor | {' | '.join(names)} | megatron-core / ours | ours / floor |",
        "|---|---|" + "---:|" * (len(names) + 3),
    ]
    for size, stage in dict.fromkeys((record["size"], record["pass"]) for record in records):
        of = {r["contender"]: r for r in records if (r["size"], r["pass"]) == (size, stage)}
        median = {name: record[f"{state}_us"]["median"] for name, record in of.items()}
        floor = of["ours"]["floor_us"]
        cells = [f"{floor:.0f}", *(f"{median[name]:.0f}" for name in names)]
        ratios = [f"{median['megatron-core'] / median['ours']:.1f}", f"{median['ours'] / floor:.2f}"]
        lines.append(f"| {size} | {stage} | {' | '.join(cells + ratios)} |")
    return "\n".join(lines)


def memory_table(records: list[dict]) -> str:
    """Markdown: peak extra memory in MiB, results included."""
    names = list(dict.fromkeys(record["contender"] for record in records))
    lines = [f"| size | pass | {' | '.join(names)} | ours / megatron-core |", "|---|---|" + "---:|" * (len(names) + 1)]
    for size, stage in dict.fromkeys((record["size"], record["pass"]) for record in records):
        of = {r["contender"]: r["peak_bytes"] for r in records if (r["size"], r["pass"]) == (size, stage)}
        cells = [f"{of[name] / 2**20:.0f}" if name in of else "" for name in names]
        lines.append(f"| {size} | {stage} | {' | '.join(cells)} | {of['ours'] / of['megatron-core']:.2f} |")
    return "\n".join(lines)


def environment(device: torch.device, bandwidth: float) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    import megatron.core

    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "copy_GB_per_s": bandwidth / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default="", help="only sizes whose name begins with this")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("out/align.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.filterwarnings("ignore", module="megatron")
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        get_cuda_rng_tracker().add("model-parallel-rng", 1)  # the peer's embedding draws its dropout there
    alone = dist.new_group([0])
    bandwidth = copy_bandwidth(device)
    facts = environment(device, bandwidth)
    print(json.dumps(facts))

    records: list[dict] = []
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    for size in sizes:
        if size.name.startswith(arguments.sizes):
            logger.info("measuring %s", size.name)
            records += measure(size, device, alone, bandwidth, arguments.runs)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    shards = list(measure_shards(device)) if device.type == "cuda" and "long".startswith(arguments.sizes) else []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": facts,
        "sizes": [asdict(size) for size in sizes],
        "records": records,
        "shards": shards,
    }
    arguments.output.write_text(json.dumps(result, indent=1))
    for state in ["busy", "idle"] if device.type == "cuda" else ["busy"]:
        print(f"\nmedian time in microseconds, {state if device.type == 'cuda' else 'wall clock'}\n")
        print(table(records, state))
    if device.type == "cuda":
        print("\npeak extra memory in MiB\n")
        print(memory_table(records + shards))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
