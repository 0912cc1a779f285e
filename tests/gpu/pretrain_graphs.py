"""What each rank of `test_pretrain_graphs.py` runs: Megatron's own loop, whose steps are replayed as one CUDA graph.

torchrun --nproc-per-node=N -m tests.gpu.pretrain_graphs DIRECTORY [NAME ...]
"""

import os
import sys
from pathlib import Path
from unittest import mock

import megatron.training
from megatron.core.tensor_parallel import random

from tests.distributed.cases.pretrain import run_recipe
from tests.distributed.cases.pretrain_graphs import GRAPHS, LAYOUTS, RECIPE, STEPS, told_of_steps

ALONE = {"one GPU": ["--global-batch-size", "2"]}
EVALUATIONS = ["--eval-iters", "1", "--eval-interval", "2"]


def replayed(where: Path, name: str, layout: list[str]) -> str:
    """What the loop tells of its graphs, once it has logged what it logs without."""
    given, told = [*layout, *EVALUATIONS], []
    random.initialize_rng_tracker(force_reset=True)
    eager = run_recipe(where / name / "eager", *given, steps=STEPS, recipe=RECIPE)
    random.initialize_rng_tracker(use_cudagraphable_rng=True, force_reset=True)  # as in a process of its own
    with mock.patch.object(megatron.training, "print_rank_0", lambda text, *more: told.append(text)):
        graphed = run_recipe(where / name / "graphed", *given, *GRAPHS, steps=STEPS, recipe=RECIPE)
    assert told_of_steps(graphed) == told_of_steps(eager), (name, told_of_steps(graphed), told_of_steps(eager))
    (line,) = [text for text in told if text.startswith("training steps as one CUDA graph")]
    assert line.endswith(f": 1 captured, {STEPS - 1} replayed, 1 launched kernel by kernel"), (name, line)
    return line


def main(where: str, names: list[str]) -> None:
    known = LAYOUTS if int(os.environ["WORLD_SIZE"]) > 1 else ALONE
    for name in names or known:
        line = replayed(Path(where), name, known[name])
        if os.environ["RANK"] == "0":
            print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
