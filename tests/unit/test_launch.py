"""Runs start, end and start again in one process; layouts that do not fit are refused before anything is built."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo import exits
from megatron_mimo.compat.cuda_on_cpu import cpu_backend_enabled, disable_cpu_backend, enable_cpu_backend
from megatron_mimo.launch import Layout, exit_on_error, initialize, shutdown

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"world_size": 4, "tensor_model_parallel_size": 3}, "tensor_model_parallel_size"),
        ({"world_size": 2, "pipeline_model_parallel_size": 4}, "pipeline_model_parallel_size"),
        ({"world_size": 4, "tensor_model_parallel_size": 2, "context_parallel_size": 4}, "context_parallel_size"),
        ({"world_size": 4, "expert_model_parallel_size": 3}, "expert_model_parallel_size"),
        (
            {"world_size": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
            "expert_tensor_parallel_size",
        ),
        ({"world_size": 2, "virtual_pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=1"),
        ({"world_size": 2, "tensor_model_parallel_size": 0}, "tensor_model_parallel_size: expected at least 1"),
        ({"world_size": 2, "virtual_pipeline_model_parallel_size": -1}, "expected at least 1, found -1"),
    ],
)
def test_layouts_that_do_not_fit_name_the_argument_to_change(sizes: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Layout(**sizes)


@pytest.mark.parametrize("size", [2.0, "2", True])
def test_sizes_that_are_not_ints_are_refused(size) -> None:
    with pytest.raises(TypeError, match="context_parallel_size: expected an int"):
        Layout(world_size=2, context_parallel_size=size)


@given(*[st.integers(1, 4)] * 5)
def test_axes_of_a_layout_multiply_to_the_world(
    tensor: int, pipeline: int, context: int, data: int, expert: int
) -> None:
    world = tensor * pipeline * context * data
    if world % (expert * pipeline):
        return
    layout = Layout(world, tensor, pipeline, None, context, expert, expert_tensor_parallel_size=1)
    assert layout.data_parallel_size == data


def test_a_layout_that_does_not_fit_builds_nothing(no_run) -> None:
    with pytest.raises(ValueError, match="does not divide the world of 1 rank"):
        initialize(tensor_model_parallel_size=2)
    assert not dist.is_initialized()


def test_plain_python_is_a_world_of_one(no_run) -> None:
    run = initialize(backend="gloo")
    assert (run.world_size, run.rank, run.backend, run.device) == (1, 0, "gloo", torch.device("cpu"))
    assert run.groups.tp.size() == run.groups.dp.size() == run.groups.pp.size() == 1
    assert cpu_backend_enabled()


def test_initialize_again_gives_the_run_in_progress(no_run) -> None:
    run = initialize(backend="gloo", seed=5)
    assert initialize(backend="gloo", seed=5) is run
    assert initialize(seed=5) is run


@pytest.mark.parametrize("changes", [{"seed": 6}, {"expert_tensor_parallel_size": 1}])
def test_initialize_with_other_arguments_says_what_is_in_progress(no_run, changes: dict[str, int]) -> None:
    initialize(backend="gloo", seed=5)
    with pytest.raises(RuntimeError, match=r"in progress with Layout\(world_size=1.*shutdown\(\) first"):
        initialize(backend="gloo", **{"seed": 5} | changes)


def test_shutdown_leaves_nothing_behind_and_the_next_run_starts_from_its_seed(no_run) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    drawn = []
    for _ in range(2):
        initialize(backend="gloo", seed=3)
        with get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(4))
        shutdown()
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()
        assert not get_cuda_rng_tracker().get_states()
        assert not cpu_backend_enabled()
    assert torch.equal(*drawn)
    shutdown()


def test_a_cpu_backend_that_was_enabled_before_stays(no_run) -> None:
    enable_cpu_backend(force=True)
    try:
        initialize(backend="gloo")
        shutdown()
        assert cpu_backend_enabled()
    finally:
        disable_cpu_backend()


def test_unknown_backends_and_nccl_without_a_gpu_are_refused(no_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="found 'mpi'"):
        initialize(backend="mpi")
    with pytest.raises(ValueError, match=r"found 0 GPU\(s\) for local rank 0"):
        initialize(backend="nccl")
    assert not dist.is_initialized()


def test_process_groups_of_other_code_are_refused_and_left_alone(no_run) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="initialised already, by other code"):
            initialize(backend="gloo")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 1.5}, TypeError, "seed: expected an int, found 1.5 of type float"),
        ({"seed": "1"}, TypeError, "seed: expected an int, found '1' of type str"),
        ({"seed": True}, TypeError, "seed: expected an int, found True"),
        ({"seed": None}, TypeError, "seed: expected an int, found None"),
        ({"seed": -1}, ValueError, r"seed: expected a number in \[0, 2\*\*62\), found -1"),
        ({"seed": 2**62}, ValueError, r"seed: expected a number in \[0, 2\*\*62\)"),
        ({"timeout_s": "60"}, TypeError, "timeout_s: expected a number of seconds, found '60' of type str"),
        ({"timeout_s": None}, TypeError, "timeout_s: expected a number of seconds, found None"),
        ({"timeout_s": 0}, ValueError, "timeout_s: expected seconds in .*found 0"),
        ({"timeout_s": -3.0}, ValueError, "timeout_s: expected seconds in .*found -3.0"),
        ({"timeout_s": float("nan")}, ValueError, "timeout_s: expected seconds in .*found nan"),
        ({"timeout_s": float("inf")}, ValueError, "timeout_s: expected seconds in .*found inf"),
    ],
)
def test_bad_seeds_and_timeouts_are_refused_before_anything_is_built(no_run, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        initialize(backend="gloo", **arguments)
    assert not dist.is_initialized()
    assert not cpu_backend_enabled()


@pytest.mark.parametrize("arguments", [{"seed": 0}, {"seed": 2**62 - 1}, {"timeout_s": 10**9}, {"timeout_s": 0.5}])
def test_the_ends_of_the_ranges_of_seed_and_timeout_work(no_run, arguments) -> None:
    assert initialize(backend="gloo", **arguments).seed == arguments.get("seed", 1234)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "two", "-1", "1.0"])
def test_variables_of_torchrun_that_are_no_numbers_are_named(no_run, monkeypatch, name: str, value: str) -> None:
    started = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for variable, number in (started | {name: value}).items():
        monkeypatch.setenv(variable, number)
    with pytest.raises(ValueError, match=f"environment variable {name}, found '{value}'.*torchrun"):
        initialize(backend="gloo")
    assert not dist.is_initialized()
    assert not cpu_backend_enabled()


def test_a_rank_outside_the_world_is_refused(no_run, monkeypatch) -> None:
    for variable, value in {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="RANK below WORLD_SIZE in the environment, found 2 and 2"):
        initialize(backend="gloo")


def _destroy_the_world() -> None:
    dist.destroy_process_group()


def _destroy_megatron_s_groups() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def _put_another_world_in_its_place() -> None:
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("destroy", [_destroy_the_world, _destroy_megatron_s_groups, _put_another_world_in_its_place])
@pytest.mark.parametrize("seed", [5, 6])
def test_a_run_whose_groups_somebody_destroyed_is_not_given_again(no_run, destroy, seed: int) -> None:
    initialize(backend="gloo", seed=5)
    destroy()
    with pytest.raises(ValueError, match=r"has lost its process groups.*Call megatron_mimo.shutdown\(\)"):
        initialize(backend="gloo", seed=seed)
    shutdown()
    assert initialize(backend="gloo", seed=seed).seed == seed


def test_megatron_s_notices_are_answered_from_initialize_to_shutdown(no_run) -> None:
    before = list(warnings.filters)
    deprecated = logging.getLogger("megatron.core.models.gpt.gpt_model")
    initialize(backend="gloo")
    assert len(warnings.filters) > len(before)
    assert not deprecated.filter(logging.makeLogRecord({"msg": "GPTModel IS DEPRECATED. GPTModel is only ..."}))
    assert deprecated.filter(logging.makeLogRecord({"msg": "GPTModel: something else"}))
    shutdown()
    assert warnings.filters == before
    assert not deprecated.filters


def test_a_failure_while_building_groups_is_undone(no_run, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    def fail(**sizes) -> None:
        raise OSError("no route")

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", fail)
    with pytest.raises(OSError, match="no route"):
        initialize(backend="gloo")
    assert not dist.is_initialized()
    assert not cpu_backend_enabled()


def test_with_one_rank_errors_propagate_out_of_exit_on_error(no_run) -> None:
    initialize(backend="gloo")
    with pytest.raises(ZeroDivisionError), exit_on_error():
        raise ZeroDivisionError
    with pytest.raises(SystemExit), exit_on_error():
        sys.exit(3)


@pytest.mark.parametrize(("error", "status"), [(SystemExit(0), None), (SystemExit(3), 1), (KeyboardInterrupt(), 1)])
def test_with_peers_only_success_leaves_exit_on_error(monkeypatch, error: BaseException, status: int | None) -> None:
    left: list[int] = []
    monkeypatch.setattr(exits, "_has_peers", lambda: True)
    monkeypatch.setattr(os, "_exit", left.append)
    if status is None:
        with pytest.raises(SystemExit), exit_on_error():
            raise error
    else:
        with exit_on_error():
            raise error
    assert left == ([] if status is None else [status])


_RANK = """
import time
import torch.distributed as dist
from megatron_mimo.launch import exit_on_error, initialize

run = initialize(backend="gloo")
with exit_on_error():
    dist.barrier()
    if run.rank == 1:
        raise ValueError("rank 1 saw a bad batch")
    dist.barrier()
    time.sleep(600)
"""


@pytest.mark.process
@pytest.mark.distributed
def test_a_rank_that_raises_takes_the_job_down_at_once(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.run(
        [*command, str(tmp_path / "rank.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        # A rank left waiting would wait for the ten minutes of the default timeout; starting takes most of this.
        timeout=240,
        check=False,
    )
    assert job.returncode != 0
    assert "rank 1 saw a bad batch" in job.stderr


@pytest.mark.process
def test_importing_the_package_prints_nothing_and_touches_no_cuda() -> None:
    program = (
        "import megatron_mimo, megatron_mimo.launch, megatron_mimo.compat.cuda_on_cpu, sys, torch;"
        "assert not torch.cuda.is_initialized();"
        "assert 'megatron.core' not in sys.modules"
    )
    job = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (job.returncode, job.stdout, job.stderr) == (0, "", "")
