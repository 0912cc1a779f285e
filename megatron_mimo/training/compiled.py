"""Encoders through `torch.compile`: fewer and fused kernels, and fewer activations kept for the backward pass.

What the backward pass can compute again from what is kept anyway, such as norms and activation functions, is not kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import utils
from torch import nn


def compile_encoder(encoder: nn.Module) -> None:
    """Has the encoder compiled when it first runs; another one is compiled for other shapes."""
    _trace_through_linear_layers()
    encoder.compile()


def compiled_forward(encoder: nn.Module) -> Callable:
    """The encoder's `forward`, compiled for every shape anew: for a few shapes that stay."""
    _trace_through_linear_layers()
    return torch.compile(encoder.forward, dynamic=False)


def _trace_through_linear_layers() -> None:
    """Keeps a compiled layer in one piece.

    Megatron's row-parallel layers give no process group to the function that looks it up, which then warns
    on rank 0, and `torch.compile` breaks the graph at a warning. The group of a run does not change, so the
    function is called once, when the layer is compiled.
    """
    torch.compiler.assume_constant_result(utils.get_tensor_model_parallel_group_if_none)
