"""The language loss, computed at the positions whose label counts and nowhere else.

Logits are the widest tensor of a step, and most positions of a multimodal batch have none to learn: images stand
there, or a prompt. What the host knows of a batch's labels says which rows the output layer reads. They are picked
from the hidden states, gathered where tensor-parallel ranks hold parts of the sequence, and go through output layer
and cross entropy in chunks of bounded size; of several chunks the last is kept, and the others are computed again in
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_mimo.route import route
from megatron_mimo.sharding import SequenceShard

#: Logits of one chunk on a rank, at most: 1 GiB of them in float32.
CHUNK = 2**28
#: On a GPU the number of rows is rounded up to a multiple of this at least (`rows_of_labels`).
ROUND = 128


@dataclass(frozen=True, eq=False)
class CountedLabels:
    """Which labels of a context-parallel rank count, and some more rows that do not.

    Attributes:
        positions: int64 `[rows]`, flat global positions `b * S + s`.
        places: int64 `[rows]`, where each lies in the flattened labels `[B, S / CP]` of this rank; one behind their
            end for a row that does not count.
    """

    positions: Tensor
    places: Tensor


def rows_of_labels(count: int, labels: int, device: torch.device, multiple: int | None = None) -> int:
    """How many rows the output layer reads of `count` labels that count among all `labels` of a rank.

    On a GPU a multiple of `ROUND` and of a 32nd of the labels: sizes are few, so that the allocator and CUDA
    graphs see them again. At least one: parameters that no row reaches would have no gradient for DDP to wait for.

    Args:
        count, labels: of this rank.
        device: where they are learned.
        multiple: in place of the one said above; of no more rows than there are labels.

    Example:
        >>> rows_of_labels(3, 8, torch.device("cpu")), rows_of_labels(3600, 8192, torch.device("cuda"))
        (3, 3840)
        >>> rows_of_labels(3600, 8192, torch.device("cuda"), 2048), rows_of_labels(3, 8, torch.device("cpu"), 100)
        (4096, 8)
    """
    if multiple is not None:
        return min(max(1, -(-count // multiple)) * multiple, max(labels, 1))
    multiple = 1 if device.type == "cpu" else max(1, labels // (32 * ROUND)) * ROUND
    return max(1, -(-count // multiple)) * multiple


def counted_labels(counts: Tensor, shard: SequenceShard, rows: int) -> CountedLabels:
    """The labels that count on this rank, without a host sync: the host says how many rows at most.

    Args:
        counts: bool `[B, S / CP]`, rank-local: True where a label counts; at most `rows` of them.
        shard: of this rank, its positions on the device of `counts`.
        rows: as many are read, those that do not count from positions spread over the sequence.

    Example:
        >>> from megatron_mimo.sharding import sequence_shard
        >>> shard = sequence_shard(8, cp_rank=0, cp_size=2)  # the positions 0, 1, 6, 7
        >>> found = counted_labels(torch.tensor([[True, False, False, True]]), shard, 3)
        >>> found.positions, found.places
        (tensor([0, 7, 6]), tensor([0, 3, 4]))
    """
    flat = counts.flatten()
    labels = flat.numel()
    every = torch.arange(labels, device=flat.device)
    slots = torch.where(flat, flat.cumsum(0) - 1, rows).clamp(max=rows)
    places = torch.full((rows + 1,), labels, device=flat.device).scatter_(0, slots, every)[:rows]
    # All rows at one position would queue for it in backward, where each adds its zeros.
    read = torch.where(places < labels, places, torch.arange(rows, device=flat.device) % labels)
    sample = read.div(shard.cp_length, rounding_mode="floor")
    within = read - sample * shard.cp_length
    if shard.cp_positions is not None:
        within = shard.cp_positions[within]
    return CountedLabels(sample * shard.sequence_length + within, places)


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
        labels_K = torch.cat([labels.flatten(), labels.new_zeros(1)])[places]
        width = (output_layer.weight if output_weight is None else output_weight).shape[0]
        *chunks, last = self._chunks(len(positions), width)
        # What backward begins with is kept. The others are computed again, or memory would grow with their number.
        again = partial(checkpoint, losses, use_reentrant=False, preserve_rng_state=False)
        run = again if torch.is_grad_enabled() else losses
        found = [run(rows_KH[part], labels_K[part]) for part in chunks]
        loss_K = torch.cat([*found, losses(rows_KH[last], labels_K[last])])
        # One slot more, for the rows that do not count: what is left there has no gradient.
        whole = loss_K.new_zeros(labels.numel() + 1)
        return whole.index_copy(0, places, loss_K)[:-1].view_as(labels)

    def _chunks(self, rows: int, width: int) -> list[slice]:
        """At least one; the last is as large as one may be, since it is computed once."""
        size = max(1, CHUNK // width)
        ends = range(rows % size or min(rows, size), rows + 1, size)
        return [slice(max(0, end - size), end) for end in ends]


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
