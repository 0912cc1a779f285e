"""`inspect`: a model's parts, their parameters, and the layouts that share it out, from its files alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mimo.cli.building import ENCODER, names_of
from megatron_mimo.cli.counting import Step, check_step, footprints, operations
from megatron_mimo.cli.models import Place, model_of
from megatron_mimo.hf import own
from megatron_mimo.hf.assembly import saved_parts
from megatron_mimo.hf.blueprint import TOWERS, Part, read_source, read_tower
from megatron_mimo.hf.files import read_header
from megatron_mimo.hf.shares import tensor_sizes
from megatron_mimo.hf.source import OWN, resolve
from megatron_mimo.training.checkpoints.directories import found_at
from megatron_mimo.training.checkpoints.inert import check_inert, description_of

_LIBRARIES = {"transformer_engine": "TransformerEngine", "apex": "Apex", "torch": "plain torch"}


@dataclass(frozen=True)
class Sizes:
    """What a model's files say.

    Args:
        parameters: part -> how many.
        language: the language model's configuration, of transformers.
        towers: those of encoders whose layers tensor-parallel ranks share out too.
    """

    parameters: Mapping[str, int]
    language: Any
    towers: tuple[Any, ...] = ()

    @property
    def total(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())

    def tensor_sizes(self) -> list[int]:
        """Tensor-parallel sizes that share out the layers of the language model and of each tower."""
        fit = [_tensor_sizes(config) for config in (self.language, *self.towers)]
        return [size for size in fit[0] if all(size in sizes for sizes in fit)]

    def pipeline_sizes(self) -> list[int]:
        """Pipeline stages that have equally many layers."""
        layers = self.language.num_hidden_layers
        return [size for size in range(1, layers + 1) if layers % size == 0]


def sizes_of(place: Place) -> Sizes:
    """The sizes of a model, whose weights are not read.

    Args:
        place: of the model.

    Raises:
        FileNotFoundError, ValueError: files that are not there or not whole.
    """
    if place.checkpoint:
        return _sizes(_of_checkpoint(place), _parts(place))
    parts = _parts(place)
    counted: Counter[str] = Counter()
    for part in parts:
        counted[part.path] += sum(math.prod(stored.shape) for stored in part.stored.values())
    file = place.directory / own.FILE
    for name, stored in read_header(file).items() if file.is_file() else ():
        counted[_part_of(name)] += math.prod(stored.shape)
    return _sizes({part: count for part, count in counted.items() if count}, parts)


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
    check_step(step)
    unknown = [part for part in step.frozen if part not in sizes.parameters]
    if unknown:
        raise ValueError(f"--frozen: expected some of {list(sizes.parameters)}, found {unknown}")
    for name, size, fit in (
        ("tensor", step.tensor, sizes.tensor_sizes()), ("pipeline", step.pipeline, sizes.pipeline_sizes())
    ):  # fmt: skip
        if size not in fit:
            raise ValueError(f"--{name} {size}: expected one of {fit}, which share the model out; lower it to one")
    for part, count in sizes.parameters.items():
        yield f"{part}: {count:,} parameters{' (frozen)' if part in step.frozen else ''}"
    yield f"in all: {sizes.total:,} parameters"
    yield f"layouts: tensor {sizes.tensor_sizes()}, pipeline {sizes.pipeline_sizes()}"
    yield (
        f"a step on {step.layout.world_size} ranks (tensor {step.tensor}, pipeline {step.pipeline}, context "
        f"{step.context}, data {step.data}), {step.dtype}, {step.microbatches} packs of {step.length} a data-parallel "
        f"rank, recomputation {step.recompute or 'none'}, layers of {_LIBRARIES[step.counted_backend]}:"
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
    counted: Counter[str] = Counter()
    if place.directory.is_file():
        for name, one in read_header(place.directory).items():
            counted[_part_of(name)] += math.prod(one.shape)
        return dict(counted)
    path = found_at(place.directory)
    check_inert(path)
    for name, kind in description_of(path / ".metadata").state_dict_metadata.items():
        if isinstance(kind, TensorStorageMetadata) and not name.startswith(("optimizer.", "chained_")):
            counted[_part_of(name)] += math.prod(kind.size)
    return dict(counted)


def _parts(place: Place) -> tuple[Part, ...]:
    if not place.checkpoint:
        return _read(place.directory)
    model = model_of(place)
    towers = [
        read_tower(resolve(one.reads.name), f"{name}/encoders/{ENCODER}", None, "all")
        for name, one in model.modalities.items()
        if one.reads is not None and not one.reads.as_it_is
    ]
    return (*_read(resolve(names_of(model)[0])), *towers)


def _read(directory: Path) -> tuple[Part, ...]:
    return saved_parts(directory).parts if (directory / OWN).is_file() else tuple(read_source(directory))


def _sizes(parameters: Mapping[str, int], parts: tuple[Part, ...]) -> Sizes:
    language = next(part.config for part in parts if part.path == "language_model")
    return Sizes(parameters, language, tuple(part.config for part in parts if part.model_type in TOWERS))


def _tensor_sizes(config: Any) -> list[int]:
    heads = config.num_attention_heads
    return tensor_sizes(heads, getattr(config, "num_key_value_heads", None) or heads, config.intermediate_size)


def _part_of(name: str) -> str:
    words = name.split(".")
    return "/".join(words[1:4]) if words[0] == "modality_submodules" else words[0]
