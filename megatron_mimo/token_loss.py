"""The language loss, computed at the positions whose label counts and nowhere else.

Logits are the widest tensor of a step, and most positions of a multimodal batch have none to learn: images stand
there, or a prompt. What the host knows of a batch's labels says which rows the output layer reads. They are picked
from the hidden states, gathered where tensor-parallel ranks hold parts of the sequence, and go through output layer
and cross entropy in chunks of bounded size; of several chunks none is kept, each is computed again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_mimo.route import route
from megatron_mimo.sharding import SequenceShard

#: Logits of one chunk on a rank, at most: 1 GiB of them in float32.
CHUNK = 2**28
#: On a GPU the number of rows is rounded up to a multiple of this, so that the allocator sees few sizes.
ROUND = 128


@dataclass(frozen=True, eq=False)
class CountedLabels:
    """Which labels of a context-parallel rank count.

    Attributes:
        positions: int64 `[rows]`, flat global positions `b * S + s`; behind the first `K` the position 0 fills up.
        places: int64 `[K]`, where each lies in the flattened labels `[B, S / CP]` of this rank.
    """

    positions: Tensor
    places: Tensor


def counted_labels(counts: Tensor, shard: SequenceShard, device: torch.device) -> CountedLabels:
    """The labels that count on this rank, looked up on the host.

    Args:
        counts: bool `[B, S]` on the CPU, global: True where a label counts.
        shard: of this rank, its positions on the CPU.
        device: where the answer is wanted; copied there without waiting.

    Example:
        >>> from megatron_mimo.sharding import sequence_shard
        >>> counts = torch.tensor([[True, False, False, False, True, True, False, True]])
        >>> found = counted_labels(counts, sequence_shard(8, cp_rank=0, cp_size=2), torch.device("cpu"))
        >>> found.positions, found.places
        (tensor([0, 7]), tensor([0, 3]))
    """
    places = shard.cut(counts).flatten().nonzero().squeeze(1)
    sample = places.div(shard.cp_length, rounding_mode="floor")
    within = places - sample * shard.cp_length
    if shard.cp_positions is not None:
        within = shard.cp_positions[within]
    positions = sample * shard.sequence_length + within
    # At least one: parameters that no row reaches would have no gradient for DDP to wait for.
    multiple = 1 if device.type == "cpu" else ROUND
    rows = max(1, -(-len(places) // multiple)) * multiple
    both = places.new_zeros(rows + len(places))
    both[: len(places)] = positions
    both[rows:] = places
    if device.type != "cpu":
        both = both.pin_memory().to(device, non_blocking=True)
    return CountedLabels(both[:rows], both[rows:])


class TokenLoss:
    """Output layer and loss of one microbatch, as `GPTModel.forward(output_processor=...)` calls it.

    Args:
        counted: labels that count on this rank.
        shard: the positions whose hidden states it holds.
        tensor_group: the tensor-parallel group where its ranks hold parts of the sequence (sequence parallelism),
            otherwise None.
    """

    def __init__(self, counted: CountedLabels, shard: SequenceShard, tensor_group: ProcessGroup | None) -> None:
        self._counted, self._shard, self._group = counted, shard, tensor_group

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        labels: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        scale_logits: Callable[[Tensor], Tensor],
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
        **unused: object,
    ) -> Tensor:
        """Loss of each label, `[B, S / CP]`; 0 where it does not count.

        Args:
            hidden_states: `[S_local, B, H]`, rank-local, after the final norm.
            labels: `[B, S / CP]` int64, rank-local.
            output_layer: Megatron's column-parallel layer, and
            output_weight: the tied weight `[V / TP, H]` that it is called with, or None.
            scale_logits: applied to logits.
            compute_language_model_loss: labels `[B, S]` and logits `[S, B, V / TP]` -> losses `[B, S]`.
            unused: what else Megatron gives.
        """

        def losses(rows_KH: Tensor, labels_K: Tensor) -> Tensor:
            with on_whole_rows(output_layer):
                logits, _ = output_layer(rows_KH[:, None], weight=output_weight)
            return compute_language_model_loss(labels_K[None], scale_logits(logits))[0]

        positions, places = self._counted.positions, self._counted.places
        groups = () if self._group is None else (self._group,)
        rows_KH = route(hidden_states, positions, self._shard, groups)
        labels_K = labels.new_zeros(len(positions))
        labels_K[: len(places)] = labels.flatten()[places]
        width = (output_layer.weight if output_weight is None else output_weight).shape[0]
        chunks = list(self._chunks(len(positions), width))
        # One chunk is kept for backward; of several each is computed again, or memory would grow with their number.
        again = len(chunks) > 1 and torch.is_grad_enabled()
        found = [
            checkpoint(losses, rows_KH[part], labels_K[part], use_reentrant=False, preserve_rng_state=False)
            if again
            else losses(rows_KH[part], labels_K[part])
            for part in chunks
        ]
        loss_K = torch.cat(found)
        whole = loss_K.new_zeros(labels.numel())
        return whole.index_copy(0, places, loss_K[: len(places)]).view_as(labels)

    def _chunks(self, rows: int, width: int) -> Iterator[slice]:
        size = max(1, CHUNK // width)
        return (slice(start, min(rows, start + size)) for start in range(0, rows, size))


def only_counted(losses: Tensor, loss_mask: Tensor) -> Tensor:
    """Losses `[B, S / CP]` of every label, 0 where `loss_mask` is.

    Example:
        >>> only_counted(torch.tensor([[1.0, float("nan")]]), torch.tensor([[0.5, 0.0]]))
        tensor([[1., 0.]])
    """
    return losses.masked_fill(loss_mask == 0, 0)


class on_whole_rows:
    """A column-parallel layer that takes rows which every tensor-parallel rank holds whole, for a `with` block.

    Under sequence parallelism it would gather its input; without, it sums its input's gradient over the ranks.

    Args:
        layer: Megatron's `ColumnParallelLinear`.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __enter__(self) -> None:
        self._before = self._layer.sequence_parallel
        self._layer.sequence_parallel = False

    def __exit__(self, *exception: object) -> None:
        self._layer.sequence_parallel = self._before
