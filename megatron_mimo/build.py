"""Specs -> modules, handing each constructor what it takes of what the model offers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module
from torch import nn

from megatron_mimo import specs


def build(spec: ModuleSpec | type, offered: Mapping[str, object]) -> object:
    """The module that `spec` describes.

    Without TransformerEngine, Megatron's vision models fall back to `nn.LayerNorm` and then build it
    from a transformer configuration, which fails. Such a default is replaced by a norm that can be.

    Args:
        spec: a `ModuleSpec` or a class.
        offered: keyword arguments for constructors that name them; the spec's own params win.
    """
    given = spec.params if isinstance(spec, ModuleSpec) else {}
    taken = constructor_parameters(spec)
    fallbacks = {key: specs.norm() for key, p in taken.items() if p.default is nn.LayerNorm}
    offered = {**fallbacks, **offered}
    return build_module(spec, **{key: value for key, value in offered.items() if key in taken and key not in given})


def constructor_parameters(spec: ModuleSpec | type) -> Mapping[str, inspect.Parameter]:
    """Parameters that the constructor of a spec's module names."""
    return inspect.signature(get_module(spec)).parameters
