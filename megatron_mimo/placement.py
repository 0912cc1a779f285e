"""Token ids -> for every position which row fills it, and for every modality which positions it reads or writes.

Integers only, and nothing from Megatron-Core is imported. A collator builds the placement on the CPU, in a worker, and
sends it along with the batch; a model handed bare token ids builds it on their device without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor

from megatron_mimo.deferred import Arrival, Checks
from megatron_mimo.kernels import kernels_for
from megatron_mimo.tally import (
    HostFacts,
    check_ids,
    verify_boundaries,
    verify_media,
    verify_rows,
    verify_spans,
    verify_vocabulary,
    without_spare,
)


@dataclass(frozen=True)
class TokenList:
    """Where one special or generation token stands in the batch.

    Attributes:
        token_id: the token; None for the table of all positions without a special token.
        index: its row in `Placement.positions` and `Placement.counts_table`.
    """

    token_id: int | None
    index: int


@dataclass(frozen=True, eq=False)
class Placement:
    """What fills each position of one batch. Build it with `build_placement`.

    Attributes:
        names: the reading tables, in the order of the codes in `source`.
        source: int32 [B, S]; -1 for text, otherwise the index in `names` of the table that fills the position.
        row: int32 [B, S]; the row of that table. Rows are numbered in the order of the flattened batch, sample 0
            first. 0 for text.
        positions: int32 [tables + generation tokens, B * S]; the flat position `b * S + s` of each row of each table
            and of each generation token, then -1.
        counts_table: int64 [tables + generation tokens + 1, B]; tokens per sample. The last line counts the text
            tokens outside the vocabulary.
        reading, generation: each table's and each modality's `TokenList`.
        cu_seqlens: int [sequences + 1], the padded boundaries of packed sequences, or None.
        vocabulary_size: the text ids were checked against this size; None if they were not.
        host: what is known on the host, None for a placement whose counts stay on the device.
        arrival: `counts_table` on its way to the host, for deferred checks; None where the host knows it.
        ids: [B, S], the `input_ids` it was made from, which a model compares with those it is given; None where the
            two travel together and nothing can come between them.
        checks: owner of the checks that wait for the device.
    """

    names: tuple[str, ...]
    source: Tensor
    row: Tensor
    positions: Tensor
    counts_table: Tensor
    reading: Mapping[str, TokenList]
    generation: Mapping[str, TokenList]
    cu_seqlens: Tensor | None
    vocabulary_size: int | None
    host: HostFacts | None
    arrival: Arrival | None
    ids: Tensor | None
    checks: Checks = field(default_factory=Checks, repr=False)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.source.shape[0]

    @property
    def sequence_length(self) -> int:
        """S, the global length."""
        return self.source.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.source.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Placement:
        """The same placement on another device; what the host knows stays known."""
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Placement:
        """The same placement in pinned memory; a `DataLoader(pin_memory=True)` calls this."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Placement:
        tensors = ("source", "row", "positions", "counts_table", "cu_seqlens", "ids")
        moved: dict[str, Any] = {name: None if (x := getattr(self, name)) is None else move(x) for name in tensors}
        return replace(self, **moved)

    def bound(self) -> Placement:
        """The same placement without `ids`: it travels with them, so that nobody compares them again."""
        return replace(self, ids=None)

    def counting(self, loss_mask: Tensor) -> Placement:
        """The same placement, whose host knows which labels count: those with a mask [B, S], on the CPU, unlike 0."""
        return replace(self, host=self.host and replace(self.host, counted=loss_mask != 0))

    @property
    def settled(self) -> bool:
        """Whether the batch was checked on the host (`MimoModel.settle`)."""
        return self.host is not None and self.host.settled

    @property
    def awaited(self) -> Arrival:
        """`arrival`, where `host` is None."""
        return cast(Arrival, self.arrival)

    # Counts and spans

    def counts(self, name: str) -> Tensor:
        """int64 [B], on `device`: how many positions of each sample the reading table fills."""
        return self.counts_table[self._reading(name).index]

    def generation_count(self, name: str) -> int | None:
        """How many generation tokens the modality has in the batch; None if only the device knows."""
        return self._known_total(self._generating(name))

    def generation_total(self, name: str) -> Tensor:
        """int64 [], on `device`: how many generation tokens the modality has in the batch."""
        return self.counts_table[self._generating(name).index].sum()

    def spans(self, name: str) -> Tensor:
        """int64 [number of spans, 3] on the CPU: sample, first position and end of each run of the table's token.

        A run ends with its sample or packed sequence.

        Raises:
            ValueError: if the placement was built on the device: the host would have to wait for it.

        Example:
            >>> ids = torch.tensor([[7, 9, 9, 7], [9, 7, 7, 9]])
            >>> build_placement(ids, {"images": 9}).spans("images")
            tensor([[0, 1, 3],
                    [1, 0, 1],
                    [1, 3, 4]])
        """
        listing = self._reading(name)
        if self.host is None:
            raise ValueError(
                f"the spans of {name!r} are not known on the host: this placement was built on {self.device} "
                "without waiting for it. Build it on the CPU, in the collator."
            )
        return self.host.spans(listing.index, self.sequence_length)

    def check_rows(self, name: str, n_rows: int, rows_per_item: Sequence[int] | None = None) -> None:
        """Holds the number of embeddings against the number of special tokens.

        Now if the host knows the counts, otherwise once they have arrived: at the latest when the next step begins.

        Args:
            name: the reading table.
            n_rows: N, the rows that arrived for it.
            rows_per_item: rows of each image or clip, in order, by which a shift between two samples is found too.

        Raises:
            ValueError: naming the modality, the sample and both counts.
        """
        listing = self._reading(name)
        items = None if rows_per_item is None else tuple(rows_per_item)
        if items is not None and sum(items) != n_rows:
            raise ValueError(
                f"{name}: rows_per_item adds up to {sum(items)}, but there are {n_rows} embeddings. It should "
                "hold the number of embeddings of each item."
            )
        if self.host is not None:
            self.checks.came(name, n_rows, items)
            n_rows, items = without_spare(n_rows, items, self.host.spare.get(name, 0))
            if items is not None or self.host.totals[listing.index] != n_rows:
                spans = None if items is None else self.host.spans(listing.index, self.sequence_length)
                verify_rows(name, "special", self.host.counts[listing.index], n_rows, items, spans)
            return
        self.checks.check(
            self.awaited,
            lambda counts: verify_rows(name, "special", counts[listing.index].tolist(), n_rows, items),
            (name, "special", n_rows, items),
        )

    def check_generation(self, name: str, n_rows: int, span: int = 1, medium: int = 1) -> None:
        """Holds the number of target rows against the number of generation tokens, as `check_rows` does.

        Args:
            name: the modality.
            n_rows: rows that the targets stand for.
            span: rows decoded together, of which every run (on the device: sample) has a whole number.
            medium: rows of one image or clip, which need not stand in a row, but in one sample.

        Raises:
            ValueError: as `check_rows`.
        """
        listing = self._generating(name)

        def verify(counts: list[int], runs: Tensor | None = None) -> None:
            verify_rows(name, "generation", counts, n_rows)
            lengths = list(enumerate(counts)) if runs is None else [(i, b - a) for i, a, b in runs.tolist()]
            verify_spans(name, lengths, span)
            verify_media(name, counts, medium)

        if self.host is not None:
            runs = self.host.spans(listing.index, self.sequence_length) if span > 1 else None
            verify(self.host.counts[listing.index], runs)
            return
        self.checks.check(
            self.awaited,
            lambda counts: verify(counts[listing.index].tolist()),
            (name, "generation", n_rows, span, medium),
        )

    def raise_deferred(self) -> None:
        """Finishes every check of this placement that still waits for the device, and waits for it.

        Raises:
            ValueError: the first check that fails.
        """
        if self.arrival is not None:
            self.checks.report(only=self.arrival)

    # Generation

    def generation_positions(
        self, name: str, n: int | None = None, rule: Literal["own", "predecessor"] = "own"
    ) -> Tensor:
        """Flat positions of the hidden states that the modality's decoders read.

        Args:
            name: a modality with a generation token.
            n: how many there are; may be left out where the host knows. On the device the targets tell it: tokens
                beyond it are dropped, missing ones read position 0, until `check_generation` reports.
            rule: "own" reads at the token, "predecessor" one position before it, as next-token prediction does.

        Returns:
            int64 [n] on `device`, `b * S + s` in the order of the flattened batch.

        Raises:
            ValueError: `n` is missing, or a predecessor lies before its sample or packed sequence (deferred).
        """
        if rule not in ("own", "predecessor"):
            raise ValueError(f"{name}: unknown position rule {rule!r}; expected 'own' or 'predecessor'.")
        listing = self._generating(name)
        known = self._known_total(listing)
        n = known if n is None else n
        if n is None:
            raise ValueError(
                f"{name}: the number of generation tokens is not known on the host, because this placement was "
                f"built on {self.device}. Pass n, the number of target rows."
            )
        positions = self.positions[listing.index, :n].long()
        if rule == "predecessor":
            self._check_predecessors(listing, name, positions)
            positions = positions - 1
        missing = n - positions.numel()
        return torch.nn.functional.pad(positions, (0, missing)).clamp_(min=0)

    def _check_predecessors(self, listing: TokenList, name: str, positions: Tensor) -> None:
        """Raises, deferred where only the device knows, if a token at one of the positions [n] has no predecessor."""
        if self.host is not None:
            positions = self.host.positions[listing.index, : self.host.totals[listing.index]].long()
        offset = positions.remainder(self.sequence_length)
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens if self.host is None else torch.tensor(self.host.boundaries)
            bounds = bounds.to(positions.device, torch.int64)
            last = bounds.numel() - 2
            offset = offset - bounds[(torch.searchsorted(bounds, offset, right=True) - 1).clamp(0, last)]
        first = torch.where((offset == 0) & (positions >= 0), positions, -1)

        def verify(values: Tensor) -> None:
            for position in values[values >= 0].tolist():
                sample, at = divmod(position, self.sequence_length)
                raise ValueError(
                    f"{name}: the generation token at position {at} of sample {sample} opens its sequence, so it "
                    "has no predecessor to read. Put a token before it (a begin-of-image token, say), or use a "
                    "decoder whose position rule is 'own'."
                )

        self.checks.check(Arrival(first), verify, (name, "predecessor"))

    def _reading(self, name: str) -> TokenList:
        if name not in self.reading:
            raise ValueError(f"no reading table {name!r} in this placement; it has {sorted(self.reading)}.")
        return self.reading[name]

    def _generating(self, name: str) -> TokenList:
        if name not in self.generation:
            raise ValueError(f"no generation token for {name!r} in this placement; it has {sorted(self.generation)}.")
        return self.generation[name]

    def _known_total(self, listing: TokenList) -> int | None:
        return None if self.host is None else self.host.totals[listing.index]


def build_placement(
    input_ids: Tensor,
    special_token_ids: Mapping[str, int],
    generation_token_ids: Mapping[str, int] = MappingProxyType({}),
    *,
    cu_seqlens: Tensor | None = None,
    vocabulary_size: int | None = None,
    text_table: str | None = None,
    validate: Literal["now", "deferred"] | None = None,
    checks: Checks | None = None,
) -> Placement:
    """The placement of one batch.

    Args:
        input_ids: int64 or int32 [B, S], global; any device.
        special_token_ids: reading table -> the token whose positions its rows fill. Negative ids and ids outside
            the vocabulary are fine.
        generation_token_ids: modality -> the token at which hidden states come out; may equal its special token.
        cu_seqlens: int [sequences + 1], padded boundaries of packed sequences; B is then 1.
        vocabulary_size: V. Given, text ids outside [0, V) are reported here; left out, `align` looks for them.
        text_table: makes a table of this name of all positions without a special token.
        validate: "now" waits for the device to have the counts on the host; "deferred" never waits, and a
            mismatch is reported at the latest when the next step begins. Default: "now" on the CPU, "deferred"
            elsewhere.
        checks: who owns the deferred checks, a model; None gives the placement checks of its own.

    Returns:
        The `Placement`, on the device of `input_ids`.

    Raises:
        TypeError: for ids that are no integers.
        ValueError: for an empty batch, two tables with one token, or a text id outside the vocabulary.

    Example:
        >>> placement = build_placement(torch.tensor([[7, -200, -200, 8]]), {"images": -200})
        >>> placement.source, placement.row
        (tensor([[-1,  0,  0, -1]], dtype=torch.int32), tensor([[0, 0, 1, 0]], dtype=torch.int32))
        >>> placement.check_rows("images", 3)
        Traceback (most recent call last):
        ValueError: images: sample 0 has 2 special tokens but 3 embeddings (batch: 2 special tokens, 3 embeddings). ...
    """
    check_ids(input_ids, special_token_ids, generation_token_ids, text_table, cu_seqlens)
    if validate not in ("now", "deferred", None):
        raise ValueError(f"validate should be 'now' or 'deferred', found {validate!r}.")
    if validate is None:
        validate = "now" if input_ids.device.type == "cpu" else "deferred"
    input_ids = input_ids.contiguous()
    reading_ids = tuple(special_token_ids.values())
    generation_ids = tuple(generation_token_ids.values())
    source, row, positions, counts = kernels_for(input_ids.device).plan(
        input_ids, reading_ids, generation_ids, text_is_table=text_table is not None, vocabulary_size=vocabulary_size
    )
    names = (*special_token_ids, *(() if text_table is None else (text_table,)))
    ids = (*reading_ids, *(() if text_table is None else (None,)), *generation_ids)
    listings = [TokenList(token_id, index) for index, token_id in enumerate(ids)]
    facts = None
    if validate == "now":
        boundaries = None if cu_seqlens is None else cu_seqlens.tolist()
        if boundaries is not None:
            verify_boundaries("cu_seqlens", boundaries, input_ids.shape[1])
        facts = HostFacts(counts.tolist(), positions.cpu(), boundaries)
    placement = Placement(
        names=names,
        source=source,
        row=row,
        positions=positions,
        counts_table=counts,
        reading=dict(zip(names, listings[: len(names)], strict=True)),
        generation=dict(zip(generation_token_ids, listings[len(names) :], strict=True)),
        cu_seqlens=cu_seqlens,
        vocabulary_size=vocabulary_size,
        host=facts,
        arrival=Arrival(counts) if validate == "deferred" else None,
        ids=input_ids,
        checks=Checks() if checks is None else checks,
    )
    if vocabulary_size is not None:
        _check_vocabulary(placement, vocabulary_size)
    return placement


def _check_vocabulary(placement: Placement, size: int) -> None:
    """Raises, now or deferred, if a text id lies outside the vocabulary of `size` tokens."""
    advice = "Declare those that are special tokens in special_token_ids, or mask them out of the batch."

    def verify(counts: Tensor) -> None:
        verify_vocabulary("token ids", counts[-1].tolist(), size, advice)

    if placement.host is not None:
        verify(torch.tensor(placement.host.counts))
    else:
        placement.checks.check(placement.awaited, verify, "vocabulary")
