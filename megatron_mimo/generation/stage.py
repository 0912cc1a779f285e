"""One rank's part of the language model, run on rows of embeddings, between the stages before and after it.

Shapes: `B` rows of the cache, `n` new positions of each, `H` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.cached_attention import Step, Turn
from megatron_mimo.compat.megatron import scaled_logits


class Stage:
    """Runs a borrowed model's layers on this rank, and carries what other ranks need to know.

    Args:
        model: a `MimoModel`, borrowed.
        turn: where its layers find the step.
        sections: k of the position ids that it reads; 1 for plain ones.

    Attributes:
        first, last: whether rows are embedded, whether hidden states come out on this rank.
        device, dtype: of the model's weights.
        wire: dtype of what goes from stage to stage.
        fused: what takes the place of the layers for one new position a row, or None.
    """

    def __init__(self, model: Any, turn: Turn, sections: int = 1) -> None:
        self.model, self._language, self._turn = model, model.language_model, turn
        self._groups, self._sections = model.pg_collection, sections
        self.first, self.last = model.pre_process, model.post_process
        self.hidden_size: int = self._language.config.hidden_size
        parameter = next(self._language.decoder.parameters(), None)
        parameter = next(model.parameters()) if parameter is None else parameter
        self.device, self.dtype = parameter.device, parameter.dtype
        self.fused: Callable[[Tensor, Step, Tensor], Tensor] | None = None
        self.wire = self._language.config.pipeline_dtype or self.dtype

    def run(self, rows: Tensor | None, step: Step, batch: int, length: int, positions: Tensor | None = None) -> Any:
        """Hidden states `[n, B, H]` after the final norm on the last stage, None on the others.

        Args:
            rows: `[n, B, H]` on the first stage.
            step: where they are kept and what they see.
            batch, length: `B` and `n`, which every stage knows.
            positions: `[k, B, n]` of a model with several sections; None: the step's, alike in each.

        Collectives: a send and a receive between neighbouring pipeline stages.
        """
        self._turn.step = step
        try:
            entering = rows
            if not self.first:
                entering = torch.empty(length, batch, self.hidden_size, dtype=self.wire, device=self.device)
                dist.recv(entering, group_src=self._stage - 1, group=self._groups.pp)
                entering = entering.to(self.dtype)
                self._language.set_input_tensor(entering)
            assert entering is not None, "the first stage is given rows"
            given = step.positions if self._sections == 1 else positions
            if given is None:
                given = step.positions.expand(self._sections, *step.positions.shape)
            if self.fused is not None and length == 1 and step.rows is None:
                hidden = self.fused(entering, step, given)
            else:
                hidden = self._language(
                    input_ids=None, position_ids=given, attention_mask=None, decoder_input=rows if self.first else None
                )
        finally:
            self._turn.step = None
        if self.last:
            return hidden
        dist.send(hidden.to(self.wire).contiguous(), group_dst=self._stage + 1, group=self._groups.pp)
        return None

    @property
    def _stage(self) -> int:
        return self._groups.pp.rank()

    def embed_tokens(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Rows `[n, B, H]` of text `[B, n]` at `positions` `[B, n]`, on the first stage. Collective over TP."""
        return self._language.embedding(input_ids=ids, position_ids=positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Whole rows `[B, V]` of logits for states `[B, H]`, on the last stage. Collective over TP."""
        language = self._language
        tied = language.share_embeddings_and_output_weights
        weight = language.shared_embedding_or_output_weight() if tied else None
        logits, _ = language.output_layer(hidden[None], weight=weight, runtime_gather_output=True)
        return scaled_logits(language, logits)[0]

    def agreed(self, *columns: Tensor) -> list[Tensor]:
        """Vectors `[B]` of the last stage's first tensor-parallel rank, on every rank of TP and PP.

        Args:
            columns: of equal length; int64 below 2**53, or floating. On other ranks anything of that shape and dtype.

        Collectives: one broadcast over TP and one over PP, where they have more than one rank.
        """
        tensor, pipeline = self._groups.tp, self._groups.pp
        if tensor.size() == 1 and pipeline.size() == 1:
            return list(columns)
        together = torch.stack([column.double() for column in columns])
        if tensor.size() > 1:
            dist.broadcast(together, group_src=0, group=tensor)
        if pipeline.size() > 1:
            dist.broadcast(together, group_src=pipeline.size() - 1, group=pipeline)
        return [row.to(column.dtype) for row, column in zip(together, columns)]

    def shared(self, tensor: Tensor | None) -> Tensor:
        """A tensor of the last stage on every rank of TP and PP, whatever its shape. Collective over both.

        Tensor-parallel ranks get their first one's: what they compute alike may differ in the last bit.
        """
        group = self._groups.pp
        if tensor is not None and self._groups.tp.size() > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, group_src=0, group=self._groups.tp)
        if group.size() == 1:
            assert tensor is not None
            return tensor
        last = group.size() - 1
        header: list[Any] = [None if tensor is None else (tensor.shape, tensor.dtype)]
        dist.broadcast_object_list(header, group_src=last, group=group)
        shape, dtype = header[0]
        held = torch.empty(shape, dtype=dtype, device=self.device) if tensor is None else tensor.contiguous()
        dist.broadcast(held, group_src=last, group=group)
        return held

    def told(self, facts: object) -> Any:
        """What the first stage knows, on every stage. Collective over PP."""
        group = self._groups.pp
        if group.size() == 1:
            return facts
        box = [facts]
        dist.broadcast_object_list(box, group_src=0, group=group)
        return box[0]

    def least(self, number: int) -> int:
        """The least of the numbers that the ranks of TP and PP have. Collective over both."""
        for group in (self._groups.tp, self._groups.pp):
            if group.size() > 1:
                held = torch.tensor(number, device=self.device)
                dist.all_reduce(held, op=dist.ReduceOp.MIN, group=group)
                number = int(held)
        return number
