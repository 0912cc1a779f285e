"""Start and end a run: process groups, device and random numbers, under ``torchrun`` or plain ``python``."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mimo.axes import Layout
from megatron_mimo.compat.cuda_on_cpu import cpu_backend_enabled, disable_cpu_backend, enable_cpu_backend
from megatron_mimo.compat.notices import Answered
from megatron_mimo.compat.torch import pretend_world
from megatron_mimo.draws import seed_draws
from megatron_mimo.exits import exit_on_error
from megatron_mimo.graphs import end_graphs
from megatron_mimo.run import Run, described, place_on_host
from megatron_mimo.torchrun import torchrun_number, under_torchrun, world_size

__all__ = ["Layout", "Run", "exit_on_error", "initialize", "shutdown"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Current:
    """The run in progress and what `shutdown` has to undo."""

    run: Run
    enabled_cpu_backend: bool
    world: dist.ProcessGroup | None


_current: _Current | None = None
_runs_started = 0
_torchrun_store: dist.Store | None = None
# Entered from `initialize` to `shutdown`.
_notices = Answered()

# Megatron and the decoders' draws add to the seed what tells one rank's from another's; torch takes 63 bits of it.
_SEEDS = 2**62
_LONGEST_TIMEOUT_S = 10**9


def initialize(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    *,
    seed: int = 1234,
    backend: str | None = None,
    timeout_s: float = 600.0,
    graph_safe_rng: bool = False,
) -> Run:
    """Gives the `Run` of this process: process groups built, device chosen, random numbers seeded.

    Under ``torchrun`` the world is what torchrun started; under plain ``python`` it is this one process. Sequence
    parallelism needs no axis of its own: set it in the model's configuration.

    Args:
        tensor_model_parallel_size: ranks that share each layer.
        pipeline_model_parallel_size: stages that the layers are cut into.
        virtual_pipeline_model_parallel_size: model chunks per stage, for the interleaved schedule. With two stages
            the model's configuration has to say ``overlap_p2p_comm=True, batch_p2p_comm=False``: next and previous
            stage are then the same rank, and Megatron's other schedule delivers messages to the wrong chunk.
        context_parallel_size: ranks that share each sequence.
        expert_model_parallel_size: ranks that share the experts of a layer.
        expert_tensor_parallel_size: ranks that share one expert; None: as `tensor_model_parallel_size`.
        seed: start of the random numbers. As in Megatron-Core, tensor-parallel ranks draw different numbers inside
            tensor-parallel regions and the same outside, data-parallel ranks draw the same, and pipeline stage ``p``
            starts from ``seed + 100 p``. What decoders draw in training differs over data-parallel ranks alone.
        backend: ``"nccl"``, ``"gloo"`` (with the CPU backend, even where there is a GPU), or None: NCCL where a GPU
            is available, otherwise gloo.
        timeout_s: how long a collective may take before it raises; at most 10**9.
        graph_safe_rng: keep Megatron's random numbers in generators that a CUDA graph can use, as `Trainer(graphs=...)`
            needs; without effect on the CPU.

    Returns:
        The run. Called again with the same arguments, the run in progress.

    Raises:
        TypeError: a size or the seed is not an int, or the timeout is no number.
        ValueError: a layout that does not fit the world, an unknown backend, NCCL without a GPU for this rank, a seed
            outside [0, 2**62), a timeout that is not positive, a variable of torchrun's that is no number; raised
            before any process group is built. Or other code has destroyed the process groups of the run in progress.
        RuntimeError: a run with other arguments is in progress, or somebody else has initialised torch.distributed.

    Example:
        >>> run = initialize(seed=7, backend="gloo")
        >>> run.world_size, run.device
        (1, device(type='cpu'))
        >>> shutdown()
    """
    global _current, _runs_started
    _check_seed(seed)
    _check_timeout(timeout_s)
    layout = Layout(
        world_size=world_size(),
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
    )
    if _current is not None:
        run = _current.run
        _check_groups(_current)
        asked = (layout, seed, backend or run.backend, graph_safe_rng)
        if asked == (run.layout, run.seed, run.backend, run.graph_safe_rng):
            return run
        raise RuntimeError(
            f"initialize: a run is in progress with {run.layout}, seed={run.seed}, backend={run.backend!r}; found "
            f"{layout}, seed={seed}, backend={backend!r}, graph_safe_rng={graph_safe_rng}. Call "
            "megatron_mimo.shutdown() first."
        )
    if dist.is_initialized():
        raise RuntimeError(
            "initialize: torch.distributed is initialised already, by other code than megatron_mimo. Remove that call: "
            "initialize() builds every process group itself."
        )
    local_rank = place_on_host()
    backend = _choose_backend(backend, local_rank)

    enabled_here = False
    if backend == "gloo":
        enabled_here = not cpu_backend_enabled()
        enable_cpu_backend(force=True)
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)

    _runs_started += 1
    _notices.__enter__()
    try:
        _join_world(backend, timeout_s)
        run = _build_groups(layout, device, seed, timeout_s, graph_safe_rng)
    except BaseException:
        _tear_down(enabled_here)
        raise
    _current = _Current(run, enabled_here, _world())
    logger.info("rank %d of %d on %s (%s): %s, seed %d", run.rank, run.world_size, device, backend, layout, seed)
    return run


@contextmanager
def pretended(layout: Layout, rank: int = 0) -> Iterator[Run]:
    """Within it, the `Run` of one rank of a layout without the others, on the CPU: collectives move nothing.

    Raises:
        RuntimeError: a run is in progress.
    """
    global _current
    if dist.is_initialized():
        raise RuntimeError("pretended: a run is in progress, expected none. Call megatron_mimo.shutdown() first.")
    enabled_here = not cpu_backend_enabled()
    enable_cpu_backend(force=True)
    _notices.__enter__()
    try:
        pretend_world(rank, layout.world_size)
        run = _build_groups(layout, torch.device("cpu"), 0, 600.0, False)
        _current = _Current(run, enabled_here, _world())
        yield run
    finally:
        _current = None
        _tear_down(enabled_here)


def current_run() -> Run:
    """The run in progress.

    Raises:
        RuntimeError: there is none.
    """
    if _current is None:
        raise RuntimeError("expected a run in progress, found none. Call megatron_mimo.initialize() first.")
    return _current.run


def shutdown() -> None:
    """Ends the run: process groups, random-number tracker and CPU backend are as before `initialize`.

    Every rank calls it; afterwards `initialize` may build another layout in the same process. Without effect when no
    run is in progress.
    """
    global _current
    if _current is None:
        return
    enabled_here = _current.enabled_cpu_backend
    _current = None
    _tear_down(enabled_here)


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an int, found {seed!r} of type {type(seed).__name__}.")
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed: expected a number in [0, 2**62), found {seed}. Give one that every rank gives alike.")


def _check_timeout(timeout_s: float) -> None:
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool):
        raise TypeError(
            f"timeout_s: expected a number of seconds, found {timeout_s!r} of type {type(timeout_s).__name__}."
        )
    if math.isnan(timeout_s) or not 0 < timeout_s <= _LONGEST_TIMEOUT_S:
        raise ValueError(
            f"timeout_s: expected seconds in (0, 10**9], found {timeout_s}. Give the time that the slowest collective "
            "may take, such as 600."
        )


def _world() -> dist.ProcessGroup | None:
    """The group of all ranks as torch has it now; None where there is none."""
    return dist.group.WORLD if dist.is_initialized() else None


def _check_groups(current: _Current) -> None:
    """Refuses to give a run whose process groups are gone."""
    # Not at the top of the file, as in `_build_groups`.
    from megatron.core import parallel_state

    if _world() is current.world and parallel_state.model_parallel_is_initialized():
        return
    raise ValueError(
        f"initialize: the run in progress with {current.run.layout} has lost its process groups: other code called "
        "torch.distributed.destroy_process_group() or megatron.core.parallel_state.destroy_model_parallel(). Call "
        "megatron_mimo.shutdown(), which ends a run, in its place; then initialize() builds new ones."
    )


def _choose_backend(backend: str | None, local_rank: int) -> str:
    """``"nccl"`` or ``"gloo"``, checked against the GPUs of this host."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if backend is None:
        backend = "nccl" if gpus else "gloo"
    if backend not in ("nccl", "gloo"):
        raise ValueError(f"backend: expected 'nccl', 'gloo' or None, found {backend!r}.")
    if backend == "nccl" and local_rank >= gpus:
        raise ValueError(
            f"backend: 'nccl' needs one GPU per rank, found {gpus} GPU(s) for local rank {local_rank}. Start fewer "
            "ranks on this host (torchrun --nproc-per-node), or pass backend='gloo' to run on the CPU."
        )
    return backend


def _join_world(backend: str, timeout_s: float) -> None:
    """Initialises torch.distributed for the world that torchrun started, or for this process alone."""
    global _torchrun_store
    timeout = timedelta(seconds=timeout_s)
    if not under_torchrun():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if _torchrun_store is None:
        _torchrun_store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    # A prefix for each run: torch names the keys of a new world like those of the one before it, and a rank would
    # read addresses of processes groups that are gone.
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"megatron_mimo/{_runs_started}", _torchrun_store),
        rank=torchrun_number("RANK", 0, 0),
        world_size=torchrun_number("WORLD_SIZE", 1, 1),
        timeout=timeout,
    )


def _build_groups(layout: Layout, device: torch.device, seed: int, timeout_s: float, graph_safe_rng: bool) -> Run:
    """Builds Megatron's process groups, seeds its random numbers and describes the result."""
    # Not at the top of the file: Megatron-Core warns about absent extensions when imported, and importing this
    # package says nothing.
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        get_cuda_rng_tracker,
        is_graph_safe_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
    )

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=dist.get_backend() != "fake",  # of `pretended`
    )
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    graph_safe = graph_safe_rng and device.type == "cuda"
    # A tracker of an earlier run stays, and is of its kind.
    other_kind = is_graph_safe_cuda_rng_tracker(get_cuda_rng_tracker()) != graph_safe
    torch.manual_seed(seed + 100 * pipeline_rank)
    model_parallel_cuda_manual_seed(
        seed + 100 * pipeline_rank, use_cudagraphable_rng=graph_safe, force_reset_rng=other_kind
    )
    seed_draws(seed, parallel_state.get_data_parallel_rank())
    return described(layout, device, seed, timeout_s, graph_safe_rng)


def _tear_down(disable_cpu: bool) -> None:
    """Undoes whatever part of `initialize` has happened."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    _notices.__exit__(None, None, None)
    end_graphs()
    parallel_state.destroy_model_parallel()
    get_cuda_rng_tracker().reset()
    if dist.is_initialized():
        dist.destroy_process_group()
    if disable_cpu:
        disable_cpu_backend()
