"""Rotary embeddings from positions `[k, B, S]`: time, row and column, in blocks or interleaved.

Megatron's `mrope` lays the sections out in blocks, as Qwen2-VL does, and under context parallelism hands packed
sequences angles that are cut already, which are then cut again. Here sections may interleave, as Qwen3-VL's do, and the
angles of packed sequences stay whole: Megatron cuts them by the boundaries of the sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mimo.compat.hybrid import keeps_states
from megatron_mimo.packed import boundaries_of
from megatron_mimo.packed_rotary import turned_by, turns_packs
from megatron_mimo.sharding import SequenceShard


class GridRotary(nn.Module):
    """Angles of positions with several sections, in place of Megatron's `MultimodalRotaryEmbedding`.

    Args:
        inverse_frequencies: float32 `[d / 2]`.
        interleaved: whether sections alternate over the frequencies (Qwen3-VL, Qwen3-Omni, Qwen3.5) or come in blocks.
        cp_group: the context-parallel group; None for one rank.

    Attributes:
        packed: whether the sequences of this forward pass are packed; their angles are not cut here.

    Example:
        >>> rotary = GridRotary(torch.tensor([1.0, 0.5, 0.25]), interleaved=True)
        >>> rotary(torch.tensor([[[4]], [[8]], [[16]]]), [1, 1, 1]).flatten().tolist()
        [4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    """

    def __init__(
        self, inverse_frequencies: Tensor, *, interleaved: bool, cp_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self._frequencies, self._interleaved, self._group = inverse_frequencies, interleaved, cp_group
        # Copied to a device once: a copy from the host waits, and no CUDA graph can hold it.
        self._there: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        self.packed = False

    def forward(
        self, position_ids: Tensor, mrope_section: Sequence[int], cp_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Angles `[S or S / CP, B, 1, d]` float32, whole where sequences are packed.

        Args:
            position_ids: `[k, B, S]`, global.
            mrope_section: frequencies of each section; they add up to `d / 2`.
            cp_group: in place of the one given before.

        Raises:
            ValueError: positions of another number of sections.
        """
        if position_ids.dim() != 3 or len(position_ids) != len(mrope_section):
            raise ValueError(
                f"expected position_ids of [{len(mrope_section)}, B, S] for mrope_section={list(mrope_section)}, found "
                f"{list(position_ids.shape)}. SampleProcessor(sections={len(mrope_section)}) makes them."
            )
        device, sizes = position_ids.device, tuple(mrope_section)
        if (device, sizes) not in self._there:
            self._there[device, sizes] = self._frequencies.to(device), self._section_of(sizes, device)
        frequencies, chosen = self._there[device, sizes]
        # Each frequency turns with the position of its section.
        angles = position_ids.float()[chosen].permute(2, 1, 0) * frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        group = cp_group or self._group
        if group is not None and group.size() > 1 and not self.packed:
            return get_pos_emb_on_this_cp_rank(angles, 0, group)
        return angles

    def _section_of(self, sizes: Sequence[int], device: torch.device) -> Tensor:
        """int64 `[d / 2]`: the section that each frequency belongs to."""
        sections = torch.arange(len(sizes), device=device)
        if not self._interleaved:
            return sections.repeat_interleave(torch.tensor(sizes, device=device), output_size=sum(sizes))
        place = torch.arange(sum(sizes), device=device)
        turn = place % len(sizes)
        room = torch.tensor(sizes, device=device)[turn] * len(sizes)
        return torch.where((turn > 0) & (place < room), turn, 0)


class GridGPT(GPTModel):
    """`GPTModel` with `position_embedding_type="mrope"` whose angles are `GridRotary`'s.

    Args:
        mrope_interleaved: whether the sections of `mrope_section` alternate, as Qwen3-VL's do.

    All other arguments are `GPTModel`'s.

    Raises:
        ValueError: positions of another kind, or a fused rotary kernel in layers that leave packed sequences to it: it
            counts them anew.
    """

    def __init__(self, *args, mrope_interleaved: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.position_embedding_type != "mrope":
            raise ValueError(
                f"GridGPT: expected position_embedding_type='mrope', found {self.position_embedding_type!r}; GPTModel "
                "does the others"
            )
        if self.config.apply_rope_fusion and not turns_packs(self.decoder):
            raise ValueError(
                "GridGPT: expected apply_rope_fusion=False, found True beside layers of Megatron's: the fused kernel "
                "gives every packed sequence the positions of the first. Build them with specs.language_layer_spec"
            )
        frequencies = cast(Tensor, self.get_submodule("rotary_pos_emb").inv_freq)
        self.rotary_pos_emb: GridRotary = GridRotary(
            frequencies, interleaved=mrope_interleaved, cp_group=self.pg_collection.cp
        )

    @functools.wraps(GPTModel.forward)  # MimoModel goes by the signature
    def forward(self, *args, packed_seq_params=None, **kwargs) -> Tensor:
        if packed_seq_params is not None and self.config.apply_rope_fusion and turned_by(packed_seq_params) is None:
            raise ValueError(
                "GridGPT with apply_rope_fusion=True: expected packed sequences as MimoModel hands them on, found "
                f"{type(packed_seq_params).__name__} without angles of positions. Give MimoModel a PackedSeqParams or "
                "what segments.segmented makes"
            )
        self.rotary_pos_emb.packed = packed_seq_params is not None
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


# MimoModel goes by the constructor's signature too, which is GPTModel's but for one argument.
functools.update_wrapper(GridGPT.__init__, GPTModel.__init__, assigned=())


# Which angles are whose ---------------------------------------------------------------

_ROTARY = (RotaryEmbedding, YarnRotaryEmbedding, MultimodalRotaryEmbedding, GridRotary)


def rotary_kind(model: nn.Module) -> str | None:
    """How a language model's rotary angles are numbered, where it is told that: its `position_embedding_type`.

    "rope" and "yarn" count from 0 in each sequence, "mrope" has angles for every position of the pack. "none" where
    nothing turns; None for angles of another class, and for multi-latent attention, which has its own.
    """
    kind = getattr(model, "position_embedding_type", None)
    if getattr(model.config, "multi_latent_attention", False):
        return None
    if kind in ("rope", "yarn", "mrope"):
        return kind if type(getattr(model, "rotary_pos_emb", None)) in _ROTARY else None
    return "none" if kind in ("learned_absolute", "none") else None


def asks_for_no_boundaries(model: nn.Module) -> bool:
    """Whether no layer of a language model asks the device where the samples of a pack begin; attention's core apart.

    Args:
        model: a pipeline stage's part. Megatron cuts packed tokens on the host for multi-token prediction.
    """
    stack, config, kind = cast(nn.Module, model.decoder), cast(TransformerConfig, model.config), rotary_kind(model)
    if kind is None or config.mtp_num_layers or any(keeps_states(each) for each in stack.modules()):
        return False
    return kind == "none" or turns_packs(stack)


def turn_of(kind: str | None, shard: SequenceShard, counted: Tensor, packed: PackedSeqParams) -> Tensor | None:
    """Which row of a language model's rotary angles turns each of this rank's positions of a pack, int64 `[S / CP]`.

    Args:
        kind: of `rotary_kind`.
        shard: of the rank.
        counted: int64 `[1, S]`, positions counted in each sequence anew; global.
        packed: of the batch.

    Returns:
        None where nothing is packed or turns, or Megatron finds out by what.
    """
    if boundaries_of(packed) is None or kind in (None, "none"):
        return None
    if kind == "mrope":
        return shard.cut(torch.arange(shard.sequence_length, device=shard.device)[None])[0]
    # A max_seqlen that leaves padding out gives fewer rows; `check_packed` holds it against what is no padding.
    rows = max(packed.max_seqlen_q, packed.max_seqlen_kv)
    return shard.cut(counted)[0].clamp(max=rows - 1)
