"""Targets that were checked, counted and completed once, on their way from their description to a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

Targets = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Prepared(Mapping[str, Tensor]):
    """Targets that were checked, counted and completed: read like the mapping of their tensors.

    Attributes:
        tensors: keyword -> tensor, for all `num_rows` rows.
        num_rows: generation tokens that they stand for.
        rows_per_item: rows that stay together.

    Example:
        >>> import torch
        >>> prepared = Prepared({"codes": torch.arange(6)}, num_rows=6)
        >>> prepared["codes"].shape, prepared.share(4, 6)["codes"].tolist()
        (torch.Size([6]), [4, 5])
    """

    tensors: Mapping[str, Tensor]
    num_rows: int
    rows_per_item: int = 1

    def __getitem__(self, keyword: str) -> Tensor:
        return self.tensors[keyword]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def share(self, start_item: int, stop_item: int) -> Prepared:
        """The targets of items `start_item` up to `stop_item`: one rank's part of the loss.

        Raises:
            ValueError: a tensor whose first dim is no multiple of the number of items.
        """
        items = self.num_rows // self.rows_per_item
        if items == 0:
            return self
        cut = {name: _item_slice(value, items, start_item, stop_item) for name, value in self.tensors.items()}
        return replace(self, tensors=cut, num_rows=(stop_item - start_item) * self.rows_per_item)

    def adding(self, tensors: Targets) -> Prepared:
        """The same with further tensors; what is there already stays."""
        return replace(self, tensors={**tensors, **self.tensors})


def _item_slice(value: Tensor, items: int, start_item: int, stop_item: int) -> Tensor:
    if value.shape[0] % items:
        raise ValueError(
            f"a target of shape {list(value.shape)} cannot be shared out over {items} items: its first "
            "dim must be a multiple of their number."
        )
    per_item = value.shape[0] // items
    return value[start_item * per_item : stop_item * per_item]
