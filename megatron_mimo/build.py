"""Specs -> modules, handing each constructor what it takes of what the model offers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module
from torch import nn

from megatron_mimo import specs


def build(spec: ModuleSpec | type, offered: Mapping[str, object], *, through_keywords: bool = False) -> object:
    """The module that `spec` describes.

    Without TransformerEngine, Megatron's vision models fall back to `nn.LayerNorm` and then build it
    from a transformer configuration, which fails. Such a default is replaced by a norm that can be.

    Args:
        spec: a `ModuleSpec` or a class.
        offered: keyword arguments for constructors that name them; the spec's own params win.
        through_keywords: give them to a constructor with `**kwargs` too, which hands them on.
    """
    given = spec.params if isinstance(spec, ModuleSpec) else {}
    taken = constructor_parameters(spec)
    fallbacks = {key: specs.norm() for key, p in taken.items() if p.default is nn.LayerNorm}
    offered = {**fallbacks, **offered}
    anything = through_keywords and takes_any(taken)
    chosen = {key: value for key, value in offered.items() if (key in taken or anything) and key not in given}
    return build_module(spec, **chosen)


def constructor_parameters(spec: ModuleSpec | type) -> Mapping[str, inspect.Parameter]:
    """Parameters that the constructor of a spec's module names."""
    return inspect.signature(get_module(spec)).parameters


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a constructor takes keywords that it does not name."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
