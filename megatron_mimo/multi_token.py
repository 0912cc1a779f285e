"""Multi-token prediction (MTP): its embeddings of later tokens are the rows that this batch placed there.

Megatron's MTP block rolls the token ids by one a layer and looks them up. A position that holds a modality's row has no
row in the vocabulary: here the lookup gives text its own row and every other position the row that alignment placed.
(DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv 2412.19437, section 2.2.)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, scatter_to_sequence_parallel_region
from torch import Tensor, nn

from megatron_mimo.compat.megatron import roll_to_next
from megatron_mimo.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron.core.packed_seq_params import PackedSeqParams
    from torch.distributed import ProcessGroup


class LaterRows:
    """Embeds the tokens of a batch rolled by one, then by two, ...: one call a layer of MTP.

    Args:
        embedding: the language model's own.
        rows: reading table -> `[N, H]`, the same on every tensor-parallel rank.
        plan: of the batch.
        packed_seq_params: boundaries, beyond which nothing rolls, or None.
        cp_group, tp_group: process groups.
        sequence_parallel: whether the rows wanted are this tensor-parallel rank's slice.
    """

    def __init__(
        self,
        embedding: nn.Module,
        rows: Mapping[str, Tensor],
        plan: Plan,
        packed_seq_params: PackedSeqParams | None,
        cp_group: ProcessGroup,
        tp_group: ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        self._embedding, self._packed = embedding, packed_seq_params
        self._cp_group, self._tp_group, self._split = cp_group, tp_group, sequence_parallel
        placement = plan.placed
        # One code a position: 0 for text, else 1 + the row in the tables laid end to end; what rolls in is text.
        self._tables = [rows[name] for name in placement.names if name in rows]
        code, start = torch.zeros_like(placement.row, dtype=torch.int64), 1
        for index, name in enumerate(placement.names):
            if name in rows:
                code = torch.where(placement.source == index, placement.row + start, code)
                start += rows[name].shape[0]
        self._code = plan.shard.cut(code)

    @property
    def text(self) -> Tensor:
        """Float `[B, S / CP]`: 1 where the token is text, before anything was rolled."""
        return (self._code == 0).float()

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Rows `[S_local, B, H]` of the tokens `[B, S / CP]`, which MTP rolled by one more than in the last call."""
        self._code = roll_to_next(self._code, self._cp_group, self._packed)
        text = self._embedding(input_ids=input_ids.masked_fill(self._code > 0, 0), position_ids=position_ids)
        if self._split and text.shape[0] == self._code.shape[1]:  # an embedding that leaves scattering to its caller
            text = scatter_to_sequence_parallel_region(text, group=self._tp_group)
        if not any(table.shape[0] for table in self._tables):
            return text
        code = self._code
        if self._split:
            rank, length = self._tp_group.rank(), text.shape[0]
            code = code[:, rank * length : (rank + 1) * length]
        table = torch.cat(self._tables).to(text.dtype)
        if self._split:  # each rank uses its own positions' rows; their gradients are summed
            table = copy_to_tensor_model_parallel_region(table, group=self._tp_group)
        code = code.transpose(0, 1)
        placed = table.index_select(0, (code - 1).clamp(0, table.shape[0] - 1).flatten()).view_as(text)
        return torch.where((code > 0).unsqueeze(-1), placed, text)


@contextmanager
def embedding_handed_to(block: nn.Module, embedding: LaterRows) -> Iterator[None]:
    """Within it, Megatron's MTP block embeds later tokens with `embedding` in place of the language model's."""

    def exchanged(module: nn.Module, given: tuple, keywords: dict) -> tuple[tuple, dict]:
        return given, {**keywords, "embedding": embedding}

    hook = block.register_forward_pre_hook(exchanged, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
