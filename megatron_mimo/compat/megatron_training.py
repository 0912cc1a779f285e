"""What `megatron.training` leaves no argument for, one function each: version, reason, what to do when it goes.

Checked by `tests/unit/test_compat.py` on the installed version; last read in Megatron-Core 0.19.2. Importing
`megatron.training` configures logging, so nothing of it is imported until a function is called.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def _replaced(owner: ModuleType, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Within it, a module's function is the given one."""
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def optimizer_config_by(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within it, Megatron takes the overrides of its parameter groups from ``wrap(its own function)(args)``.

    Undocumented: `megatron.training.training.get_megatron_optimizer_config`, `(args) -> (config, overrides)`, looked
    up in that module when the optimizer is set up.
    Reason: factors on the learning rate and the weight decay of parts; `pretrain` has no argument for overrides.
    When it goes: see what `setup_model_and_optimizer` hands to `get_megatron_optimizer`.
    """
    from megatron.training import training

    with _replaced(training, "get_megatron_optimizer_config", wrap(training.get_megatron_optimizer_config)):
        yield


def optimizer_config_function() -> Callable[..., Any]:
    """What Megatron takes the overrides of its parameter groups from now; see `optimizer_config_by`."""
    from megatron.training import training

    return training.get_megatron_optimizer_config


@contextmanager
def train_step_by(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within it, Megatron's loop trains by ``wrap(its own function)``, with that function's arguments.

    Undocumented: `megatron.training.training.train_step`, looked up in that module at every step.
    Reason: the loop tells nobody how long a step took and what was in it.
    When it goes: time `forward_backward_func` and the optimizer's step instead.
    """
    from megatron.training import training

    with _replaced(training, "train_step", wrap(training.train_step)):
        yield


@contextmanager
def full_iterations_by(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within it, Megatron's loop runs its schedules through ``wrap(its own class)(schedule, **options)`` with
    --cuda-graph-impl full_iteration, in training and in evaluations.

    Undocumented: `megatron.training.training.FullCudaGraphWrapper`, looked up in that module where the loop begins and
    in each evaluation; what it makes is called with the schedule's arguments, all by name.
    Reason: Megatron's knows one shape, and copies tensors of dicts and lists alone into what it replays.
    When it goes: wrap `get_forward_backward_func` of that module.
    """
    from megatron.training import training

    with _replaced(training, "FullCudaGraphWrapper", wrap(training.FullCudaGraphWrapper)):
        yield


def full_iteration_wrapper() -> Callable[..., Any]:
    """What Megatron's loop runs full iterations by now; see `full_iterations_by`."""
    from megatron.training import training

    return training.FullCudaGraphWrapper


def full_iteration_stream() -> Any:
    """The stream in which Megatron wraps models for full iterations, and in which they have to be captured.

    Undocumented: `megatron.core.full_cuda_graph.get_shared_capture_stream`.
    Reason: what autograd keeps of a parameter remembers the stream where DDP hooked it.
    When it goes: see in which stream `megatron.training.training.get_model` wraps chunks.
    """
    from megatron.core.full_cuda_graph import get_shared_capture_stream

    return get_shared_capture_stream()


@contextmanager
def compiled_dataset_helpers() -> Iterator[None]:
    """Within it, Megatron takes its dataset helpers as they are where they are compiled.

    Undocumented: `megatron.core.datasets.utils.compile_helpers`, which runs a Makefile.
    Reason: the wheel brings `helpers_cpp` compiled and lacks the Makefile, and Megatron then ends the process.
    When it goes: leave the context out.
    """
    from megatron.core.datasets import utils

    if find_spec("megatron.core.datasets.helpers_cpp") is None:
        yield
        return
    with _replaced(utils, "compile_helpers", lambda: None):
        yield


@contextmanager
def initialized_on_the_cpu(build_groups: Callable[[Namespace], object]) -> Iterator[None]:
    """Within it, `megatron.training` starts where there is no GPU.

    Undocumented: `megatron.training.training.initialize_megatron`, whose `allow_no_cuda` `pretrain` does not pass on
    and which then builds no process groups; `megatron.training.arguments.get_device_arch_version`, which asks CUDA.
    Reason: the same loop is tested on a laptop.
    When it goes: pass `allow_no_cuda=True` on where `pretrain` takes it.

    Args:
        build_groups: called with Megatron's arguments before it initialises the rest.
    """
    from megatron.training import arguments, get_args, training

    begin = training.initialize_megatron

    def initialize_megatron(**options: Any) -> Any:
        build_groups(get_args())
        return begin(allow_no_cuda=True, **options)

    with (
        _replaced(training, "initialize_megatron", initialize_megatron),
        # From this generation on nothing is asked of CUDA_DEVICE_MAX_CONNECTIONS.
        _replaced(arguments, "get_device_arch_version", lambda: 10),
    ):
        yield


def arguments_of_checkpoint(args: Namespace) -> tuple[str, Namespace | None]:
    """The checkpoint that Megatron will load for `args`, and the arguments that it holds; None where it holds none.

    Private: `megatron.training.checkpointing._load_base_checkpoint`, called as Megatron's own
    `load_args_from_checkpoint` calls it.
    Reason: that one changes the arguments that it is given; we want to look before anything is built.
    When it goes: `dist_checkpointing.load_common_state_dict` of the tracked iteration's directory has them too.
    """
    from megatron.training.checkpointing import _load_base_checkpoint

    # What reads a local checkpoint is built with the process groups; the one that it follows has the same arguments.
    kind = None if args.non_persistent_ckpt_type == "local" else args.non_persistent_ckpt_type
    found = Namespace(**vars(args) | {"non_persistent_ckpt_type": kind})
    state, path, release, _ = _load_base_checkpoint(args.load, found, rank0=True)
    return path, None if state is None or release else state.get("args")


def with_printable_help(parser: ArgumentParser) -> ArgumentParser:
    """`parser`, in whose help texts a percent sign that names no value is a percent sign.

    Private: `argparse.ArgumentParser._actions`, since Python 2.7.
    Reason: help texts of Megatron 0.19 hold bare percent signs, and `--help` then raises.
    When it goes: leave the call out once `pretrain --help` prints without it.
    """
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    return parser


@contextmanager
def evaluations_told(tell: Callable[[str, int, dict[str, Any]], None]) -> Iterator[None]:
    """Within it, Megatron's loop calls ``tell(prefix, iteration, losses)`` after each of its evaluations.

    Undocumented: `megatron.training.training.evaluate_and_print_results`, looked up in that module, whose first
    argument says which set it is on and whose fifth the iteration; and `evaluate`, which it calls and whose first
    value are the losses by name, empty before the last pipeline stage, or None where time was up.
    Reason: the loop prints its evaluations and tells nobody.
    When it goes: read the losses from its TensorBoard writer.
    """
    from megatron.training import training

    print_results, evaluate = training.evaluate_and_print_results, training.evaluate
    found: list[dict[str, Any] | None] = []

    def evaluate_kept(*given: Any, **named: Any) -> Any:
        outcome = evaluate(*given, **named)
        found.append(outcome[0])
        return outcome

    def evaluate_told(*given: Any, **named: Any) -> None:
        found.clear()
        print_results(*given, **named)
        prefix = named.get("prefix", given[0] if given else "")
        iteration = named.get("iteration", given[4] if len(given) > 4 else 0)
        if found and found[0] is not None:
            tell(prefix, iteration, found[0])

    with (
        _replaced(training, "evaluate", evaluate_kept),
        _replaced(training, "evaluate_and_print_results", evaluate_told),
    ):
        yield


@contextmanager
def saves_decided_by(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within it, Megatron's loop saves, and decides to end, by ``wrap(its own function)``, with its arguments.

    Undocumented: `megatron.training.training.checkpoint_and_decide_exit`, looked up in that module after each step, and
    after the evaluation where one was due; its fourth argument is the iteration.
    Reason: the loop saves at intervals alone, and tells nobody.
    When it goes: keep the best of the checkpoints that intervals give.
    """
    from megatron.training import training

    with _replaced(training, "checkpoint_and_decide_exit", wrap(training.checkpoint_and_decide_exit)):
        yield


def save_now(*given: Any, **named: Any) -> None:
    """Saves a checkpoint of this moment.

    Undocumented: `megatron.training.training.save_checkpoint_and_time`, whose arguments are those of
    `checkpoint_and_decide_exit`, the last one by its name alone.
    Reason: see `saves_decided_by`.
    When it goes: as there.

    Args:
        given, named: of `checkpoint_and_decide_exit`.
    """
    from megatron.training import training

    names = ("model", "optimizer", "opt_param_scheduler", "iteration", "num_floating_point_operations_so_far",
             "checkpointing_context", "train_data_iterator")  # fmt: skip
    training.save_checkpoint_and_time(**dict(zip(names, given)), **named)
