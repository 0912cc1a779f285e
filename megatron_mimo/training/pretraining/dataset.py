"""What is trained on what, and its microbatches as `megatron.training` asks for them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from megatron.core import parallel_state

from megatron_mimo.batch import Batch
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.order import microbatches_of

#: To train, validate and test on; None where there is nothing.
Microbatches = tuple[Iterator[Batch] | None, ...]
#: `(samples, vp_stage) -> microbatches`, as Megatron calls it.
DatasetProvider = Callable[..., Microbatches]


class Recipe(Protocol):
    """What is trained on what; a module with these functions is one."""

    def model_config(self, args: Namespace) -> MimoModelConfig:
        """The model, from Megatron's arguments. Needs no process group."""

    def datasets(self, args: Namespace, samples: Sequence[int | None]) -> tuple[Sequence | None, ...]:
        """Datasets to train, validate and test on, each of which gives a sample for an index.

        `samples` are the numbers of samples that the run will ask of each.
        """

    def collate(self, samples: Sequence) -> Batch:
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


def dataset_provider(recipe: Recipe, args: Namespace) -> DatasetProvider:
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
