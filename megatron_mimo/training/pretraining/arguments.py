"""Command-line arguments for what Megatron has no argument of its own, and what they mean."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.launch import Layout
from megatron_mimo.training.parts.control import LANGUAGE_MODEL, TrainingControl

#: `(args) -> configuration`, as a recipe's.
ModelConfig = Callable[[Namespace], MimoModelConfig]


def add_mimo_args(parser: ArgumentParser) -> ArgumentParser:
    """`parser` with the arguments of multimodal training; `extra_args_provider` of Megatron's parser.

    Parts are named as in `megatron_mimo.training.parts.control`: `language_model`, `encoders`,
    `images/encoders`, `images/decoders/pixels`, ...

    Example:
        >>> args = add_mimo_args(ArgumentParser()).parse_args(["--freeze", "encoders", "--lr-factor", "decoders=10"])
        >>> args.freeze, args.lr_factor
        (['encoders'], [('decoders', 10.0)])
    """
    group = parser.add_argument_group("multimodal training")
    group.add_argument("--freeze", nargs="+", default=[], metavar="PART", help="parts that do not train")
    group.add_argument(
        "--train-embedding-rows", nargs="+", type=int, default=[], metavar="ID",
        help="token ids whose embedding rows train while the table's other rows stay as they are",
    )  # fmt: skip
    group.add_argument(
        "--lr-factor", nargs="+", type=_factor, default=[], metavar="PART=FACTOR",
        help="factors on the learning rate of parts",
    )  # fmt: skip
    group.add_argument(
        "--weight-decay-factor", nargs="+", type=_factor, default=[], metavar="PART=FACTOR",
        help="factors on the weight decay of parts",
    )  # fmt: skip
    group.add_argument(
        "--modality-loss-weight", nargs="+", type=_factor, default=[], metavar="MODALITY=WEIGHT",
        help="weights of the modalities' loss terms, 1 where none is given",
    )  # fmt: skip
    group.add_argument(
        "--compile-encoders", nargs="*", default=[], metavar="PART",
        help="encoders to run through torch.compile; also graphed, they replay what was compiled. Without a PART "
        "none, in place of those given before",
    )  # fmt: skip
    group.add_argument(
        "--compile-language-model", action="store_true",
        help="run the language model's layers, in plain torch, through torch.compile",
    )  # fmt: skip
    group.add_argument(
        "--graph-encoders", nargs="*", default=[], metavar="PART",
        help="encoders to replay as CUDA graphs, which spares their launches. Without a PART none, in place of those "
        "given before",
    )  # fmt: skip
    group.add_argument(
        "--cuda-graph-buckets", nargs="+", type=_bucket, default=[], metavar="MODALITY=ITEMS",
        help="with --cuda-graph-impl full_iteration: a microbatch's media items are rounded up to a multiple of so "
        "many, by copies of the last that no position reads",
    )  # fmt: skip
    group.add_argument(
        "--cuda-graph-label-rows", type=int, default=None, metavar="ROWS",
        help="with --cuda-graph-impl full_iteration: the language loss reads a multiple of so many rows; a 32nd of the "
        "positions by default",
    )  # fmt: skip
    group.add_argument(
        "--cuda-graph-packed-sequences", type=int, default=None, metavar="SEQUENCES",
        help="with --cuda-graph-impl full_iteration: the sequences of a pack are rounded up to a multiple of so many, "
        "by empty ones; 16 by default",
    )  # fmt: skip
    group.add_argument(
        "--encoder-recompute-granularity", choices=["full", "selective"], default=None,
        help="activation recomputation of the encoders, as --recompute-granularity is the language model's",
    )  # fmt: skip
    group.add_argument(
        "--pretrained", default=None, metavar="DIR",
        help="a Hugging Face directory, or a name on its hub, that the weights begin from; parts that it lacks begin "
        "fresh. A checkpoint of --load replaces them",
    )  # fmt: skip
    group.add_argument(
        "--data", nargs="+", default=None, metavar="PATH",
        help="conversations to train on, in place of the recipe's datasets: .jsonl, .json, .parquet, a directory, or "
        "what Energon prepared; several are one after another. --valid-data-path and --test-data-path name such to "
        "evaluate on",
    )  # fmt: skip
    group.add_argument(
        "--processor", default=None, metavar="NAME",
        help="a processor or tokenizer of transformers, by name or directory, that reads --data",
    )  # fmt: skip
    group.add_argument(
        "--pack",
        action="store_true",
        help="lay samples of --data end to end in packs of --seq-length tokens; without it each is a row of a batch",
    )
    group.add_argument(
        "--log-part-norms", action="store_true",
        help="log the gradient norm of each part too; it takes a pass over the gradients and a wait a step",
    )  # fmt: skip
    group.add_argument(
        "--ema-decay", type=float, default=None,
        help="average the weights that train, float32, into each checkpoint, such as 0.999",
    )  # fmt: skip
    group.add_argument(
        "--early-stopping-patience", type=int, default=None, metavar="N",
        help="end the run after N evaluations in a row without a new best",
    )  # fmt: skip
    group.add_argument(
        "--best-of", default="loss", metavar="TERM",
        help="the loss whose mean evaluations are compared by: loss (the weighted sum), text, MODALITY/DECODER",
    )  # fmt: skip
    group.add_argument(
        "--keep-best", action="store_true",
        help="save an evaluation that is the best so far though no save is due, and keep it in best/ below --save",
    )  # fmt: skip
    group.add_argument(
        "--stall-seconds", type=float, default=None,
        help="say which rank holds the run up where no step ends for so long; ten times the slowest step, and at least "
        "60, by default",
    )  # fmt: skip
    group.add_argument(
        "--device-peak-tflops", type=float, default=None,
        help="dense peak of one device in its training precision, for the MFU; known for common GPUs",
    )  # fmt: skip
    return parser


def control_from_args(args: Namespace) -> TrainingControl:
    """Which parts train, as the command line says.

    Raises:
        ValueError: a part has two factors, or the embedding two learning rates.
    """
    learning_rate = once_each("--lr-factor", args.lr_factor)
    decoupled = getattr(args, "decoupled_lr", None)
    if decoupled is not None and LANGUAGE_MODEL in learning_rate:
        raise ValueError(
            f"--decoupled-lr {decoupled:g} and --lr-factor {LANGUAGE_MODEL}={learning_rate[LANGUAGE_MODEL]:g} both set "
            "the learning rate of the embedding and the output layer. Leave one of the two out."
        )
    return TrainingControl(
        frozen=args.freeze,
        embedding_rows=args.train_embedding_rows,
        learning_rate=learning_rate,
        weight_decay=once_each("--weight-decay-factor", args.weight_decay_factor),
        compiled=[*args.compile_encoders, *([LANGUAGE_MODEL] if args.compile_language_model else [])],
        graphed=args.graph_encoders,
    )


def layout_from_args(args: Namespace) -> Layout:
    """The layout that Megatron's arguments ask for.

    Raises:
        ValueError: it does not fit the world, naming the argument to change.
    """
    return Layout(
        world_size=args.world_size,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
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


@dataclass(frozen=True)
class PartOverrides:
    """In place of `get_megatron_optimizer_config`: `(config, overrides)` with the factors of the parts.

    Args:
        ask: Megatron's function.
        model_config: says what the parts are called.
    """

    ask: Callable[..., Any]
    model_config: ModelConfig

    def __call__(self, args: Namespace) -> Any:
        optimizer, _ = self.ask(args)
        return optimizer, control_from_args(args).overrides(optimizer, self.model_config(args))


def once_each(option: str, pairs: Sequence[tuple[str, float]]) -> Mapping[str, float]:
    """Pairs of a command-line option as a mapping.

    Raises:
        ValueError: a name is given twice.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{option}: {name!r} is given {names.count(name)} times; give it once")
    return dict(pairs)


def _bucket(text: str) -> tuple[str, int]:
    """`"images=8"` -> `("images", 8)`; argparse reports what it raises."""
    name, _, items = text.partition("=")
    if not (name and items.isdecimal() and int(items)):
        raise ValueError(f"expected MODALITY=ITEMS, found {text!r}")
    return name, int(items)


def _factor(text: str) -> tuple[str, float]:
    """`"part=2"` -> `("part", 2.0)`; argparse reports what it raises."""
    name, equals, factor = text.partition("=")
    if not (name and equals):
        raise ValueError(f"expected NAME=NUMBER, found {text!r}")
    return name, float(factor)
