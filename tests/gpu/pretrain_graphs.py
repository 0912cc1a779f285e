"""What each rank of `test_pretrain_graphs.py` runs: Megatron's own loop, whose steps are replayed as one CUDA graph.

torchrun --nproc-per-node=N -m tests.gpu.pretrain_graphs DIRECTORY NAME      # one layout a process, see below
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.tensor_parallel import random

from tests.distributed.cases.pretrain_graphs import LAYOUTS, replayed

ALONE = {"one GPU": ["--global-batch-size", "2"]}


@contextmanager
def graph_safe() -> Iterator[None]:
    """Random numbers as in a process that trains once: a second run keeps what the first one made."""
    random.initialize_rng_tracker(use_cudagraphable_rng=True, force_reset=True)
    yield
    random.initialize_rng_tracker(force_reset=True)


def main(where: str, name: str) -> None:
    """Runs one layout: Megatron keeps the process groups of the first in a process."""
    replayed(Path(where), (ALONE | LAYOUTS)[name], graph_safe)
    if os.environ["RANK"] == "0":
        print(f"{name}: replayed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
