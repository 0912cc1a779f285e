"""What is trained on what, and its microbatches as `megatron.training` asks for them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from megatron.core import parallel_state

from megatron_mimo.batch import Batch
from megatron_mimo.compat.megatron_training import optimizer_config_function
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.order import microbatches_of
from megatron_mimo.training.pretraining.arguments import PartOverrides
from megatron_mimo.training.pretraining.packs import SPLITS, processor_of
from megatron_mimo.training.pretraining.session import session_of

#: To train, validate and test on; None where there is nothing.
Microbatches = tuple[Iterator[Batch] | None, ...]
#: `(samples, vp_stage) -> microbatches`, as Megatron calls it.
DatasetProvider = Callable[..., Microbatches]


class Recipe(Protocol):
    """What is trained on what; a module with these functions is one.

    With --data only `model_config` is needed, and `sample_processor(args)`, which gives a
    `megatron_mimo.data.SampleProcessor`, is asked in place of --processor where the recipe has it.
    `callbacks(args)` and `further_losses(args)`, where it has them, give objects of `Callback` and
    `FurtherLoss` (`megatron_mimo.training`).
    """

    def model_config(self, args: Namespace) -> MimoModelConfig:
        """The model, from Megatron's arguments. Needs no process group."""

    def datasets(self, args: Namespace, samples: Sequence[int | None]) -> tuple[Sequence | None, ...]:
        """Datasets to train, validate and test on, each of which gives a sample for an index.

        `samples` are the numbers of samples that the run will ask of each.
        """

    def collate(self, samples: Sequence) -> Batch:
        """Keyword arguments of `MimoModel.forward` for the samples of a microbatch, on the CPU."""


def check_recipe(recipe: object, data: bool = True) -> None:
    """Refuses what lacks a recipe's functions.

    Args:
        recipe: to look at.
        data: whether it is asked for datasets.

    Raises:
        ValueError: naming those that are missing.
    """
    if not data and callable(getattr(recipe, "model_config", None)):
        return
    missing = [name for name in ("model_config", "datasets", "collate") if not callable(getattr(recipe, name, None))]
    if missing:
        raise ValueError(
            f"the recipe {getattr(recipe, '__name__', type(recipe).__name__)!r} lacks {missing}, expected functions "
            "model_config(args), datasets(args, samples) and collate(samples)."
        )


def dataset_provider(recipe: Recipe, args: Namespace) -> DatasetProvider:
    """`train_valid_test_datasets_provider` as Megatron calls it: endless microbatches of the recipe, or of --data.

    Args:
        recipe: gives datasets and batches.
        args: Megatron's; with them the number of samples that an earlier run consumed.

    Raises:
        ValueError: another kind of loader than `external` is asked for, or --data of a loop whose checkpoints would
            not know it.
    """
    if args.dataloader_type != "external":
        raise ValueError(
            f"--dataloader-type {args.dataloader_type}: multimodal batches are nested, and Megatron's own "
            "loaders cannot collate them. Leave the argument out, or give 'external'."
        )

    if args.data is not None:
        return _batches_of(recipe, args)

    def provide(samples: Sequence[int | None], vp_stage: int | None = None) -> Microbatches:
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


def _batches_of(recipe: Recipe, args: Namespace) -> DatasetProvider:
    if not isinstance(optimizer_config_function(), PartOverrides):
        raise ValueError(
            "--data: Megatron's checkpoints would not know how far the data is. Parse the arguments and call "
            "pretrain() within `with megatron_mimo.training.adapt_megatron(model_config):`."
        )
    session = session_of(args)
    process = processor_of(recipe, session.ask(recipe.model_config).model, args)

    def provide(samples: Sequence[int | None], vp_stage: int | None = None) -> Microbatches:
        del samples, vp_stage
        return tuple(session.data.batches(process, split) for split in SPLITS)

    return provide
