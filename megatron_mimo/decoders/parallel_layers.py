"""Megatron's parallel linear layers with the call of `torch.nn.Linear`: one tensor in, one out."""

from __future__ import annotations

import math
from functools import partial

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.distributed import ProcessGroup


class ColumnLinear(ColumnParallelLinear):
    """`[..., inputs] -> [..., outputs / size]`, or `[..., outputs]` on every rank if gathered.

    Backward all-reduces the gradient of the input over `group`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        config: ModelParallelConfig,
        group: ProcessGroup,
        gather: bool,
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=partial(uniform_by_inputs, inputs=inputs),
            gather_output=gather,
            tp_group=group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The product without Megatron's second output, the bias it did not skip."""
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """`[..., inputs / size] -> [..., outputs]`, summed over `group` in forward."""

    def __init__(self, inputs: int, outputs: int, *, config: ModelParallelConfig, group: ProcessGroup) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=partial(uniform_by_inputs, inputs=inputs),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The product without Megatron's second output, the bias it did not skip."""
        return super().forward(x)[0]


def uniform_by_inputs(weight: Tensor, inputs: int) -> Tensor:
    """Fills a weight, or a shard of one, from `Uniform(-b, b)` with `b = 1 / sqrt(inputs)`."""
    bound = 1 / math.sqrt(inputs)
    return torch.nn.init.uniform_(weight, -bound, bound)
