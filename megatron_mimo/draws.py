"""Random draws of training (diffusion time, noise, dropped conditions) that every rank agrees on.

The draws belong to the data-parallel rank's microbatch: its tensor-, context- and pipeline-parallel
ranks make the same ones, other data-parallel ranks make others. Megatron's RNG tracker holds their
state, so a checkpoint that stores the tracker's states resumes them where they stopped, and a
recomputed activation cannot repeat them (they are made before the recomputed region).

One named state, `STATE`, is seeded per data-parallel rank and never advanced. Every *stream*, one
per decoder and purpose, gets a state of its own derived from it at first use. So the order in which
decoders draw, or that a pipeline stage holds only some of them, changes nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STATE = "mimo-draws"
_TRACKER_MODULE = "megatron.core.tensor_parallel.random"

# Megatron seeds its own states at seed + {0, 1024, 2718} + 100 * rank; a distance no such
# sum reaches keeps the tracker from refusing ours as already used.
_SEED_DISTANCE = 1_000_003


def seed_draws(seed: int, data_parallel_rank: int) -> None:
    """Adds the state that training draws come from to Megatron's RNG tracker.

    Call it once, after `model_parallel_cuda_manual_seed` (which empties the tracker), with the same
    `seed` on every rank. `megatron_mimo.initialize` does. No collective.

    Args:
        seed: the run's seed.
        data_parallel_rank: this rank's index along the data-parallel axis, context parallelism
            not counted: ranks of one context-parallel group share their draws.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    get_cuda_rng_tracker().add(STATE, seed + _SEED_DISTANCE + data_parallel_rank)


def restart_draws(seed: int, step: int, microbatch: int) -> None:
    """Starts every stream anew, as `seed`, step and microbatch say: what is drawn does not depend on the past.

    A training loop calls it before each microbatch on every rank. A resumed run then draws what an
    unbroken one does (Megatron's checkpoints keep one data-parallel rank's tracker for all of them),
    and another number of data-parallel ranks what one rank does. No collective. Without effect where
    `seed_draws` never was: a single process then draws from torch.

    Args:
        seed: as in `seed_draws`.
        step: the training step about to run.
        microbatch: its number among those of the step on all data-parallel ranks.
    """
    tracker = _seeded_tracker()
    if tracker is None:
        return
    kept = {
        name: state
        for name, state in tracker.get_states().items()
        if name != STATE and not name.startswith(f"{STATE}/")
    }
    tracker.set_states(kept)
    # The tracker remembers seeds to refuse one that is used twice; a microbatch that runs again would be.
    tracker.seeds_.clear()
    digest = hashlib.sha256(f"{seed}/{step}/{microbatch}".encode()).digest()
    tracker.add(STATE, int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def draws(stream: str) -> Iterator[None]:
    """A context whose random numbers come from `stream` of the tracker's `STATE`.

    Without an RNG tracker that knows `STATE`, in a single process, the numbers come from torch's
    default generator.

    Args:
        stream: what the numbers are for, e.g. `"images/pixels/noise"`.

    Raises:
        RuntimeError: several ranks run and `STATE` was never seeded: their draws would be equal
            where they must differ, or differ where they must be equal.

    Example:
        >>> with draws("images/pixels/noise"):
        ...     noise = torch.randn(4, 8)
    """
    tracker = _seeded_tracker()
    if tracker is None:
        yield
        return
    name = f"{STATE}/{stream}"
    if name not in tracker.get_states():
        tracker.add(name, _stream_seed(tracker.get_states()[STATE], stream))
    with tracker.fork(name):
        yield


def _seeded_tracker():
    """Megatron's RNG tracker if it holds `STATE`, else None in a single process."""
    module = sys.modules.get(_TRACKER_MODULE)
    tracker = module.get_cuda_rng_tracker() if module is not None else None
    if tracker is not None and STATE in tracker.get_states():
        return tracker
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            f"Megatron's RNG tracker has no state {STATE!r}, so the ranks' time and noise draws are "
            "not coordinated. Call megatron_mimo.initialize(), or after Megatron's own seeding "
            "megatron_mimo.draws.seed_draws(seed, data_parallel_rank)."
        )
    return None


def _stream_seed(state: torch.Tensor | torch.Generator, stream: str) -> int:
    """Seed of a stream: the digest of the base state and the stream's name, as 63 bits."""
    # A CUDA-graph-safe tracker stores generators; the state tensor itself always lies on the host.
    state_bytes = state.get_state() if isinstance(state, torch.Generator) else state
    digest = hashlib.sha256(state_bytes.numpy().tobytes() + stream.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
