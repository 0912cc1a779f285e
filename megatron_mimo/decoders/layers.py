"""Layers of the decoders' networks, cut over tensor-parallel ranks where they are large.

Without a config every layer is plain torch, whole on every rank. With one, the large matrices are
Megatron's column- and row-parallel layers; what lies between them is computed alike on every
tensor-parallel rank, so parameters that are not cut get equal gradients without a reduction.
Parameter names are the same either way.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:  # Megatron takes seconds to import and is not needed to decode on one rank
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Sharding:
    """Where a decoder's large matrices live: whole on every rank, or cut over a group.

    Args:
        config: the language model's configuration, from which Megatron builds parallel layers; None
            keeps every matrix whole.
        groups: process groups, of which a config makes use of `tp`; None for Megatron's own.

    Example:
        >>> Sharding().column(4, 8)(torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """

    config: ModelParallelConfig | None = None
    groups: ProcessGroupCollection | None = None

    def group(self) -> ProcessGroup | None:
        """The tensor-parallel group that large matrices are cut over; None where they are whole."""
        if self.config is None:
            return None
        if self.groups is not None:
            return self.groups.tp
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        return get_tensor_model_parallel_group()

    @property
    def size(self) -> int:
        """Number of ranks a large matrix is cut over."""
        return 1 if self.config is None else self._cut_over().size()

    def whole(self, inputs: int, outputs: int) -> nn.Linear:
        """A linear layer `[..., inputs] -> [..., outputs]` that every rank holds whole."""
        dtype = torch.float32 if self.config is None else self.config.params_dtype
        layer = nn.Linear(inputs, outputs, dtype=dtype)
        bound = 1 / math.sqrt(inputs)
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)
        return layer

    def column(self, inputs: int, outputs: int, *, gather: bool = False) -> nn.Module:
        """`[..., inputs] -> [..., outputs / size]`, or `[..., outputs]` on every rank if gathered."""
        if self.config is None:
            return self.whole(inputs, outputs)
        from megatron_mimo.decoders.parallel_layers import ColumnLinear

        return ColumnLinear(inputs, outputs, config=self._layer_config(), group=self._cut_over(), gather=gather)

    def row(self, inputs: int, outputs: int) -> nn.Module:
        """`[..., inputs / size] -> [..., outputs]`, summed over the tensor-parallel ranks."""
        if self.config is None:
            return self.whole(inputs, outputs)
        from megatron_mimo.decoders.parallel_layers import RowLinear

        return RowLinear(inputs, outputs, config=self._layer_config(), group=self._cut_over())

    def _cut_over(self) -> ProcessGroup:
        return cast("ProcessGroup", self.group())  # there is one beside a config

    def _layer_config(self) -> ModelParallelConfig:
        # Rows arrive whole on every rank, also where the language model shards its sequence.
        config = cast("ModelParallelConfig", copy.copy(self.config))
        config.sequence_parallel = False
        return config


class TimeEmbedding(nn.Module):
    """Embeds a time in [0, 1] as a vector: sinusoids, then two layers.

    The sinusoids are those of Vaswani et al., arXiv 1706.03762, section 3.5, over `1000 * time`, the
    range of step numbers that diffusion models count in.

    Args:
        width: width of the embedding; even.
        sharding: only its dtype matters, the layers are whole.

    Example:
        >>> TimeEmbedding(8, Sharding())(torch.tensor([0.0, 0.5])).shape
        torch.Size([2, 8])
    """

    def __init__(self, width: int, sharding: Sharding) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"the time embedding needs an even width, got {width}")
        self.width = width
        self.hidden = sharding.whole(width, width)
        self.out = sharding.whole(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """`[n]` or scalar, float32 -> `[n, width]` or `[width]`, in the layers' dtype."""
        half = torch.arange(self.width // 2, device=time.device)
        frequencies = torch.exp(-math.log(10_000) * half / (self.width // 2))
        angle = 1000 * time.float()[..., None] * frequencies
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(waves)))


class Modulation(nn.Module):
    """Scale, shift and gate for each branch of a block from a condition (adaptive layer norm).

    Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748, section 3.2. All
    start at zero, so that each block starts as the identity.

    Args:
        width: width of the condition and of what is modulated.
        parts: how many vectors to produce, 3 for a gated branch, 2 for a last layer.
    """

    def __init__(self, width: int, parts: int, sharding: Sharding) -> None:
        super().__init__()
        self.parts = parts
        self.linear = sharding.column(width, parts * width, gather=True)
        nn.init.zeros_(cast(Tensor, self.linear.weight))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """`[..., width]` -> `parts` tensors of that shape."""
        return self.linear(F.silu(condition)).chunk(self.parts, dim=-1)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`(1 + scale) * layer_norm(x) + shift` over the last dim, which has no parameters of its own."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class FeedForward(nn.Module):
    """Two layers with GELU between, cut over tensor-parallel ranks along the wide dim."""

    def __init__(self, width: int, inner: int, sharding: Sharding) -> None:
        super().__init__()
        self.up = sharding.column(width, inner)
        self.down = sharding.row(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width] -> [..., width]`."""
        return self.down(F.gelu(self.up(x)))
