"""`megatron:` of a recipe: settings of Megatron's three configurations by their names, each where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.nearest import unknown

#: Settings that a recipe has a key of its own for.
_OF_RECIPE = {
    "tensor_model_parallel_size": "layout.tensor",
    "pipeline_model_parallel_size": "layout.pipeline",
    "virtual_pipeline_model_parallel_size": "layout.virtual_pipeline",
    "context_parallel_size": "layout.context",
    "expert_model_parallel_size": "layout.expert",
    "sequence_parallel": "layout.sequence_parallel",
    "params_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "lr": "stages.NAME.trains",
    "weight_decay": "stages.NAME.weight_decay",
    "clip_grad": "stages.NAME.clip_grad",
    "cuda_graph_impl": "graphs",
}


@dataclass(frozen=True)
class Settings:
    """Keyword arguments of Megatron's configurations.

    Args:
        transformer: of the language model's `TransformerConfig`.
        optimizer: of `OptimizerConfig`.
        ddp: of `DistributedDataParallelConfig`.
    """

    transformer: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings of `megatron:`; one that several configurations have goes to each.

    Raises:
        Refused: a name that none of them has, one that the recipe has a key for, or a value of another type.
    """
    configurations = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    known = [{one.name for one in fields(kind) if one.init} for kind in configurations]
    split: list[dict[str, Any]] = [{}, {}, {}]
    for name, value in given.items():
        if name in _OF_RECIPE:
            raise Refused(f"megatron.{name}: set it with {_OF_RECIPE[name]} of the recipe")
        if not any(name in names for names in known):
            raise Refused(f"megatron: {unknown('setting', name, set().union(*known) - _OF_RECIPE.keys())}")
        for kind, names, settings in zip(configurations, known, split):
            if name in names:
                settings[name] = _checked(kind, name, value)
    return Settings(*split)


def _checked(kind: type, name: str, value: Any) -> Any:
    hint = get_type_hints(kind).get(name, Any)
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"].replace("Input should be", "expected")
        raise Refused(f"megatron.{name}: {said}, found {value!r}") from error
