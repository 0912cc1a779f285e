"""The random numbers of a run in its checkpoint."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, is_graph_safe_cuda_rng_tracker


def random_state() -> dict:
    """States of torch's generators and of Megatron's tracker on this rank, as tensors."""
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        # A tracker that CUDA graphs can use holds generators.
        "tracker": {
            name: state.get_state() if isinstance(state, torch.Generator) else state
            for name, state in get_cuda_rng_tracker().get_states().items()
        },
    }


def set_random_state(state: dict) -> None:
    """Draws go on from what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tracker = get_cuda_rng_tracker()
    if is_graph_safe_cuda_rng_tracker(tracker):
        for name, kept in state["tracker"].items():
            if name not in tracker.get_states():
                tracker.add(name, len(tracker.seeds_))  # any seed: its state follows
            tracker.get_states()[name].set_state(kept)
    else:
        tracker.set_states(state["tracker"])
