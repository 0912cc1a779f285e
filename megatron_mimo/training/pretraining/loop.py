"""`megatron.training.pretrain`, from the installed wheel, with a `MimoModel`.

Megatron's arguments, optimizer, schedule, checkpoints, logging and signal handling serve as they are.
Replaced are the model provider, the forward step and the batches, by those that a script of one's own passes too.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from time import perf_counter
from typing import Any

import torch
from megatron.core.enums import ModelType

from megatron_mimo.compat.cuda_on_cpu import disable_cpu_backend, enable_cpu_backend
from megatron_mimo.compat.megatron_training import (
    compiled_dataset_helpers,
    evaluations_told,
    full_iterations_by,
    initialized_on_the_cpu,
    optimizer_config_by,
    saves_decided_by,
    train_step_by,
    with_printable_help,
)
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.launch import exit_on_error, initialize
from megatron_mimo.training.checkpoints import loop as checkpoints
from megatron_mimo.training.ema import Ema
from megatron_mimo.training.hooks import Hooks
from megatron_mimo.training.pretraining.arguments import ModelConfig, PartOverrides, add_mimo_args
from megatron_mimo.training.pretraining.checks import check_data_arguments
from megatron_mimo.training.pretraining.dataset import Recipe, check_recipe, dataset_provider
from megatron_mimo.training.pretraining.packs import LoopData
from megatron_mimo.training.pretraining.provider import forward_step, model_provider
from megatron_mimo.training.pretraining.session import Session, end_session, session_of, use_hooks
from megatron_mimo.training.pretraining.step_graphs import FullIterations, LoopSteps


def pretrain(recipe: Recipe, defaults: dict[str, object] | None = None) -> None:
    """Trains a recipe as the command line says; with Megatron's arguments and `add_mimo_args`'.

    Without a GPU it runs on gloo, on the CPU.

    Args:
        recipe: what is trained on what.
        defaults: Megatron's arguments that the command line need not give.

    Raises:
        ValueError: a layout that cannot work, an argument that would be ignored, a modality that the model
            does not have, no recipe, or a checkpoint to go on from in whose run other parts trained; before any
            process group is built.
    """
    check_recipe(recipe, data=False)
    hooks = Hooks(getattr(recipe, "callbacks", None), getattr(recipe, "further_losses", None))
    with adapt_megatron(recipe.model_config, hooks):
        # Importing these configures logging; importing megatron_mimo does not.
        from megatron.training import pretrain as megatron_pretrain
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        args = parse_and_validate_args(
            lambda parser: with_printable_help(add_mimo_args(parser)),
            # Batches are nested: Megatron's own loaders cannot collate them.
            args_defaults={"dataloader_type": "external", **(defaults or {})},
        )
        check_data_arguments(args)
        session = session_of(args)
        session.logs_throughput = True
        session.ask(recipe.model_config)  # what it refuses, it refuses before any process group is built
        check_recipe(recipe, data=args.data is None)
        provide = dataset_provider(recipe, args)
        with train_step_by(partial(_timed, session=session)):
            megatron_pretrain(
                pretrain_cfg_container_from_args(args),
                provide,
                ModelType.encoder_or_decoder,
                forward_step,
                partial(model_provider, recipe.model_config),
            )


@contextmanager
def adapt_megatron(model_config: ModelConfig, hooks: Hooks | None = None) -> Iterator[None]:
    """Within it `megatron.training` does for a `MimoModel` what it leaves no argument for.

    It follows --lr-factor, --weight-decay-factor and --train-embedding-rows, runs on gloo on the CPU
    where there is no GPU, trains from a wheel, and an exception on one rank ends the job. Arguments are
    to be parsed within it too. `pretrain` enters it by itself.

    Args:
        model_config: as the recipe's; says what the parts are called.
        hooks: callbacks and further losses of the run; None for none.

    Example:
        >>> with adapt_megatron(model_config):                                    # doctest: +SKIP
        ...     args = parse_and_validate_args(add_mimo_args)
        ...     megatron.training.pretrain(...)
    """

    def asked_for(args: Namespace) -> MimoModelConfig:
        return session_of(args).ask(model_config).model

    def told(train_step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: session_of(_running_args()).telling.step_by(train_step)(*given, **named)

    def saving(decide: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: session_of(_running_args()).telling.saving_by(decide)(*given, **named)

    with exit_on_error(), ExitStack() as until_trained:
        use_hooks(hooks or Hooks())
        until_trained.callback(end_session)
        if not torch.cuda.is_available():
            enable_cpu_backend()
            until_trained.callback(disable_cpu_backend)
            until_trained.enter_context(initialized_on_the_cpu(_initialize_cpu))
        until_trained.enter_context(optimizer_config_by(lambda ask: PartOverrides(ask, asked_for)))
        until_trained.enter_context(train_step_by(told))
        until_trained.enter_context(evaluations_told(_evaluated))
        until_trained.enter_context(saves_decided_by(saving))
        until_trained.enter_context(full_iterations_by(lambda theirs: FullIterations(_steps_of)))
        until_trained.enter_context(compiled_dataset_helpers())
        until_trained.enter_context(checkpoints.adapted(lambda: asked_for(_running_args()), _data, _ema))
        yield


def _data() -> LoopData:
    """Where the data of the run in progress is."""
    return session_of(_running_args()).data


def _ema() -> Ema | None:
    """Averages of the weights of the run in progress."""
    return session_of(_running_args()).ema


def _steps_of(schedule: Callable[..., Any]) -> LoopSteps:
    """What runs the steps of the run in progress."""
    return session_of(_running_args()).steps_of(schedule)


def _evaluated(prefix: str, iteration: int, losses: dict[str, Any]) -> None:
    """Tells of an evaluation, but of one on the test set."""
    if not prefix.endswith("on test set"):
        session_of(_running_args()).telling.evaluated(iteration, losses)


def _running_args() -> Namespace:
    """Megatron's arguments of the run in progress."""
    from megatron.training import get_args

    return get_args()


def _timed(train_step: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Megatron's training step, which itself tells nobody how fast it was."""

    @wraps(train_step)
    def timed_step(*given: Any, **named: Any) -> Any:
        started = perf_counter()
        outcome = train_step(*given, **named)
        session.stepped(perf_counter() - started)
        return outcome

    return timed_step


def _initialize_cpu(args: Namespace) -> None:
    """Process groups, which Megatron's own set-up builds only where there is a GPU."""
    initialize(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        args.context_parallel_size,
        args.expert_model_parallel_size,
        args.expert_tensor_parallel_size,
        seed=args.seed,
        backend="gloo",
        timeout_s=60.0 * args.distributed_timeout_minutes,
        graph_safe_rng=args.cuda_graph_impl != "none",
    )
