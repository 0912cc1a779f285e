"""A loss as a sum and a count, so that how a batch was cut never changes its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss before normalisation: what was summed and over how many.

    Means of unequal parts do not average to the mean of the whole; sums and counts add up over
    microbatches and ranks, and are divided once at the end.

    Args:
        sum: scalar, float32, rank-local, with gradient: the loss summed over what `count` counts.
        count: scalar, float32 or int64, rank-local, without gradient, on the same device.

    Example:
        >>> import torch
        >>> a = LossTerm(torch.tensor(6.0), torch.tensor(3.0))
        >>> b = LossTerm(torch.tensor(2.0), torch.tensor(1.0))
        >>> (a + b).mean()
        tensor(2.)
    """

    sum: Tensor
    count: Tensor

    def __add__(self, other: LossTerm) -> LossTerm:
        """Both terms as one, as if their parts had been one batch."""
        return LossTerm(self.sum + other.sum, self.count + other.count)

    def mean(self) -> Tensor:
        """`sum / count`, and zero with a zero gradient where nothing was counted."""
        return self.sum / self.count.masked_fill(self.count == 0, 1)


def language_term(loss_per_token: Tensor, loss_mask: Tensor | None = None) -> LossTerm:
    """The language model's term.

    Args:
        loss_per_token: `[B, S / cp]`, rank-local, with gradient.
        loss_mask: `[B, S / cp]`, weight of each token; None counts every one.
    """
    loss_per_token = loss_per_token.float()
    if loss_mask is None:
        count = loss_per_token.new_full((), loss_per_token.numel())
        return LossTerm(loss_per_token.sum(), count)
    loss_mask = loss_mask.to(loss_per_token.dtype)
    # where, not a product: the loss at a masked label may be infinite, and 0 * inf is NaN.
    kept = torch.where(loss_mask == 0, 0.0, loss_per_token * loss_mask)
    return LossTerm(kept.sum(), loss_mask.sum())


def global_counts(
    terms: Mapping[str, LossTerm], group: torch.distributed.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Each term's count summed over `group`, in one all-reduce of as many numbers as terms.

    Args:
        terms: the same names, in the same order, on every rank of the group.
        group: the data-parallel group, context parallelism included; None leaves the local counts.

    Returns:
        Scalars, float32. A rank where a term counted nothing gets the others' count.
    """
    if not terms:
        return {}
    counts = torch.stack([term.count.float() for term in terms.values()]).detach()
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return dict(zip(terms, counts.unbind()))


def total_loss(
    terms: Mapping[str, LossTerm],
    weights: Mapping[str, float] | None = None,
    counts: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """This rank's part of the weighted loss: the sum of `weight * sum / count` over the terms.

    With counts of the whole step (all microbatches, all data- and context-parallel ranks) the parts
    add up to the loss of the whole batch, however it was cut. So gradients must be *summed* over
    ranks and microbatches, as Megatron does with `calculate_per_token_loss=True`.

    Args:
        terms: name -> term; the name is a modality, or `modality/decoder`.
        weights: modality -> weight, 1 where it is not named.
        counts: name -> count of the whole step; None for the terms' own counts.

    Returns:
        Scalar, float32, with gradient.

    Example:
        >>> one = LossTerm(torch.tensor(6.0), torch.tensor(3.0))
        >>> total_loss({"text": one, "images/pixels": one}, {"images": 0.5})
        tensor(3.)
    """
    weights = weights or {}
    parts = []
    for name, term in terms.items():
        count = term.count if counts is None else counts[name]
        weight = weights.get(name.partition("/")[0], 1.0)
        parts.append(weight * LossTerm(term.sum, count).mean())
    return torch.stack(parts).sum()
