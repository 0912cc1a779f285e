"""Where modules of different precision meet: each is given what it computes in."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def in_dtype_of[Value](module: nn.Module, value: Value) -> Value:
    """`value` in the dtype that `module` computes in, if it is a floating-point tensor and the module has such weights.

    Encoders, projections, decoders and the language model may differ in precision (a frozen fp32 encoder in a bf16
    model), and under autocast what a module returns has another dtype than its weights.

    Example:
        >>> import torch
        >>> in_dtype_of(nn.Linear(2, 2).bfloat16(), torch.ones(2)).dtype
        torch.bfloat16
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return value if weight is None else cast(Value, value.to(weight.dtype))
