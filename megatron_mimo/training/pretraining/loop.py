"""`megatron.training.pretrain`, from the installed wheel, with a `MimoModel`.

Megatron's arguments, optimizer, schedule, checkpoints, logging and signal handling serve as they are.
Replaced are the model provider, the forward step and the batches. `script.py` has them for scripts that
call Megatron's `pretrain` themselves.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from time import perf_counter
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo.compat.checkpoints import checkpoints_by
from megatron_mimo.compat.cuda_on_cpu import disable_cpu_backend, enable_cpu_backend
from megatron_mimo.compat.megatron_training import (
    arguments_of_checkpoint,
    compiled_dataset_helpers,
    initialized_on_the_cpu,
    optimizer_config_by,
    train_step_by,
    with_printable_help,
)
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.order import microbatches_of
from megatron_mimo.data.step import Counts
from megatron_mimo.draws import STATE, seed_draws
from megatron_mimo.launch import exit_on_error, initialize
from megatron_mimo.layout import check_layout
from megatron_mimo.model import MimoModel
from megatron_mimo.training.checkpoints import loop as checkpoints
from megatron_mimo.training.checkpoints.saving import Trained, check_trained
from megatron_mimo.training.forward import ForwardStep
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.pretraining.arguments import add_mimo_args, control_from_args, layout_from_args, once_each
from megatron_mimo.training.speed.flops import PartSize, part_sizes
from megatron_mimo.training.speed.throughput import Throughput, log_to_megatron, peak_of_all

# Of Megatron's own datasets.
DATA_ARGUMENTS = (
    "data_path", "data_args_path", "per_split_data_args_path", "train_data_path", "valid_data_path", "test_data_path",
)  # fmt: skip

#: `(args) -> configuration`, as a recipe's.
ModelConfig = Callable[[Namespace], MimoModelConfig]


class Recipe(Protocol):
    """What is trained on what; a module with these functions is one."""

    def model_config(self, args: Namespace) -> MimoModelConfig:
        """The model, from Megatron's arguments. Needs no process group."""

    def datasets(self, args: Namespace, samples: Sequence[int | None]) -> tuple[Sequence | None, ...]:
        """Datasets to train, validate and test on, each of which gives a sample for an index.

        `samples` are the numbers of samples that the run will ask of each.
        """

    def collate(self, samples: Sequence) -> dict[str, object]:
        """Keyword arguments of `MimoModel.forward` for the samples of a microbatch, on the CPU."""


def check_recipe(recipe: object) -> None:
    """Refuses what lacks a recipe's functions.

    Raises:
        ValueError: naming those that are missing.
    """
    missing = [name for name in ("model_config", "datasets", "collate") if not callable(getattr(recipe, name, None))]
    if missing:
        raise ValueError(
            f"the recipe {getattr(recipe, '__name__', type(recipe).__name__)!r} lacks {missing}, expected functions "
            "model_config(args), datasets(args, samples) and collate(samples)."
        )


class ModelProvider:
    """`model_provider(pre_process, post_process, vp_stage, config, pg_collection)` as Megatron calls it.

    Args:
        config: of the model.
        args: Megatron's.
        control: which parts train.
    """

    def __init__(
        self,
        config: MimoModelConfig,
        args: Namespace,
        control: TrainingControl,
    ) -> None:
        self._config, self._args, self._control = config, args, control
        self._chunks: list[MimoModel] = []
        #: Of the whole model's parts, once every chunk of this rank is built.
        self.sizes: dict[str, PartSize] = {}

    def __call__(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> MimoModel:
        """The model of one stage, or of one chunk of an interleaved pipeline.

        The last chunk's call is collective over the pipeline-parallel group.

        Raises:
            ValueError: a `config` of the caller's: the recipe makes it.
        """
        model = build_stage(
            self._config, self._control, self._args.seed, pre_process, post_process, vp_stage, config, pg_collection
        )
        self._chunks.append(model)
        if len(self._chunks) == (self._args.virtual_pipeline_model_parallel_size or 1):
            self.sizes, self._chunks = part_sizes(self._chunks), []
        return model


def build_stage(
    model_config: MimoModelConfig,
    control: TrainingControl,
    seed: int,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    config: TransformerConfig | None,
    pg_collection: ProcessGroupCollection | None,
) -> MimoModel:
    """The model of one stage, or of one chunk, whose parts train as `control` says.

    Args:
        model_config: of the whole model.
        control: which parts train.
        seed: of the decoders' draws.
        pre_process, post_process, vp_stage, config, pg_collection: Megatron's, of the stage.

    Raises:
        ValueError: a `config`: `model_config` has that of every part.
    """
    if config is not None:
        raise ValueError(
            "model_provider got a TransformerConfig, expected None: the recipe's model_config makes the "
            "configuration of every part. Set what it shall hold by Megatron's arguments."
        )
    seed_draws_once(seed)
    model = MimoModel(
        model_config,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    control.apply(model)
    control.graph(model)
    model.config.finalize_model_grads_func = control.finalize_func()
    return model


def seed_draws_once(seed: int) -> None:
    """Seeds the decoders' draws after Megatron has seeded its own numbers, once a process."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    if STATE not in get_cuda_rng_tracker().get_states():
        seed_draws(seed, parallel_state.get_data_parallel_rank())


def dataset_provider(recipe: Recipe, args: Namespace):
    """`train_valid_test_datasets_provider` as Megatron calls it: endless microbatches of a recipe's datasets.

    Args:
        recipe: gives datasets and batches.
        args: Megatron's; with them the number of samples that an earlier run consumed.

    Raises:
        ValueError: another kind of loader than `external` is asked for.
    """
    if args.dataloader_type != "external":
        raise ValueError(
            f"--dataloader-type {args.dataloader_type}: multimodal batches are nested, and Megatron's own "
            "loaders cannot collate them. Leave the argument out, or give 'external'."
        )

    def provide(samples: Sequence[int | None], vp_stage: int | None = None):
        """Microbatches to train, validate and test on; None where there is no dataset."""
        del vp_stage  # every chunk of an interleaved pipeline goes through the same batches
        consumed = (args.consumed_train_samples, args.consumed_valid_samples, 0)
        sizes = (args.micro_batch_size, args.eval_micro_batch_size, args.eval_micro_batch_size)
        return tuple(
            None
            if dataset is None
            else microbatches_of(
                dataset,
                recipe.collate,
                start=start,
                micro_batch_size=size,
                rank=parallel_state.get_data_parallel_rank(),
                size=parallel_state.get_data_parallel_world_size(),
                workers=args.num_workers,
            )
            for dataset, start, size in zip(recipe.datasets(args, samples), consumed, sizes)
        )

    return provide


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
    check_recipe(recipe)
    with adapt_megatron(recipe.model_config), ExitStack() as until_trained:
        # Importing these configures logging; importing megatron_mimo does not.
        from megatron.training import pretrain as megatron_pretrain
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        args = parse_and_validate_args(
            lambda parser: with_printable_help(add_mimo_args(parser)),
            # Batches are nested: Megatron's own loaders cannot collate them.
            args_defaults={"dataloader_type": "external", **(defaults or {})},
        )
        check_used(args)
        layout, control = layout_from_args(args), control_from_args(args)
        config = with_loss_weights(recipe.model_config(args), args)
        check_layout(layout, config, args.seq_length)
        control.check(config)
        check_resumed(args, control, config)
        datasets = dataset_provider(recipe, args)
        provider, counts = ModelProvider(config, args, control), {}
        until_trained.enter_context(train_step_by(_timed(args, provider, counts)))
        megatron_pretrain(
            pretrain_cfg_container_from_args(args),
            datasets,
            ModelType.encoder_or_decoder,
            ForwardStep(
                microbatches=get_num_microbatches,
                step=lambda: args.curr_iteration,
                seed=args.seed,
                on_step=lambda step, counted: counts.update(counted),
            ),
            provider,
        )


@contextmanager
def adapt_megatron(model_config: ModelConfig) -> Iterator[None]:
    """Within it `megatron.training` does for a `MimoModel` what it leaves no argument for.

    It follows --lr-factor, --weight-decay-factor and --train-embedding-rows, runs on gloo on the CPU
    where there is no GPU, trains from a wheel, and an exception on one rank ends the job. Arguments are
    to be parsed within it too. `pretrain` enters it by itself.

    Args:
        model_config: as the recipe's; says what the parts are called.

    Example:
        >>> with adapt_megatron(model_config):                                    # doctest: +SKIP
        ...     args = parse_and_validate_args(add_mimo_args)
        ...     megatron.training.pretrain(...)
    """
    with exit_on_error(), ExitStack() as until_trained:
        if not torch.cuda.is_available():
            enable_cpu_backend()
            until_trained.callback(disable_cpu_backend)
            until_trained.enter_context(initialized_on_the_cpu(_initialize_cpu))
        until_trained.enter_context(optimizer_config_by(lambda ask: PartOverrides(ask, model_config)))
        until_trained.enter_context(compiled_dataset_helpers())
        until_trained.enter_context(checkpoints_by(**checkpoints.functions(lambda: _running_model(model_config))))
        yield


def _running_model(model_config: ModelConfig) -> MimoModelConfig:
    """The model of the run in progress."""
    from megatron.training import get_args

    return model_config(get_args())


@dataclass(frozen=True)
class PartOverrides:
    """In the place of `get_megatron_optimizer_config`: `(config, overrides)` with the factors of the parts.

    Args:
        ask: Megatron's function.
        model_config: says what the parts are called.
    """

    ask: Callable
    model_config: ModelConfig

    def __call__(self, args: Namespace):
        optimizer, _ = self.ask(args)
        return optimizer, control_from_args(args).overrides(optimizer, self.model_config(args))


def check_supported(args: Namespace) -> None:
    """Refuses what cannot work, whoever reads the data.

    Raises:
        ValueError: naming the arguments.
    """
    if args.mtp_num_layers:
        raise ValueError(
            f"--mtp-num-layers {args.mtp_num_layers}: multi-token prediction is not supported by MimoModel. Leave "
            "the argument out."
        )
    if args.graph_encoders and args.encoder_recompute_granularity:
        raise ValueError(
            f"--graph-encoders with --encoder-recompute-granularity {args.encoder_recompute_granularity}: what is "
            "computed again cannot be captured. Leave out one of them (--graph-encoders with nothing after it "
            "where a script gives it)."
        )


def with_loss_weights(config: MimoModelConfig, args: Namespace) -> MimoModelConfig:
    """`config` with the weights of `--modality-loss-weight`, which win over the recipe's.

    Raises:
        ValueError: a modality that the model does not have.
    """
    given = once_each("--modality-loss-weight", args.modality_loss_weight)
    known = ["text", *config.modality_submodules]
    for name in given:
        if name not in known:
            raise ValueError(f"--modality-loss-weight: the model has no modality {name!r}, expected one of {known}")
    return replace(config, modality_loss_weights={**config.modality_loss_weights, **given})


def check_used(args: Namespace) -> None:
    """Refuses arguments that would change nothing in `pretrain`, and what cannot work.

    Raises:
        ValueError: naming the argument and what to do instead.
    """
    check_supported(args)
    for name in DATA_ARGUMENTS:
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')}: the data is the recipe's. Leave the argument out, and change the "
                "recipe's datasets()."
            )


def check_resumed(args: Namespace, control: TrainingControl, config: MimoModelConfig) -> None:
    """Refuses a checkpoint of another model, or one whose optimizer state is of other parts or embedding rows.

    What trained is not known of checkpoints that hold none of our arguments, such as those of Megatron's own scripts.

    Args:
        args: Megatron's, which name the checkpoint.
        control: which parts train now.
        config: of the model.

    Raises:
        ValueError: naming both, and how to begin with the weights alone; or loading would run what a file says.
    """
    checkpoints.check_loadable(args, config)
    path, theirs = _written_with(args)
    if theirs is None or getattr(theirs, "no_save_optim", False) or not hasattr(theirs, "train_embedding_rows"):
        return
    before = TrainingControl(frozen=theirs.freeze, embedding_rows=theirs.train_embedding_rows)
    instead = (
        "Give the same --freeze and --train-embedding-rows, or begin a second stage with the checkpoint's weights "
        "alone: --finetune, which counts steps from 0, or --no-load-optim, which goes on counting."
    )
    try:
        trained = Trained.by(before, config)
    except ValueError as error:
        raise ValueError(f"{path} was written with --freeze {' '.join(theirs.freeze)}. {error} {instead}") from error
    check_trained(path, trained, Trained.by(control, config), instead)


def _written_with(args: Namespace) -> tuple[str, Namespace | None]:
    """The checkpoint whose optimizer state Megatron will load, and the arguments that it holds; None without."""
    from megatron.training.checkpointing import checkpoint_exists

    if args.load is None or args.finetune or args.no_load_optim:
        return "", None
    if args.pretrained_checkpoint is not None and not checkpoint_exists(args.load):
        return "", None  # Megatron takes the weights of that one alone
    return arguments_of_checkpoint(args)


def _timed(args: Namespace, provider: ModelProvider, counts: Counts) -> Callable[[Callable], Callable]:
    """A wrapper of Megatron's training step, which itself tells nobody how fast it was.

    Args:
        args: Megatron's.
        provider: knows the model's sizes when the first step starts.
        counts: of the step that just ran; empty on pipeline stages that do not count.
    """
    peak = peak_of_all(args.world_size, args.bf16 or args.fp16, args.device_peak_tflops)

    @cache
    def throughput() -> Throughput:
        return Throughput(provider.sizes, peak, log_to_megatron(args), args.log_interval)

    def wrap(train_step: Callable) -> Callable:
        def timed_step(*given, **named):
            started = perf_counter()
            outcome = train_step(*given, **named)
            if counts:
                throughput().add(args.curr_iteration + 1, counts, perf_counter() - started)
            return outcome

        return timed_step

    return wrap


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
    )
