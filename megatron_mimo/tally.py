"""What the host knows of a batch's tokens: how many of each, where they stand, and whether rows fit them.

Integers only, and all of it on the CPU: a collator tallies a batch once, and everything later reads the tally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HostFacts:
    """What the host knows of a placement without asking the device.

    Attributes:
        counts: tokens per sample, for each line of `Placement.counts_table`.
        positions: `Placement.positions`, on the CPU wherever the placement itself goes.
        boundaries: `Placement.cu_seqlens`, or None.
        counted: bool [B, S] on the CPU, global: which labels count in the language loss; None where nobody told.
        settled: the batch was checked on the host, all but the number of encoded rows.
        spare: modality -> rows at the end of its table that fill no position: those of items that pad a bucket.
        label_rows: the language loss reads a multiple of so many rows; None where `rows_of_labels` says how many.
    """

    counts: list[list[int]]
    positions: Tensor = field(metadata={"on_host": True})
    boundaries: list[int] | None = None
    counted: Tensor | None = field(default=None, metadata={"on_host": True})
    settled: bool = False
    spare: Mapping[str, int] = field(default_factory=dict, metadata={"on_host": True})
    label_rows: int | None = None

    @cached_property
    def totals(self) -> list[int]:
        """Tokens in the batch, for each line of `Placement.counts_table`."""
        return [sum(line) for line in self.counts]

    def spans(self, index: int, sequence_length: int) -> Tensor:
        """int64 [number of spans, 3]: sample, first position and end of each run of the token of line `index`."""
        count = self.totals[index]
        flat = self.positions[index, :count].long()
        sample = flat.div(sequence_length, rounding_mode="floor")
        opens = torch.ones(count, dtype=torch.bool)
        opens[1:] = (flat[1:] != flat[:-1] + 1) | (sample[1:] != sample[:-1])
        if self.boundaries is not None:
            opens |= torch.isin(flat, flat.new_tensor(self.boundaries))
        closes = torch.ones(count, dtype=torch.bool)
        closes[:-1] = opens[1:]
        base = sample[opens] * sequence_length
        return torch.stack([sample[opens], flat[opens] - base, flat[closes] + 1 - base], dim=1)


def check_ids(
    input_ids: Tensor,
    special_token_ids: Mapping[str, int],
    generation_token_ids: Mapping[str, int],
    text_table: str | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuses arguments of a placement that are wrong whatever the ids are.

    Args:
        input_ids, special_token_ids, generation_token_ids, text_table, cu_seqlens: as `build_placement` takes them.

    Raises:
        TypeError: ids that are no integers.
        ValueError: an empty batch, or one that is too large, two tables with one token, packed sequences in rows.
    """
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids should be int64 or int32, found {input_ids.dtype}.")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids should be [B, S] with B and S at least 1, found shape {tuple(input_ids.shape)}.")
    if input_ids.numel() >= 2**31:
        raise ValueError(f"input_ids holds {input_ids.numel()} positions; at most 2**31 - 1 fit the placement.")
    for name, token_id in (*special_token_ids.items(), *generation_token_ids.items()):
        if type(token_id) is not int:
            raise TypeError(f"{name}: the token id should be an int, found {token_id!r}.")
        if not -(2**63) <= token_id < 2**63:
            raise ValueError(f"{name}: token id {token_id} does not fit the int64 of input_ids.")
    table_of: dict[int, str] = {}
    for name, token_id in special_token_ids.items():
        if token_id in table_of:
            raise ValueError(
                f"{table_of[token_id]!r} and {name!r} both read at token {token_id}; each needs a token of its own."
            )
        table_of[token_id] = name
    if text_table in special_token_ids:
        raise ValueError(f"{text_table!r} names the text table and cannot have a special token as well.")
    if cu_seqlens is not None and input_ids.shape[0] != 1:
        raise ValueError(
            f"packed sequences (cu_seqlens) need a batch size of 1, found {input_ids.shape[0]}: concatenate them."
        )


def outside_vocabulary(ids: Tensor, size: int) -> Tensor:
    """Which ids are none of a vocabulary of `size`: bool, of the shape of `ids`.

    Example:
        >>> outside_vocabulary(torch.tensor([0, 4, -1]), 4)
        tensor([False,  True,  True])
    """
    return (ids < 0) | (ids >= size)


def verify_vocabulary(what: str, counts: Sequence[int], size: int, advice: str) -> None:
    """Raises for the first sample with ids outside the vocabulary.

    Args:
        what: what the ids are, e.g. "token ids".
        counts: how many ids each sample has outside.
        size: V.
        advice: what to do about them.

    Raises:
        ValueError: naming the sample and how many.
    """
    for sample, count in enumerate(counts):
        if count:
            raise ValueError(
                f"text: sample {sample} has {count} {what} outside the vocabulary (0 to {size - 1}). {advice}"
            )


def verify_boundaries(name: str, bounds: Sequence[int], length: int | None, multiple: int = 1) -> None:
    """Raises for boundaries that do not cut a sequence into packed ones.

    Args:
        name: of the boundaries, for the message.
        bounds: `[sequences + 1]`.
        length: `S`, where the last one lies; None leaves that open.
        multiple: what every packed length is a multiple of.

    Raises:
        ValueError: naming the boundaries or the packed sequence.
    """
    if bounds[0] != 0 or (length is not None and bounds[-1] != length):
        raise ValueError(
            f"{name} runs from {bounds[0]} to {bounds[-1]}, expected 0 to the sequence length {length}: every position "
            "belongs to one packed sequence. Count the tail's padding to the last one (cu_seqlens_q_padded)."
        )
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if stop < start:
            raise ValueError(f"{name} falls from {start} to {stop} at packed sequence {index}, expected it to rise.")
        if (stop - start) % multiple:
            raise ValueError(
                f"packed sequence {index} runs from {start} to {stop}: its length {stop - start} should be a multiple "
                f"of 2 * context-parallel size = {multiple}. Pad every packed sequence to one."
            )


def verify_spans(name: str, lengths: Sequence[tuple[int, int]], span: int) -> None:
    """Raises `ValueError` for a run of generation tokens that is no whole number of spans.

    Args:
        lengths: (sample, number of tokens) of each run.
    """
    for sample, length in lengths:
        if length % span:
            raise ValueError(
                f"{name}: sample {sample} has {length} generation tokens in a row, which is no whole number of spans "
                f"of {span}. The decoder makes each item from {span} of them: place that many for every item."
            )


def verify_media(name: str, counts: Sequence[int], medium: int) -> None:
    """Raises `ValueError` for a sample whose generation tokens are no whole number of images or clips."""
    for sample, count in enumerate(counts):
        if count % medium:
            raise ValueError(
                f"{name}: sample {sample} has {count} generation tokens, but one image or clip takes {medium} of "
                "them: an image would begin in one sample and end in the next. Place that many for each."
            )


def without_spare(rows: int, items: tuple[int, ...] | None, spare: int) -> tuple[int, tuple[int, ...] | None]:
    """Rows, and rows of each item, without the items at the end that only pad a bucket.

    Args:
        rows: of the table.
        items: rows of each item, where known.
        spare: how many rows pad.

    Example:
        >>> without_spare(12, (4, 4, 4), 8)
        (4, (4,))
    """
    while spare and items and sum(items) > rows - spare:
        items = items[:-1]
    return rows - spare, items


def verify_rows(
    name: str,
    kind: str,
    counts: Sequence[int],
    n_rows: int,
    rows_per_item: tuple[int, ...] | None = None,
    spans: Tensor | None = None,
) -> None:
    """Raises `ValueError` unless the rows fit the tokens, sample by sample as far as that is known.

    Args:
        name: the modality.
        kind: "special" or "generation", for the message.
        counts: tokens per sample.
        n_rows: rows in the batch.
        rows_per_item: rows of each item, in order.
        spans: int64 [number of spans, 3], if known.
    """
    total = sum(counts)
    if rows_per_item is None:
        found = _rows_by_total(counts, n_rows)
    else:
        found = _rows_by_item(counts, rows_per_item)
        if found != counts and spans is not None and len(spans) == len(rows_per_item):
            # One span an item: each item's own span says in which sample it stands. Only to name the sample, since
            # images without a token between them share a span.
            by_span = [0] * len(counts)
            for sample, rows in zip(spans[:, 0].tolist(), rows_per_item, strict=True):
                by_span[sample] += rows
            found = by_span if by_span != counts else found
    for sample, (tokens, rows) in enumerate(zip(counts, found, strict=True)):
        if tokens != rows:
            embeddings = "embeddings" if kind == "special" else "target rows"
            raise ValueError(
                f"{name}: sample {sample} has {tokens} {kind} tokens but {rows} {embeddings} (batch: {total} "
                f"{kind} tokens, {n_rows} {embeddings}). Give each {kind} token one "
                f"{embeddings.removesuffix('s')}.{_unsure(counts, kind, rows_per_item)}{_usual_causes(tokens, rows)}"
            )


def _unsure(counts: Sequence[int], kind: str, rows_per_item: tuple[int, ...] | None) -> str:
    """What is not known of a mismatch that only the totals show."""
    if rows_per_item is not None or len(counts) == 1 or kind != "special":
        return ""
    return (
        f" Which sample is wrong is not known (tokens of each: {list(counts)}): only the totals were compared, since "
        "nothing told the rows of each image or clip, and rows were dealt out in order. An encoder tells them by "
        "EncodedRows(rows, rows_per_item), or the batch by rows_per_item beside the encoder's inputs."
    )


def _usual_causes(tokens: int, rows: int) -> str:
    if tokens < rows:
        return (
            " Too few tokens usually are a span that truncation cut, of this sample or whole of one before it; too "
            "many rows a class token that the encoder keeps, or the padding of audio."
        )
    return (
        " Too many tokens usually are a placeholder that the model sampled or that stands in the text by chance, or a "
        "span made for a larger image than the encoder was given."
    )


def _rows_by_total(counts: Sequence[int], n_rows: int) -> list[int]:
    """How many rows each sample gets if they are dealt out in order; the last one takes what is left over."""
    found: list[int] = []
    for tokens in counts:
        found.append(min(tokens, n_rows - sum(found)))
    found[-1] = n_rows - sum(found[:-1])
    return found


def _rows_by_item(counts: Sequence[int], rows_per_item: tuple[int, ...]) -> list[int]:
    """How many rows each sample gets if it takes whole items, in order, until its tokens have one each."""
    found = [0] * len(counts)
    sample, last = 0, len(counts) - 1
    for rows in rows_per_item:
        while sample < last and found[sample] >= counts[sample]:
            sample += 1
        found[sample] += rows
    return found
