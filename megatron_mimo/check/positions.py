"""Position ids that mean what the language model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mimo.deferred import Checks

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

_COUNTED_BY_THE_MODEL = ("rope", "yarn", "none")


@dataclass(frozen=True)
class PositionKind:
    """What a language model makes of position ids.

    Attributes:
        kind: its `position_embedding_type`; None where its class names none, which takes any.
        table: how many learned positions it has, None where it has none.
        own_angles: whether its mrope is `rotary.GridGPT`'s, which is right for packed sequences on shards too.
    """

    kind: str | None = None
    table: int | None = None
    own_angles: bool = False

    def chosen(self, given: Tensor | None, default: Tensor, media: Sequence[str], checks: Checks) -> Tensor:
        """Position ids as the model takes them: `given`, or `default` where it is None.

        Args:
            given: int64 `[B, S]` or `[k, B, S]`, or None.
            default: `[B, S]`, as the model counts by itself.
            media: modalities that have anything in the batch.
            checks: who owns the checks of a device's values.

        Returns:
            `[B, S]`, with mrope `[3, B, S]`.

        Raises:
            ValueError: positions that the model would ignore or lacks, or media without sections of their own under
                mrope; what only a device knows at the latest one step later.
        """
        if self.kind == "mrope":
            return self._sections(given, default, media)
        if given is not None and self.kind in _COUNTED_BY_THE_MODEL:
            self._check_ignored(given, default, checks)
        positions = default if given is None else given
        if self.table is not None:
            _check_table(positions, self.table, checks)
        return positions

    def check_longest(self, packed: PackedSeqParams) -> None:
        """Refuses packed sequences whose longest is not told, where Megatron makes as many rotary angles.

        Raises:
            ValueError: naming what is missing.
        """
        if self.kind in ("rope", "yarn") and None in (packed.max_seqlen_q, packed.max_seqlen_kv):
            raise ValueError(
                f"packed_seq_params with position_embedding_type={self.kind!r}: expected max_seqlen_q and "
                f"max_seqlen_kv, found {packed.max_seqlen_q} and {packed.max_seqlen_kv}. Give the longest one's length."
            )

    def _sections(self, given: Tensor | None, default: Tensor, media: Sequence[str]) -> Tensor:
        if given is not None and given.dim() == 3:
            return given
        if media:
            raise ValueError(
                f"expected position_ids [3, B, S] for a batch with {list(media)}: mrope counts time, height and width "
                f"apart within media, found {'none' if given is None else list(given.shape)}."
            )
        return (default if given is None else given).expand(3, *default.shape)

    def _check_ignored(self, given: Tensor, default: Tensor, checks: Checks) -> None:
        message = (
            f"position_ids differ from those that position_embedding_type={self.kind!r} counts by itself, and it "
            "ignores them. Leave them out; pack sequences (packed_seq_params) to begin anew within a batch row."
        )
        if given.dim() == 3:
            raise ValueError(message)

        def verify(differ: Tensor) -> None:
            if differ:
                raise ValueError(message)

        checks.look(lambda: (given != default).any(), verify, "positions")


def _check_table(positions: Tensor, size: int, checks: Checks) -> None:
    """Raises, deferred on the device, for a position that a table of `size` learned positions lacks."""

    def verify(furthest: Tensor) -> None:
        if not 0 <= furthest < size:
            raise ValueError(
                f"position_ids reach {int(furthest)}, but the model has {size} learned positions (0 to "
                f"{size - 1}). Shorten the sequence or raise max_sequence_length."
            )

    def furthest_of() -> Tensor:
        first, last = positions.aminmax()
        return torch.where(first < 0, first, last)

    checks.look(furthest_of, verify, "learned positions")
