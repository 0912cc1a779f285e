"""Rows on the ranks that encoded them -> rows on the ranks that place them.

The seam between encoders and language model. Its contract, whatever stands behind it:

- takes, by table, the rows `[N, H]` that this rank encoded, in the order of the flattened batch;
- gives, by table, the rows `[N', H]` that this rank's shard of the language model places, in that order,
  the same on all of its tensor-parallel ranks;
- is differentiable, and its backward is its adjoint: the gradient of every row comes home to the rank that
  encoded it, summed over the ranks that placed it;
- every rank enters it with the same tables in the same order, with no rows where it has none, so that no rank
  waits for another in a collective.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def exchange(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that this rank places, by table.

    Encoders and language model are laid out alike here: each rank of a data-parallel group encodes what it
    places, so that the exchange is the identity and takes no collective.

    Args:
        rows: table -> `[N, H]`, encoded on this rank.

    Returns:
        Table -> `[N, H]`.

    Example:
        >>> import torch
        >>> exchange({"images": torch.zeros(4, 8)})["images"].shape
        torch.Size([4, 8])
    """
    return dict(rows)
