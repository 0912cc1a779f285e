"""The protocol between a language model's rows and what turns them into a modality.

Shapes: `N` rows of one modality in this data-parallel rank's microbatch, `W` the decoder's width,
`n` items (runs of `rows_per_item` rows that must stay together), `N = n * rows_per_item`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_mimo.decoders.arguments import at_least_one, check_weight, one_of
from megatron_mimo.decoders.targets import Prepared, TargetDescription, Targets
from megatron_mimo.idle import stand_in
from megatron_mimo.losses import LossTerm

PositionRule = Literal["own", "predecessor"]


class Decoder(nn.Module, ABC):
    """Turns rows `[N, W]` at generation tokens into a loss (training) or an output (inference).

    A training step calls, in this order: `prepare` once a microbatch (checks and counts, frozen tokenizers, random
    draws), `share` (under context parallelism, this rank's items), `loss`. Inference calls `sample`. Rows and
    targets are equal on all tensor- and context-parallel ranks up to `share`.

    Subclasses define `loss` and are given a description of their targets, or define `num_rows`, and `loss_shape`
    where the loss is not one number a row; those that can generate define `sample` with the options they take in
    its signature.

    Args:
        width: `W`, the width of the rows the decoder takes.
        position_rule: `"own"` reads the hidden state at each generation token, `"predecessor"`
            that at the position before it, as next-token prediction does.
        rows_per_item: rows that belong together and stay on one rank: 1 where every row is an
            output of its own, the span's length where a whole span is decoded at once. A description knows.
        targets: describes what is learned; None where a subclass defines `num_rows`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> class Sum(Decoder):
        ...     def num_rows(self, targets):
        ...         return targets["target"].shape[0]
        ...     def loss(self, rows, targets):
        ...         error = (rows.sum(-1) - targets["target"]).square()
        ...         return LossTerm(error.sum(), error.new_tensor(error.numel()))
        >>> Sum(width=4).loss(torch.ones(2, 4), {"target": torch.ones(2)}).mean()
        tensor(9.)
    """

    def __init__(
        self,
        *,
        width: int,
        position_rule: PositionRule = "own",
        rows_per_item: int = 1,
        targets: TargetDescription | None = None,
    ) -> None:
        super().__init__()
        rows_per_item = rows_per_item if targets is None else targets.rows_per_item
        at_least_one(type(self).__name__, width=width, rows_per_item=rows_per_item)
        one_of(type(self).__name__, "position_rule", position_rule, ("own", "predecessor"))
        self.width = width
        self.position_rule = position_rule
        self.rows_per_item = rows_per_item
        self.targets = None if targets is None else targets.built()
        self.tokenizer = None if self.targets is None else self.targets.tokenizer

    @classmethod
    def describe(cls, params: Mapping[str, Any]) -> TargetDescription | None:
        """What a decoder of these constructor params learns, without building it: for a generation input on a
        pipeline stage that the decoder is not on. None where they do not tell."""
        return params.get("targets")

    def num_rows(self, targets: Targets) -> int:
        """How many generation tokens these targets stand for, read from shapes alone.

        Raises:
            TypeError, ValueError: targets that are none of this decoder's.
        """
        if self.targets is None:
            raise NotImplementedError(
                f"{type(self).__name__} must define num_rows or be given a description of targets"
            )
        return self.targets.num_rows(targets)

    @property
    def rows_per_medium(self) -> int:
        """Rows that one image, clip, ... takes: of one sample, though not always in a row."""
        return self.rows_per_item if self.targets is None else self.targets.rows_per_medium

    @property
    def sampled_rows(self) -> tuple[int, int] | None:
        """Of samples that are rows `[M, D]`, of which a modality assembles images or clips: how many an
        item gives, and `D`. None where samples are whole media, or rows of unknown width."""
        return None if self.targets is None else self.targets.sampled_rows

    def loss_shape(self, targets: Targets) -> tuple[int, ...]:
        """Shape of the losses that `loss` sums up for these targets, read from shapes alone.

        One loss a target (a row, where nothing describes them), unless a subclass says otherwise.
        """
        return (self.num_rows(targets),) if self.targets is None else self.targets.loss_shape(targets)

    def count(self, targets: Targets) -> float:
        """The count of the term that `loss` will give for these targets, before anything runs.

        A step divides by the counts of all its microbatches and ranks, so it adds them up ahead.

        Args:
            targets: what the batch brought, on the CPU; a `weight` counts as in `weighted_sum`.
        """
        shape, weight = self.loss_shape(targets), targets.get("weight")
        if weight is None:
            return float(prod(shape))
        return float(weight.sum()) * prod(shape[weight.ndim :])

    def prepare(self, targets: Targets, stream: str = "") -> Prepared:
        """The targets checked, counted, and with everything added that is computed once a microbatch, outside
        autograd.

        Args:
            targets: what the batch brought, for all `N` rows. Left unchanged.
            stream: prefix of the random stream, `"<modality>/<decoder>"`.

        Returns:
            Targets that `loss` does not check again. Draws already given in `targets` are used as they are.

        Raises:
            TypeError, ValueError: targets that are none of this decoder's.
        """
        if self.targets is None:
            return Prepared(dict(targets), self.num_rows(targets), self.rows_per_item)
        return self.targets.prepare(targets, phase(self, stream))

    def prepared(self, targets: Targets, stream: str = "") -> Prepared:
        """Prepared targets as they are, others prepared: for a `loss` that may be given either."""
        if isinstance(targets, Prepared):
            return targets
        made = self.prepare(targets, stream)
        # A `prepare` of one's own may give a plain mapping.
        return made if isinstance(made, Prepared) else Prepared(made, self.num_rows(made), self.rows_per_item)

    def share(self, targets: Targets, start_item: int, stop_item: int) -> Targets:
        """The targets of items `start_item` up to `stop_item`: one rank's part of the loss.

        Args:
            targets: for all items; the first dim of every tensor is a multiple of the number of items.

        Returns:
            Prepared targets of prepared ones, else a mapping.
        """
        if isinstance(targets, Prepared):
            return targets.share(start_item, stop_item)
        return Prepared(targets, self.num_rows(targets), self.rows_per_item).share(start_item, stop_item).tensors

    @abstractmethod
    def loss(self, rows: Tensor, targets: Targets) -> LossTerm:
        """The loss of these rows as a sum and a count, both float32 scalars.

        Args:
            rows: `[N, W]`, this rank's share, with gradient; `N` may be 0.
            targets: of the same rows; prepared ones, or a plain mapping, which is prepared here.

        Returns:
            A term whose backward gives every trainable parameter a gradient, zero if `N` is 0.
        """

    def zero_loss(self, rows: Tensor) -> LossTerm:
        """A loss over nothing: sum and count 0, and a zero gradient for every parameter.

        Ranks without an item use it, so that they enter the same gradient reductions as the others.

        Args:
            rows: any tensor whose producers need a zero gradient, typically `[0, W]`.
        """
        zero = rows.flatten()[:0].sum(dtype=torch.float32)
        zero = zero + stand_in([self]).sum(dtype=torch.float32)
        return LossTerm(zero, zero.new_zeros(()))

    def sample(self, rows: Tensor) -> Tensor:
        """The modality's output for rows `[N, W]`.

        Raises:
            NotImplementedError: this decoder has no sampler.
        """
        raise NotImplementedError(
            f"{type(self).__name__} was asked to sample from {rows.shape[0]} rows but has no sampler: "
            "it trains a condition for something outside the model. Define sample(rows, ...) in a "
            "subclass, or read the rows themselves from the model's output."
        )

    def render(self, samples: Tensor) -> Tensor:
        """What samples stand for: media where a frozen tokenizer decodes them, else as they are."""
        return samples

    def check_rows(self, rows: Tensor, expected: int | None = None) -> None:
        """Refuses rows that are not `[N, W]`, not whole items, or not as many as the targets.

        Raises:
            ValueError: naming both shapes.
        """
        name = type(self).__name__
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(
                f"{name} takes rows [N, {self.width}] but got {list(rows.shape)}. Fit its `width` or "
                "the output projection before it."
            )
        if expected is not None and rows.shape[0] != expected:
            raise ValueError(
                f"{name} got {rows.shape[0]} rows and targets for {expected}. Give one target for "
                "every generation token."
            )
        if rows.shape[0] % self.rows_per_item:
            raise ValueError(
                f"{name} decodes spans of {self.rows_per_item} rows but got {rows.shape[0]} rows, "
                "which is no whole number of spans. Put that many generation tokens in each span, or "
                "set `rows_per_item` to the span's length."
            )

    def check_noise(self, noise: Tensor, shape: tuple[int, ...]) -> None:
        """Refuses noise to start sampling from that does not fit the rows, which would be broadcast.

        Raises:
            ValueError: naming both shapes.
        """
        if tuple(noise.shape) != shape:
            raise ValueError(
                f"{type(self).__name__}'s noise must be {list(shape)} for these rows, got {list(noise.shape)}"
            )


def weighted_sum(values: Tensor, weight: Tensor | None) -> LossTerm:
    """The sum of a per-element loss over elements that count, and how many those are.

    Args:
        values: `[...]`, rank-local, with gradient.
        weight: bool or float, its shape the leading dims of `values`; None counts every element
            once.

    Returns:
        `sum(weight * values)` and `sum(weight)`, float32. What has weight 0 may be NaN.

    Raises:
        ValueError: the shapes do not fit, or, on the CPU, a weight that is negative, infinite or NaN.

    Example:
        >>> weighted_sum(torch.tensor([1.0, 5.0]), torch.tensor([True, False])).mean()
        tensor(1.)
    """
    values = values.float()
    if weight is None:
        return LossTerm(values.sum(), values.new_full((), values.numel()))
    if weight.shape != values.shape[: weight.ndim]:
        raise ValueError(
            f"weight has shape {list(weight.shape)} but the loss elements have shape "
            f"{list(values.shape)}: weight's shape must be the leading dims of theirs."
        )
    check_weight(weight)
    weight = over(weight.to(values.dtype), values).expand_as(values)
    # A product would let the NaN of an element that does not count through: 0 * NaN is NaN.
    counted = values.masked_fill(weight == 0, 0.0)
    return LossTerm((counted * weight).sum(), weight.sum())


def usable(values: Tensor, weight: Tensor | None) -> Tensor:
    """Values whose elements of weight 0 are finite, so that no NaN of padding reaches a gradient.

    Masking a NaN loss is not enough: its backward multiplies the NaN by zero. Finite values stay as
    they are, for what else may see them, like the other patches of an image.

    Args:
        values: floating `[...]`, rank-local.
        weight: its shape the leading dims of `values`, or None.

    Example:
        >>> usable(torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([1, 0, 0]))
        tensor([1., 0., 3.])
    """
    if weight is None:
        return values
    return values.masked_fill((over(weight, values) == 0) & ~values.isfinite(), 0.0)


def over(weight: Tensor, values: Tensor) -> Tensor:
    """`weight` with dims of size 1 appended, to broadcast over `values`.

    Example:
        >>> over(torch.ones(3), torch.ones(3, 4, 5)).shape
        torch.Size([3, 1, 1])
    """
    return weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))


def phase(module: nn.Module, stream: str) -> str:
    """The stream to draw from: evaluation has one of its own, so that training's draws go on as if
    it had not run.

    Example:
        >>> phase(nn.Identity().eval(), "images/pixels")
        'images/pixels/eval'
    """
    return stream if module.training else f"{stream}/eval"
