"""Rules: which tensors of a checkpoint one of our parameters is made of, and which part of them a rank holds.

A family's table is a list of rules. Names of ours are those of Megatron's `GPTModel` and `CLIPViTModel` on plain torch
layers, whatever the layers are built of (`hf/names.py`); ``{i}`` stands for the layer, counted over the whole model,
``{e}`` for the expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A range of one tensor's rows or columns, and where it lies in this rank's parameter.

    Args:
        name: of the checkpoint's tensor.
        dim: that is cut; None for the whole tensor, which fills the whole parameter.
        start, stop: the range in the tensor.
        at: where it begins in the parameter, along the same dim.
    """

    name: str
    dim: int | None = None
    start: int = 0
    stop: int = 0
    at: int = 0


@dataclass(frozen=True)
class Rule:
    """One of our parameters and the tensors of a checkpoint that it is made of.

    Args:
        ours: name of the parameter.
        theirs: name -> shape of each tensor, in the order in which they lie in the parameter.
        cut: how tensor-parallel ranks share the parameter. ``whole``: each has all of it. ``rows``: equal ranges of the
            rows; those beyond the tensor's last are padding. ``columns``: equal ranges of the columns. ``stacked``: of
            each tensor equal rows, one tensor's above the other's. ``grouped``: equal ranges of the rows of the
            matrix in which each query group's queries precede its key and value.
        groups: query groups, of ``grouped``.
        padded: whether rows may follow that no tensor has, as in a vocabulary whose ranks have equal parts.
        expert: whether the parameter is an expert's, shared out over the expert-tensor-parallel ranks.
        copy: whether another rule has the same tensors, so that export takes them from there.
    """

    ours: str
    theirs: Mapping[str, Shape]
    cut: Literal["whole", "rows", "columns", "stacked", "grouped"] = "whole"
    groups: int = 1
    padded: bool = False
    expert: bool = False
    copy: bool = False

    def pieces(self, rank: int, size: int, local_rows: int | None = None) -> list[Piece]:
        """What tensor-parallel rank `rank` of `size` holds, in the order in which it lies in its parameter.

        Args:
            rank, size: in the group that shares the parameter.
            local_rows: of a padded parameter, how many each rank has; None for the fewest that will do.

        Raises:
            ValueError: rows or columns that `size` does not divide.
        """
        if self.cut == "whole":
            return [Piece(name) for name in self.theirs]
        dim = 1 if self.cut == "columns" else 0
        if self.cut == "stacked":
            blocks = [(name, *_share(self.ours, shape[0], rank, size)) for name, shape in self.theirs.items()]
            return list(_laid_out(blocks, dim, 0, sum(stop - start for _, start, stop in blocks)))
        if self.cut == "grouped":
            blocks = list(self._grouped())
            start, stop = _share(self.ours, sum(shape[0] for shape in self.theirs.values()), rank, size)
            return list(_laid_out(blocks, dim, start, stop))
        ((name, shape),) = self.theirs.items()
        if self.padded:
            each = local_rows or -(-shape[0] // size)
            return list(_laid_out([(name, 0, shape[0])], 0, rank * each, (rank + 1) * each))
        start, stop = _share(self.ours, shape[dim], rank, size)
        return list(_laid_out([(name, 0, shape[dim])], dim, start, stop))

    def _grouped(self) -> Iterator[tuple[str, int, int]]:
        for group in range(self.groups):
            for name, shape in self.theirs.items():
                rows = shape[0] // self.groups
                yield name, group * rows, (group + 1) * rows

    def of(self, **numbers: int) -> Rule:
        """The rule of one layer or expert."""
        theirs = {name.format_map(_Partial(numbers)): shape for name, shape in self.theirs.items()}
        return replace(self, ours=self.ours.format_map(_Partial(numbers)), theirs=theirs)


@dataclass(frozen=True)
class Table:
    """What a checkpoint of one part of a model holds.

    Args:
        rules: one a parameter.
        unused: name -> shape of tensors that the part does not compute with; export writes them back.
        optional: names of tensors that may be there though another tensor says the same, by that tensor's name.
        ignored: patterns of names that say nothing, such as stored rotary frequencies; export leaves them out.
    """

    rules: Sequence[Rule]
    unused: Mapping[str, Shape]
    optional: Mapping[str, str]
    ignored: Sequence[str] = ()

    @property
    def expected(self) -> dict[str, Shape]:
        """Name -> shape of every tensor that a checkpoint must have."""
        return {name: shape for rule in self.rules for name, shape in rule.theirs.items()} | dict(self.unused)


def table(
    rules: Sequence[Rule],
    layers: int,
    *,
    experts: int = 0,
    unused: Sequence[Rule] = (),
    optional: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
) -> Table:
    """The table of `rules`, each with a ``{i}`` written out for every layer, with an ``{e}`` for every expert.

    Example:
        >>> norms = table([whole("decoder.layers.{i}.norm.weight", "layers.{i}.norm.weight", (4,))], layers=2)
        >>> [rule.ours for rule in norms.rules]
        ['decoder.layers.0.norm.weight', 'decoder.layers.1.norm.weight']
    """
    written = [one for rule in rules for one in _written_out(rule, layers, experts)]
    left = {name: shape for rule in unused for name, shape in rule.theirs.items()}
    return Table(written, left, dict(optional or {}), tuple(ignored))


def whole(ours: str, theirs: str, shape: Shape) -> Rule:
    """Each rank has all of it. The tensor may have another shape of as many values than the parameter."""
    return Rule(ours, {theirs: shape})


def rows(ours: str, theirs: str, shape: Shape, **options: bool) -> Rule:
    """Of a `ColumnParallelLinear` or an embedding: each rank has some rows."""
    return Rule(ours, {theirs: shape}, "rows", **options)


def vocabulary(ours: str, theirs: str, shape: Shape, **options: bool) -> Rule:
    """Rows, after the last of which there may be padding."""
    return Rule(ours, {theirs: shape}, "rows", padded=True, **options)


def columns(ours: str, theirs: str, shape: Shape, **options: bool) -> Rule:
    """Of a `RowParallelLinear`: each rank has some columns."""
    return Rule(ours, {theirs: shape}, "columns", **options)


def stacked(ours: str, theirs: Sequence[str], shape: Shape, **options: bool) -> Rule:
    """Gate and value of a gated layer: rows of each, one tensor's above the other's."""
    return Rule(ours, dict.fromkeys(theirs, shape), "stacked", **options)


def grouped(ours: str, theirs: Sequence[str], shapes: Sequence[Shape], groups: int) -> Rule:
    """Queries, keys and values of attention, group after group."""
    return Rule(ours, dict(zip(theirs, shapes, strict=True)), "grouped", groups)


class _Partial(dict):
    """Leaves placeholders that have no number yet."""

    def __missing__(self, key: str) -> str:
        return f"{{{key}}}"


def _written_out(rule: Rule, layers: int, experts: int) -> Iterator[Rule]:
    if "{i}" not in rule.ours:
        yield rule
        return
    for i in range(layers):
        of_layer = rule.of(i=i)
        if "{e}" in of_layer.ours:
            yield from (of_layer.of(e=e) for e in range(experts))
        else:
            yield of_layer


def _share(ours: str, length: int, rank: int, size: int) -> tuple[int, int]:
    if length % size:
        raise ValueError(
            f"{ours}: expected a number that tensor_model_parallel_size {size} divides, found {length} rows or "
            "columns. Choose another tensor_model_parallel_size."
        )
    return rank * length // size, (rank + 1) * length // size


def _laid_out(blocks: Sequence[tuple[str, int, int]], dim: int, start: int, stop: int) -> Iterator[Piece]:
    """The part from `start` to `stop` of `blocks` (name, first, last) laid end to end; neighbours are joined."""
    offset, held = 0, None
    for name, first, last in blocks:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            found = Piece(name, dim, first + low - offset, first + high - offset, low - start)
            if held is not None and (held.name, held.stop) == (name, found.start):
                found = replace(held, stop=found.stop)
            elif held is not None:
                yield held
            held = found
        offset += last - first
    if held is not None:
        yield held
