"""Specs -> modules, handing each constructor what it takes of what the model offers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module
from torch import nn

from megatron_mimo import specs

type Made = type | Callable[..., nn.Module]
type Spec = ModuleSpec | Made | nn.Module


def build(
    spec: Spec, offered: Mapping[str, object], *, through_keywords: bool = False, what: str = "a module"
) -> nn.Module:
    """The module that `spec` describes.

    Without TransformerEngine, Megatron's vision models fall back to `nn.LayerNorm` and then build it
    from a transformer configuration, which fails. Such a default is replaced by a norm that can be.

    Args:
        spec: a `ModuleSpec` of a class, or of a function or method that makes the module (`X.from_pretrained`); the
            class or function itself; or a module that is built already, which is taken as it is.
        offered: keyword arguments for constructors that name them; the spec's own params win.
        through_keywords: give them to a constructor with `**kwargs` too, which hands them on.
        what: names the module in an error.

    Raises:
        TypeError: what makes no module, or params for one that is built already.
        ValueError: modules of Megatron before its parallel state is there.
    """
    made_by = maker(spec, what)
    given = (spec.params or {}) if isinstance(spec, ModuleSpec) else {}
    if isinstance(made_by, nn.Module):
        if given:
            raise TypeError(f"{what}: {type(made_by).__name__} is built, its params {sorted(given)} change nothing")
        return made_by
    if inspect.isroutine(given.get("transformer_layer_spec")):
        raise TypeError(
            f"{what}: transformer_layer_spec must be the spec of layers here, found {given['transformer_layer_spec']}. "
            "Call it; a language model alone is given the function, which is called on each pipeline stage."
        )
    taken = inspect.signature(made_by).parameters
    fallbacks = {key: specs.norm() for key, p in taken.items() if p.default is nn.LayerNorm}
    offered = {**fallbacks, **offered}
    anything = through_keywords and takes_any(taken)
    chosen = {key: value for key, value in offered.items() if (key in taken or anything) and key not in given}
    try:
        made = _made(spec, made_by, given, chosen)
    except AssertionError:
        check_parallel_state(what)
        raise
    if not isinstance(made, nn.Module):
        raise TypeError(f"{what}: {name_of(made_by)} made {type(made).__name__}, expected a torch.nn.Module")
    return made


def maker(spec: Spec, what: str = "a module") -> Made | nn.Module:
    """What makes the module of a spec: a class, a function or a method; a module that is built already is itself.

    Raises:
        TypeError: something else.
    """
    made_by = spec.module if isinstance(spec, ModuleSpec) else spec
    if isinstance(made_by, tuple):
        made_by = get_module(spec)
    if isinstance(made_by, ModuleSpec) or not callable(made_by):
        raise TypeError(
            f"{what}: expected a ModuleSpec, a class, a function that makes the module, or a torch.nn.Module, found "
            f"{spec!r}"
        )
    return made_by


def constructor_parameters(spec: Spec) -> Mapping[str, inspect.Parameter]:
    """Parameters that the constructor of a spec's module names."""
    return inspect.signature(maker(spec)).parameters


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a constructor takes keywords that it does not name."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def check_parallel_state(what: str, groups: object = None) -> None:
    """Refuses to build what takes Megatron's global process groups before there are any.

    Args:
        what: is built.
        groups: process groups of its own, or None.

    Raises:
        ValueError: saying what to call.
    """
    if groups is None and not parallel_state.model_parallel_is_initialized():
        raise ValueError(
            f"{what} takes Megatron's process groups, but its parallel state is not initialised. Call "
            "megatron_mimo.initialize() first, or give a pg_collection."
        )


def _made(spec: Spec, made_by: Made, given: Mapping[str, object], chosen: Mapping[str, object]) -> object:
    if isinstance(made_by, type):
        return build_module(spec, **chosen)
    inner = spec.submodules if isinstance(spec, ModuleSpec) else None
    return made_by(**given, **chosen, **({} if inner is None else {"submodules": inner}))


def name_of(made_by: Made) -> str:
    """What an error calls a class, a function or a method.

    Example:
        >>> name_of(nn.Linear.forward)
        'Linear.forward'
    """
    return made_by.__qualname__ if inspect.isroutine(made_by) or isinstance(made_by, type) else repr(made_by)
