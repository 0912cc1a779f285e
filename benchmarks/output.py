"""What the output half costs: a training step that also routes rows to a decoder, beside one that does not.

    python -m benchmarks.output                  # 1.2 B at S 4096 on a GPU; a toy size on the CPU
    python -m benchmarks.output --runs 20 --output out/output.json

Both steps are the same `MimoModel` step on the same tokens (forward, loss, backward, AdamW). One model has no
generation tokens; the other routes a share of its positions and adds a loss term of a decoder that does nothing but
add its rows up, so that no decoder's own work is counted. Measured in two ways:

- `step`: the two steps take turns; their difference is the output half as it lies in a step, and about as large as
  the noise.
- `alone`: place, route, loss terms and total, forward and backward, on given hidden states, queued behind other work
  so that the device's time shows and not the host's. All of `place` is counted, which text needs in part as well.

Attention is torch's fused one: Megatron's own without TransformerEngine is slow, which would flatter the share.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import megatron_mimo
from megatron_mimo import MimoModel, specs
from megatron_mimo.decoders import Decoder
from megatron_mimo.losses import LossTerm
from megatron_mimo.plan import Plan
from megatron_mimo.sharding import sequence_shard

GENERATION = 7
SPAN = 64  # generation tokens of one image


@dataclass(frozen=True)
class Size:
    """A language model and a microbatch of one sample."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    length: int
    share: float  # of the positions that generate

    @property
    def rows(self) -> int:
        return round(self.share * self.length / SPAN) * SPAN


GPU = Size(layers=24, hidden=2048, heads=16, vocabulary=50304, length=4096, share=0.5)
CPU = Size(layers=2, hidden=128, heads=4, vocabulary=512, length=256, share=0.5)


class RowSum(Decoder):
    """The least a decoder can do: one pass over its rows."""

    def num_rows(self, targets) -> int:
        return targets["target"].shape[0]

    def loss(self, rows, targets) -> LossTerm:
        return LossTerm(rows.sum(dtype=torch.float32), rows.new_full((), rows.shape[0], dtype=torch.float32))


def build(size: Size, dtype: torch.dtype, device: torch.device, generates: bool) -> MimoModel:
    config = TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        calculate_per_token_loss=True,
    )
    layers = specs.with_fused_attention(specs.language_layer_spec(config, backend="torch"))
    language = ModuleSpec(
        module=GPTModel,
        params=dict(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=size.vocabulary,
            max_sequence_length=size.length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
        ),
    )
    images = ModuleSpec(
        module=megatron_mimo.VisionModalitySubmodules,
        submodules={"decoders": {"sum": ModuleSpec(module=RowSum, params=dict(width=size.hidden))}},
    )
    model = MimoModel(
        megatron_mimo.MimoModelConfig(
            language_model=language,
            modality_submodules={"images": images} if generates else {},
            generation_token_ids={"images": GENERATION} if generates else {},
        )
    )
    return model.to(device)


class Problem:
    """Both models on one batch. They share their weights, gradients and optimizer."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.device = size, device
        self.models = {
            "text alone": build(size, dtype, device, generates=False),
            "with output": build(size, dtype, device, generates=True),
        }
        self.models["with output"].language_model = self.models["text alone"].language_model
        self.optimizer = torch.optim.AdamW(self.models["with output"].parameters(), lr=1e-5)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(GENERATION + 1, size.vocabulary, (1, size.length), generator=draw)
        spans = ids.view(-1, SPAN)
        spans[torch.randperm(len(spans), generator=draw)[: size.rows // SPAN]] = GENERATION
        self.ids = ids.to(device)
        self.tokens = dict(input_ids=self.ids, labels=self.ids.roll(-1, 1))
        target = torch.zeros(size.rows, 1, device=device)
        self.targets = {"images": {"sum": {"target": target}}}
        self.hidden = torch.randn(size.length, 1, size.hidden, dtype=dtype, device=device, requires_grad=True)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.models["text alone"].parameters())

    def step(self, name: str) -> None:
        """One training step."""
        model = self.models[name]
        given = {"modality_targets": self.targets} if name == "with output" else {}
        outputs, loss_mask = model(**self.tokens, **given)
        megatron_mimo.total_loss(megatron_mimo.loss_terms(outputs, loss_mask)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def alone(self) -> Tensor:
        """The output half by itself: gives the gradient of the hidden states."""
        model = self.models["with output"]
        targets = model.prepare(self.targets)
        shard = sequence_shard(self.ids.shape[1], device=self.ids.device)
        plan = Plan(1, model.place(self.ids).bound(), shard, self.ids, self.ids, None, {"images": self.size.rows})
        outputs = model.decode_losses(self.hidden, model.route(self.hidden, plan), targets, plan)
        terms = {f"images/{name}": term for name, term in outputs.modalities["images"].losses.items()}
        return torch.autograd.grad(megatron_mimo.total_loss(terms, model.loss_weights), self.hidden)[0]


def clock(call: Callable[[], object], device: torch.device, ahead: Callable[[], object]) -> float:
    """Seconds of one call on the device, queued behind `ahead`."""
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    ahead()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def busy_work(device: torch.device) -> Callable[[], object]:
    """Device work long enough for the host to queue the output half behind it: some 10 ms on an H100."""
    if device.type == "cpu":
        return lambda: None
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return lambda: [matrix @ matrix for _ in range(8)]


def quantiles(seconds: list[float]) -> dict[str, float]:
    """p20, median and p80 in milliseconds."""
    seconds = sorted(seconds)
    p20, p80 = (seconds[min(int(len(seconds) * q), len(seconds) - 1)] for q in (0.2, 0.8))
    return {"p20": p20 * 1e3, "median": statistics.median(seconds) * 1e3, "p80": p80 * 1e3}


def measure(problem: Problem, runs: int) -> dict:
    device = problem.device
    ahead = busy_work(device)
    calls = {
        "text alone": lambda: problem.step("text alone"),
        "with output": lambda: problem.step("with output"),
        "output half alone": problem.alone,
    }
    for call in calls.values():
        for _ in range(3):
            call()
    clocks: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):  # in turns, so that whatever else the machine does hits all alike
        for name, call in calls.items():
            clocks[name].append(clock(call, device, ahead))
    step = statistics.median(clocks["text alone"])
    pairs = [b - a for a, b in zip(clocks["text alone"], clocks["with output"])]
    return {
        "milliseconds": {name: quantiles(seconds) for name, seconds in clocks.items()},
        "share_alone": statistics.median(clocks["output half alone"]) / step,
        "share_of_difference": statistics.median(pairs) / step,
    }


def waits_for_device(problem: Problem) -> str | None:
    """What torch says of the first host sync in a step with the output half, None where there is none."""
    if problem.device.type == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.step("with output")
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.5, help="of the positions that generate")
    parser.add_argument("--output", type=Path, default=Path("out/output.json"))
    arguments = parser.parse_args()
    run = megatron_mimo.initialize(seed=1)
    size = replace(GPU if run.device.type == "cuda" else CPU, share=arguments.share)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    problem = Problem(size, dtype, run.device)
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine()
    result = {
        "environment": {"device": name, "torch": torch.__version__},
        "size": asdict(size) | {"rows": size.rows, "parameters": problem.parameters},
        **measure(problem, arguments.runs),
        "host_sync": waits_for_device(problem),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    megatron_mimo.shutdown()


if __name__ == "__main__":
    main()
