"""`inspect`: a model's parts, their parameters, and the layouts that share it out, from its files alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mimo.cli.building import names_of
from megatron_mimo.cli.counting import Step, footprints, operations
from megatron_mimo.cli.models import Place
from megatron_mimo.hf import own
from megatron_mimo.hf.assembly import saved_parts
from megatron_mimo.hf.blueprint import Part, read_source
from megatron_mimo.hf.files import read_header
from megatron_mimo.hf.source import OWN, resolve
from megatron_mimo.training.checkpoints.directories import found_at
from megatron_mimo.training.checkpoints.inert import check_inert, description_of

_LARGEST = 64


@dataclass(frozen=True)
class Sizes:
    """What a model's files say.

    Args:
        parameters: part -> how many.
        language: the language model's configuration, of transformers.
    """

    parameters: Mapping[str, int]
    language: Any

    @property
    def total(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())

    def tensor_sizes(self) -> list[int]:
        """Tensor-parallel sizes that share out heads, groups of keys and the feed-forward layer alike."""
        heads = self.language.num_attention_heads
        groups = getattr(self.language, "num_key_value_heads", None) or heads
        return _divisors(math.gcd(heads, groups, self.language.intermediate_size))

    def pipeline_sizes(self) -> list[int]:
        """Pipeline stages that have equally many layers."""
        return _divisors(self.language.num_hidden_layers)


def sizes_of(place: Place) -> Sizes:
    """The sizes of a model, whose weights are not read.

    Args:
        place: of the model.

    Raises:
        FileNotFoundError, ValueError: files that are not there or not whole.
    """
    if place.checkpoint:
        return Sizes(_of_checkpoint(place), _language(_parts(place)))
    parts = _parts(place)
    counted: Counter[str] = Counter()
    for part in parts:
        counted[part.path] += sum(math.prod(stored.shape) for stored in part.stored.values())
    file = place.directory / own.FILE
    for name, stored in read_header(file).items() if file.is_file() else ():
        counted[_part_of(name)] += math.prod(stored.shape)
    return Sizes({part: count for part, count in counted.items() if count}, _language(parts))


def told(sizes: Sizes, place: Place, step: Step) -> Iterator[str]:
    """Lines about a model and a training step on one of its layouts.

    Args:
        sizes: of the model.
        place: of the model.
        step: that is asked about.

    Raises:
        Refused: a step of which no pack can be made.
        ValueError: a layout that does not share it out, or a part that it does not have.
    """
    unknown = [part for part in step.frozen if part not in sizes.parameters]
    if unknown:
        raise ValueError(f"--frozen: expected some of {list(sizes.parameters)}, found {unknown}")
    for name, size, fit in (
        ("tensor", step.tensor, sizes.tensor_sizes()), ("pipeline", step.pipeline, sizes.pipeline_sizes())
    ):  # fmt: skip
        if size not in fit:
            raise ValueError(f"--{name} {size}: expected one of {fit}, which share out the language model alike")
    for part, count in sizes.parameters.items():
        yield f"{part}: {count:,} parameters{' (frozen)' if part in step.frozen else ''}"
    yield f"in all: {sizes.total:,} parameters"
    yield f"layouts: tensor {sizes.tensor_sizes()}, pipeline {sizes.pipeline_sizes()}"
    yield (
        f"a step on {step.layout.world_size} ranks (tensor {step.tensor}, pipeline {step.pipeline}, context "
        f"{step.context}, data {step.data}), {step.dtype}, {step.microbatches} packs of {step.length} a data-parallel "
        f"rank, recomputation {step.recompute or 'none'}:"
    )
    for stage, found in enumerate(footprints(place, step), 1):
        yield (
            f"memory of a rank of stage {stage}: {_size(found.peak)} at the peak: weights {_size(found.weights)}, "
            f"gradients {_size(found.gradients)}, optimizer {_size(found.optimizer)}, activations "
            f"{_size(found.activations)}, or in the optimizer's step {_size(found.stepping)}"
        )
    flops = operations(place, step)
    parts = ", ".join(f"{part} {count / 1e12:.4g}" for part, count in flops.items())
    yield f"operations of the step on all ranks: {sum(flops.values()) / 1e12:.4g} TFLOP ({parts})"


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def _of_checkpoint(place: Place) -> dict[str, int]:
    path = found_at(place.directory)
    check_inert(path)
    counted: Counter[str] = Counter()
    for name, kind in description_of(path / ".metadata").state_dict_metadata.items():
        if isinstance(kind, TensorStorageMetadata) and not name.startswith(("optimizer.", "chained_")):
            counted[_part_of(name)] += math.prod(kind.size)
    return dict(counted)


def _parts(place: Place) -> tuple[Part, ...]:
    directory = place.directory
    if place.checkpoint:
        assert place.source is not None or place.model is not None  # as `find` sees to
        directory = resolve(place.source or names_of(place.model)[0])  # type: ignore[arg-type]
    return saved_parts(directory).parts if (directory / OWN).is_file() else tuple(read_source(directory))


def _language(parts: tuple[Part, ...]) -> Any:
    return next(part.config for part in parts if part.path == "language_model")


def _part_of(name: str) -> str:
    words = name.split(".")
    return "/".join(words[1:4]) if words[0] == "modality_submodules" else words[0]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, min(number, _LARGEST) + 1) if number % size == 0]
