"""Classifier-free guidance: conditions dropped in training, contrasted in sampling.

Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598. With the scale `g` used here
(1 is off), `guided = unconditional + g * (conditional - unconditional)`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from megatron_mimo.decoders.targets import Prepared
from megatron_mimo.draws import draws


class ConditionDropout(nn.Module):
    """Replaces the rows of dropped items by a learned null condition.

    Args:
        width: `W`, the rows' width.
        probability: how often an item's condition is dropped in training; 0 learns no null
            condition.

    Raises:
        ValueError: a probability outside [0, 1).

    Example:
        >>> dropout = ConditionDropout(width=8, probability=0.1)
        >>> dropout(torch.ones(4, 8), torch.tensor([True, False])).shape
        torch.Size([4, 8])
    """

    def __init__(self, width: int, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"condition_dropout must lie in [0, 1), got {probability}")
        self.probability = probability
        self.null = nn.Parameter(torch.zeros(width)) if probability else None
        self._warned = False

    def drawn(self, prepared: Prepared, device: torch.device, stream: str) -> Prepared:
        """The targets with which items lose their condition, `drop` bool `[items]`; as they are where none does: in
        evaluation, or without a null condition.

        Args:
            prepared: whose own `drop` stays.
            device: of the draw.
            stream: prefix of the random stream.
        """
        if self.null is None or not self.training:
            return prepared
        with draws(f"{stream}/drop"):
            drop = torch.rand(prepared.num_rows // prepared.rows_per_item, device=device) < self.probability
        return prepared.adding({"drop": drop})

    def forward(self, rows: Tensor, drop: Tensor | None) -> Tensor:
        """The rows with those of dropped items replaced.

        Args:
            rows: `[N, W]`, rank-local.
            drop: bool `[n]`, one for each run of `N / n` rows, or None.

        Raises:
            ValueError: items are dropped but no null condition is learned.
        """
        if drop is None:
            return rows
        if self.null is None:
            raise ValueError(
                "targets hold 'drop' but the decoder learns no null condition to put in place of the "
                "dropped rows. Build it with condition_dropout > 0 or leave 'drop' out."
            )
        if rows.shape[0] == 0:
            return rows
        run = rows.shape[0] // drop.shape[0]
        dropped = drop[:, None].expand(-1, run).reshape(-1, 1)
        return torch.where(dropped, self.null.to(rows.dtype), rows)

    def unconditional(self, rows: Tensor, given: Tensor | None) -> Tensor:
        """The rows `[N, W]` to contrast the conditional ones with.

        Args:
            rows: `[N, W]`, the conditional rows.
            given: `[N, W]`, the language model's rows for the same prompt without its condition, or
                None to use the null condition. A decoder that learned none warns once and uses
                zeros.

        Raises:
            ValueError: `given` has another shape than `rows`.
        """
        if given is not None:
            if given.shape != rows.shape:
                raise ValueError(
                    f"unconditional_rows have shape {list(given.shape)}, the rows {list(rows.shape)}: "
                    "give one unconditional row for each row."
                )
            return given
        if self.null is not None:
            return self.null.to(rows.dtype).expand_as(rows)
        if not self._warned:
            self._warned = True
            warnings.warn(
                "sampling with guidance from a decoder trained without dropped conditions: its "
                "unconditional prediction is untrained. Train with condition_dropout > 0 or pass "
                "unconditional_rows.",
                stacklevel=3,
            )
        return torch.zeros_like(rows)


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """`unconditional + guidance * (conditional - unconditional)`, elementwise.

    Example:
        >>> guided(torch.tensor(3.0), torch.tensor(1.0), 2.0)
        tensor(5.)
    """
    return unconditional + guidance * (conditional - unconditional)
