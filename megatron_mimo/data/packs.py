"""Samples -> the keyword arguments of `MimoModel.forward`, packed into one sequence or padded into a batch.

Everything is made on the host: shifted labels, positions, boundaries, and the media's tensors in the order of their
places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mimo.data.packing import PackShape
from megatron_mimo.data.readers import Inputs
from megatron_mimo.data.samples import Item, Sample

IGNORED = -100
"""Label of positions that do not count."""


@dataclass(frozen=True)
class Pack:
    """Samples laid end to end, or one below the other, as a model takes them.

    Args:
        input_ids: int64 `[B, S]`; B is 1 where samples are packed.
        labels: int64 `[B, S]`, the next token where it is learned, `IGNORED` elsewhere.
        loss_mask: float32 `[B, S]`, 1 where a label counts.
        position_ids: int64 `[B, S]`, or `[k, B, S]` for rotary embeddings of k sections.
        modality_inputs: modality -> encoder -> keyword -> tensor of all items.
        modality_targets: modality -> decoder -> keyword -> tensor of all items.
        cu_seqlens: int32 `[samples + 1]`, boundaries of the samples themselves; None where they are not packed.
        cu_seqlens_padded: int32 `[samples + 1]`, where each begins in `input_ids`; the last one holds the rest.
        padding_mask: bool `[B, S]`, True behind the samples of a batch; None where they are packed, since the
            boundaries tell.
        spans: int32 `[S]`, of rows `[B, S]`, the number of the item at positions that see the whole of it, else -1;
            None without any.
        names: where the samples come from.
        positions: the samples' numbers in the run's order.
        deltas: of each sample, see `positions`.
        tokens: positions that are not padding.
        cost: of all media.
        sources: int64 `[B, S]`, which source of a blend each position is of; None of one source.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    modality_inputs: Mapping[str, Inputs]
    modality_targets: Mapping[str, Inputs]
    cu_seqlens: Tensor | None
    cu_seqlens_padded: Tensor | None
    padding_mask: Tensor | None
    spans: Tensor | None
    names: tuple[str, ...]
    positions: tuple[int, ...]
    deltas: tuple[int, ...]
    tokens: int
    cost: float
    sources: Tensor | None = None

    @property
    def waste(self) -> float:
        """Share of the positions that are padding."""
        return 1 - self.tokens / self.input_ids.numel()

    def batch(self) -> dict[str, object]:
        """Keyword arguments of `MimoModel.forward`, without those that need Megatron (`packed_seq_params`)."""
        given: dict[str, object] = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "loss_mask": self.loss_mask,
            "position_ids": self.position_ids,
        }
        if self.padding_mask is not None:
            given["padding_mask"] = self.padding_mask
            if self.spans is not None:
                given["attention_mask"] = ~_seen(self.spans)[:, None]
        if self.modality_inputs:
            given["modality_inputs"] = self.modality_inputs
        if self.modality_targets:
            given["modality_targets"] = self.modality_targets
        return given


def packed(samples: Sequence[Sample], shape: PackShape, *, pad_id: int = 0, positions: Sequence[int] = ()) -> Pack:
    """One sequence of `shape.length` tokens that holds the samples end to end.

    Args:
        samples: that fit, each padded to the shape's multiple.
        shape: of the pack.
        pad_id: token between and behind samples.
        positions: the samples' numbers in the run's order.

    Raises:
        ValueError: no sample, or more than fit.

    Example:
        >>> def sample(*ids):
        ...     learn = torch.ones(len(ids), dtype=torch.bool)
        ...     return Sample(torch.tensor(ids), learn, (), torch.arange(len(ids))[None])
        >>> pack = packed([sample(5, 6, 7), sample(8, 9)], PackShape(length=8, multiple=2))
        >>> pack.input_ids, pack.labels
        (tensor([[5, 6, 7, 0, 8, 9, 0, 0]]), tensor([[   6,    7, -100, -100,    9, -100, -100, -100]]))
        >>> pack.cu_seqlens, pack.cu_seqlens_padded
        (tensor([0, 3, 5], dtype=torch.int32), tensor([0, 4, 8], dtype=torch.int32))
    """
    if not samples:
        raise ValueError("a pack needs at least one sample")
    lengths = [len(sample) for sample in samples]
    room = [shape.padded(length) for length in lengths]
    if sum(room) > shape.length:
        raise ValueError(f"samples of {lengths} tokens take {sum(room)} positions, expected at most {shape.length}")
    room[-1] += shape.length - sum(room)
    rows = [_row(sample, width, pad_id) for sample, width in zip(samples, room)]
    ids, labels, position_ids = (torch.cat(parts, dim=-1) for parts in zip(*rows))
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    padded = F.pad(torch.tensor(room).cumsum(0), (1, 0)).int()
    boundaries = (cu_seqlens, padded, _spans(samples, padded))
    return _pack(samples, ids[None], labels[None], position_ids[:, None], boundaries, positions)


def padded(samples: Sequence[Sample], length: int, *, pad_id: int = 0, positions: Sequence[int] = ()) -> Pack:
    """A batch with a sample a row, each padded to `length`.

    Where media see the whole of themselves the batch has an `attention_mask`, `[B, 1, S, S]`: packs need none.

    Raises:
        ValueError: no sample, or one that is longer.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    longest = max(len(sample) for sample in samples)
    if longest > length:
        raise ValueError(f"a sample of {longest} tokens does not fit rows of {length}")
    rows = [_row(sample, length, pad_id) for sample in samples]
    ids, labels, position_ids = (list(parts) for parts in zip(*rows))
    spans = _spans(samples, torch.arange(len(samples) + 1) * length)
    boundaries = (None, None, None if spans is None else spans.view(len(samples), length))
    return _pack(samples, torch.stack(ids), torch.stack(labels), torch.stack(position_ids, 1), boundaries, positions)


def sources_of(pack: Pack, sources: Sequence[int]) -> Tensor:
    """Which source each position of a pack is of: int64 `[B, S]`; padding is of the sample before it.

    Args:
        pack: of samples.
        sources: of each sample.

    Example:
        >>> learn = torch.ones(2, dtype=torch.bool)
        >>> samples = [Sample(torch.tensor([5, 6]), learn, (), torch.arange(2)[None]) for _ in range(2)]
        >>> sources_of(packed(samples, PackShape(length=6, multiple=3)), [1, 0])
        tensor([[1, 1, 1, 0, 0, 0]])
    """
    if pack.cu_seqlens_padded is None:
        return torch.tensor(sources)[:, None].repeat(1, pack.input_ids.shape[1])
    return torch.tensor(sources).repeat_interleave(pack.cu_seqlens_padded.diff())[None]


def _spans(samples: Sequence[Sample], padded: Tensor) -> Tensor | None:
    """The number of the item at each position that sees the whole of it."""
    spans = torch.full((int(padded[-1]),), -1, dtype=torch.int32)
    number = 0
    for start, sample in zip(padded.tolist(), samples):
        for item in sample.items:
            if item.whole:
                spans[start + item.start : start + item.start + item.length] = number
                number += 1
    return spans if number else None


def _seen(spans: Tensor) -> Tensor:
    """Which positions each sees, bool `[B, S, S]`: those before it, and all of its own span."""
    before = torch.ones(spans.shape[1], spans.shape[1], dtype=torch.bool).tril()
    return before | ((spans[:, :, None] == spans[:, None]) & (spans >= 0)[:, None])


def _row(sample: Sample, width: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[width]`, labels `[width]` and positions `[k, width]` of one sample."""
    rest = width - len(sample)
    labels = torch.full((width,), IGNORED)
    labels[: len(sample) - 1] = torch.where(sample.learn[1:], sample.input_ids[1:], IGNORED)
    # Padding counts on, as models do that count by themselves.
    following = (torch.arange(len(sample), width) + sample.delta).expand(len(sample.position_ids), -1)
    positions = torch.cat([sample.position_ids, following], dim=1)
    return F.pad(sample.input_ids, (0, rest), value=pad_id), labels, positions


def _pack(
    samples: Sequence[Sample],
    ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    boundaries: tuple[Tensor | None, Tensor | None, Tensor | None],
    positions: Sequence[int],
) -> Pack:
    items = [item for sample in samples for item in sample.items]
    return Pack(
        input_ids=ids,
        labels=labels,
        loss_mask=(labels != IGNORED).float(),
        position_ids=position_ids[0] if position_ids.shape[0] == 1 else position_ids,
        modality_inputs=joined(item for item in items if not item.written),
        modality_targets=joined(item for item in items if item.written),
        cu_seqlens=boundaries[0],
        cu_seqlens_padded=boundaries[1],
        padding_mask=_behind(samples, ids.shape[1]) if boundaries[0] is None else None,
        spans=boundaries[2],
        names=tuple(sample.name for sample in samples),
        positions=tuple(positions),
        deltas=tuple(sample.delta for sample in samples),
        tokens=sum(len(sample) for sample in samples),
        cost=sum(sample.cost for sample in samples),
    )


def _behind(samples: Sequence[Sample], length: int) -> Tensor:
    """Positions behind each sample, bool `[samples, length]`."""
    return torch.arange(length) >= torch.tensor([len(sample) for sample in samples])[:, None]


def joined(items: Iterable[Item]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The items' tensors by modality, encoder or decoder, and keyword, one behind the other along dim 0.

    Dims behind the first that differ, such as the frames of sounds, are padded with zeros to the longest. Written items
    that are not learned bring a `weight` of 0 for their rows, and then the others of their decoder one of 1.

    Raises:
        ValueError: items of one modality that bring different tensors.
    """
    lists: dict[str, dict[str, dict[str, list[Tensor]]]] = {}
    weights: dict[str, list[Tensor]] = {}
    for item in items:
        modality = lists.setdefault(item.modality, {})
        for part, tensors in item.tensors.items():
            for keyword, tensor in tensors.items():
                modality.setdefault(part, {}).setdefault(keyword, []).append(tensor)
        weights.setdefault(item.modality, []).append(torch.full((item.rows,), float(item.learn)))
    together = {
        name: {part: {word: _cat(name, all) for word, all in words.items()} for part, words in parts.items()}
        for name, parts in lists.items()
    }
    for name, weight in weights.items():
        if not all(one.all() for one in weight):
            for tensors in together[name].values():
                tensors.setdefault("weight", torch.cat(weight))
    return together


def _cat(modality: str, tensors: Sequence[Tensor]) -> Tensor:
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    if len({tensor.dim() for tensor in tensors}) > 1:
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ValueError(f"{modality}: tensors of shapes {shapes} of different items cannot be joined")
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
    whole = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *widest)
    at = 0
    for tensor in tensors:
        whole[(slice(at, at + len(tensor)), *(slice(0, size) for size in tensor.shape[1:]))] = tensor
        at += len(tensor)
    return whole
