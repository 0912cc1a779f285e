"""An encoder's forward and backward pass through `torch.compile`: fewer kernels, each of which does more."""

from __future__ import annotations

import torch
from torch import nn

from megatron_mimo.compat.megatron import trace_through_linear_layers
from megatron_mimo.idle import gather_parameters, without_gathering


class CompiledForward:
    """Stands in for the `forward` of an encoder, compiled when it first runs.

    What DDP does before a part's forward pass (`overlap_param_gather`) is done for all parts first: inside
    compiled code it would take it to pieces.

    Args:
        encoder: any. Megatron's layers are compiled in one piece if their attention draws no dropout from
            Megatron's random number tracker, as torch's fused attention does not.
        dynamic: None: a second shape is compiled for all shapes that follow; False: each for itself.
    """

    def __init__(self, encoder: nn.Module, dynamic: bool | None = None) -> None:
        trace_through_linear_layers()
        self._parts = tuple(encoder.modules())
        self._forward = torch.compile(encoder.forward, dynamic=dynamic)

    def __call__(self, *args, **keywords):
        """What the encoder gives for these inputs, to rounding."""
        gather_parameters(self._parts)
        with without_gathering(self._parts):
            return self._forward(*args, **keywords)
