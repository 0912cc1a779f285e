"""Encoders and layers of a language model through `torch.compile`: fewer kernels, each of which does more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from megatron_mimo.compat.megatron import trace_through_linear_layers
from megatron_mimo.idle import gather_parameters, without_gathering


class CompiledForward:
    """Stands in for the `forward` of an encoder or a layer, compiled when it first runs.

    What DDP does before a part's forward pass (`overlap_param_gather`) is done for all parts first: inside
    compiled code it would take it to pieces.

    Args:
        module: any. Megatron's layers are compiled in one piece if their attention draws no dropout from
            Megatron's random number tracker, as torch's fused attention does not.
        dynamic: None: a second shape is compiled for all shapes that follow; False: each for itself.
    """

    def __init__(self, module: nn.Module, dynamic: bool | None = None) -> None:
        trace_through_linear_layers()
        self._parts = tuple(module.modules())
        self._forward = torch.compile(module.forward, dynamic=dynamic)

    def __call__(self, *args, **keywords):
        """What the module gives for these inputs, to rounding."""
        gather_parameters(self._parts)
        with without_gathering(self._parts):
            return self._forward(*args, **keywords)


def compile_layers(language_model: nn.Module) -> None:
    """Has each layer of a language model's decoder train compiled; layers that are alike are compiled once.

    Evaluation and generation run them as they are: what attention keeps while a model answers lies outside the layer.
    Residual additions, norms, rotary angles and activations become few kernels. Embedding, output layer, loss and
    heads of multi-token prediction stay as they are.

    Args:
        language_model: a `GPTModel` or `HybridModel` with layers in plain torch.

    Raises:
        ValueError: layers of TransformerEngine, which `torch.compile` would take to pieces.
    """
    layers = cast(nn.ModuleList, cast(nn.Module, language_model.decoder).layers)
    for module in layers.modules():
        if any(kind.__module__.startswith("transformer_engine") for kind in type(module).__mro__):
            raise ValueError(
                "compiled: 'language_model' has layers of TransformerEngine, which torch.compile would take to pieces. "
                "Build them with backend 'torch' and `specs.with_fused_attention`, or leave the language model out."
            )
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward, CompiledForward(layer))


def _forward(layer: nn.Module, plain: Callable[..., Any], compiled: CompiledForward, *args, **keywords) -> Any:
    return (compiled if layer.training else plain)(*args, **keywords)
