"""What is refused of a command line before anything is built."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megatron_mimo.compat.megatron_training import (
    arguments_of_checkpoint,
    full_iteration_wrapper,
    optimizer_config_function,
)
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.training.best import check_term
from megatron_mimo.training.checkpoints.loop import check_loadable
from megatron_mimo.training.checkpoints.trained import Trained, check_trained
from megatron_mimo.training.memory import check_memory
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.pretraining.arguments import PartOverrides
from megatron_mimo.training.pretraining.step_graphs import FULL_ITERATION, FullIterations
from megatron_mimo.training.settings import check_decay, check_whole

# Of Megatron's own datasets.
DATA_ARGUMENTS = (
    "data_path", "data_args_path", "per_split_data_args_path", "train_data_path", "valid_data_path", "test_data_path",
)  # fmt: skip


def check_in_effect(args: Namespace, logs_throughput: bool = False) -> None:
    """Refuses arguments of `add_mimo_args` that nothing would follow.

    Args:
        args: Megatron's.
        logs_throughput: the run logs tokens/s, FLOPs and MFU.

    Raises:
        ValueError: naming the arguments and what to call.
    """
    if "freeze" not in vars(args):
        raise ValueError(
            "model_provider: Megatron's parser lacks the arguments of multimodal training. Call "
            "parse_and_validate_args(add_mimo_args), or call add_mimo_args in the script's own extra_args_provider."
        )
    factors = [name for name in ("lr_factor", "weight_decay_factor", "train_embedding_rows") if getattr(args, name)]
    if factors and not isinstance(optimizer_config_function(), PartOverrides):
        raise ValueError(
            f"{', '.join(map(_option, factors))}: Megatron makes its parameter groups without them. Parse the "
            "arguments and call pretrain() within `with megatron_mimo.training.adapt_megatron(model_config):`, or "
            "leave them out."
        )
    full_iteration = getattr(args, "cuda_graph_impl", "none") == FULL_ITERATION
    if full_iteration and not isinstance(full_iteration_wrapper(), FullIterations):
        raise ValueError(
            f"--cuda-graph-impl {FULL_ITERATION}: Megatron's own capture knows one shape, and no placement of "
            "media. Parse the arguments and call pretrain() within `with "
            "megatron_mimo.training.adapt_megatron(model_config):`, or leave it out."
        )
    if args.device_peak_tflops is not None and not logs_throughput:
        raise ValueError(
            "--device-peak-tflops: only megatron_mimo.training.pretrain logs the MFU. Train with it, or leave the "
            "argument out."
        )


def check_supported(args: Namespace) -> None:
    """Refuses what cannot work, whoever reads the data.

    Raises:
        ValueError: naming the arguments.
    """
    if args.mtp_num_layers:
        raise ValueError(
            f"--mtp-num-layers {args.mtp_num_layers}: multi-token prediction is not supported by Megatron's loop here, "
            "whose counts of FLOPs and recipes know nothing of its layers. Leave the argument out, or train with "
            "megatron_mimo.training.Trainer and mtp_block_spec in the language model's spec."
        )
    check_memory(vars(args), "--{}")
    if getattr(args, "use_mup", False):
        raise ValueError(
            "--use-mup: Megatron would scale the learning rate of every matrix of every modality by the language "
            "model's width, and know embeddings by their names. Leave the argument out; --lr-factor gives a part its "
            "own rate."
        )
    if args.graph_encoders and args.encoder_recompute_granularity:
        raise ValueError(
            f"--graph-encoders with --encoder-recompute-granularity {args.encoder_recompute_granularity}: what is "
            "computed again cannot be captured. Leave out one of them (--graph-encoders with nothing after it "
            "where a script gives it)."
        )


def check_comparing(args: Namespace, config: MimoModelConfig, further: Sequence[str] = ()) -> None:
    """Refuses what averages or compares nothing. Rank-local.

    Args:
        args: Megatron's.
        config: of the model.
        further: names of further losses.

    Raises:
        ValueError: naming the arguments.
    """
    if args.ema_decay is not None:
        check_decay("--ema-decay", args.ema_decay)
        if args.overlap_param_gather:
            raise ValueError(
                "--ema-decay with --overlap-param-gather: after a step no rank has the new weights whole, to average "
                "them. Leave one of the two out."
            )
    if args.early_stopping_patience is None and not args.keep_best:
        return
    if args.early_stopping_patience is not None:
        check_whole("--early-stopping-patience", args.early_stopping_patience, least=1)
    if not (args.eval_iters and args.eval_interval):
        raise ValueError(
            "--early-stopping-patience and --keep-best compare evaluations, expected --eval-iters and --eval-interval "
            f"above 0, found {args.eval_iters} and {args.eval_interval}."
        )
    if args.keep_best and args.save is None:
        raise ValueError("--keep-best keeps a checkpoint, expected --save DIRECTORY, found none.")
    check_term("--best-of", args.best_of, config, further)


def check_data_arguments(args: Namespace) -> None:
    """Refuses arguments of Megatron's datasets, which would change nothing in `pretrain`.

    Raises:
        ValueError: naming the argument and what to do instead.
    """
    # With --data they name what is evaluated.
    followed = ("valid_data_path", "test_data_path") if getattr(args, "data", None) is not None else ()
    for name in DATA_ARGUMENTS:
        if getattr(args, name, None) and name not in followed:
            raise ValueError(
                f"{_option(name)}: the data is the recipe's, or --data. Leave the argument out, change the recipe's "
                "datasets()."
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
    check_loadable(args, config)
    path, theirs = _written_with(args)
    args.compared = dict(getattr(theirs, "compared", {}))  # of evaluations; written into checkpoints with the rest
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


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
