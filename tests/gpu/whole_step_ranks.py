"""What each of the two ranks of `test_whole_step_ranks.py` runs: a step as one CUDA graph on layouts of two GPUs.

torchrun --nproc-per-node=2 -m tests.gpu.whole_step_ranks [NAME ...]
"""

import sys
import time

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from megatron_mimo.launch import Run
from megatron_mimo.training import StepGraphs, Trainer, TrainerSettings
from tests import tiny
from tests.distributed.cases.graphs import CONTEXT, EXPERTS, assert_replayed, microbatches
from tests.distributed.cases.training import INTERLEAVED, PIPELINE, TENSOR

#: Name -> axes, and options of `assert_replayed`; replays are eager steps bit by bit.
EXACT: dict[str, tuple[dict[str, int], dict]] = {
    "dp2": ({}, {}),
    "dp2-overlap": ({}, {"overlap": True}),
    "dp2-shared-states": ({}, {"overlap": True, "distributed": True}),
    "tp2": (TENSOR, {}),
    "cp2": (CONTEXT, {}),
    "pp2": (PIPELINE, {}),
    "pp2-mean": (PIPELINE, {"calculate_per_token_loss": False}),
    "pp2-vpp2": (INTERLEAVED, {}),
    "tp2-mtp": (TENSOR, {"further_tokens": True}),
    "experts": ({}, EXPERTS),
    "ep2": ({"expert_model_parallel_size": 2}, EXPERTS),
}
#: The program ends without `shutdown`, while the graphs are there.
UNENDED = "dp2-unended"
#: Of a sequence that two ranks share.
LONG = 2048


def trainer(run: Run, graphs: StepGraphs | None) -> Trainer:
    """Attention of TransformerEngine, over a sequence that two ranks share."""
    config = tiny.language_config(kv_channels=64, bf16=True, params_dtype=torch.bfloat16, **CONTEXT)
    return Trainer(
        tiny.mimo_config(tiny.language_spec(config, max_sequence_length=LONG)),
        run,
        TrainerSettings(steps=8, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=1e-4),
        graphs=graphs,
    )


def shared_attention(run: Run) -> None:
    """Its backward pass adds up in any order, so that replays are the eager steps but for rounding."""
    eager, graphed = trainer(run, None), trainer(run, StepGraphs())
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    for step in range(8):
        data = lambda at, rank, size: microbatches(at, rank, size, LONG)  # noqa: E731
        expected, found = (each.train_step(data) for each in (eager, graphed))
        assert dict(found.losses) == pytest.approx(dict(expected.losses), rel=1e-2), step
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=5e-2), step
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 6, 2)


def main(names: list[str]) -> None:
    for name in names or [*EXACT, "cp2-attention", UNENDED]:
        axes, changes = (CONTEXT, {}) if name == "cp2-attention" else EXACT[name.replace(UNENDED, "dp2")]
        began = time.perf_counter()
        run = megatron_mimo.initialize(**axes, seed=1, graph_safe_rng=True)
        if name == "cp2-attention":
            shared_attention(run)
        else:
            assert_replayed(run, warmup=2, **changes)
        rank = run.rank
        if name != UNENDED:
            megatron_mimo.shutdown()
        if rank == 0:
            print(f"{name}: replayed, {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
