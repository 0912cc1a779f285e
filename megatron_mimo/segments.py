"""Core attention in plain torch that keeps packed samples apart, and sees whole media spans where asked.

Megatron's own refuses packed sequences without TransformerEngine. Here each sample is a call of torch's
`scaled_dot_product_attention` of its own: no mask where attention is causal, and one the size of the sample where it
has spans that see all of themselves. On a GPU one fused kernel does all samples (`segment_kernels`), as far as dropout
and dtype let it. Nothing is the size of the pack squared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from megatron_mimo import segment_kernels


@dataclass
class SegmentedParams(PackedSeqParams):
    """Megatron's boundaries of packed sequences, with what the host knows of them. Make it with `segmented`.

    Args:
        boundaries: padded boundaries as numbers, so that no device is asked for them; None where nobody told, empty
            where the host shall make nothing of them (`on_device`).
        spans: int32 `[S]`, -1 at positions that see what is before them, else a number for each span whose positions
            see the whole of it; None: all is causal. Rank-local along heads, global along the sequence.
        spanned: for each sequence whether it has such a span.
        blocks: of `segment_kernels.block_lists`; None without spans.
        turn: int64 `[S / CP]`, rank-local, which row of the rotary angles turns each position; None where Megatron
            finds it by the boundaries. Set by the model.
    """

    boundaries: tuple[int, ...] | None = None
    spans: Tensor | None = None
    spanned: tuple[bool, ...] = ()
    blocks: Tensor | None = None
    turn: Tensor | None = None
    # Made by the first layer of a microbatch, taken by all others.
    _mask: BlockMask | None = None

    def block_mask(self) -> BlockMask:
        """Who sees whom, for `segment_kernels.flexible`; made once.

        Raises:
            ValueError: there are no spans.
        """
        if self.spans is None or self.blocks is None:
            raise ValueError("block_mask: expected media spans that see the whole of themselves, found none")
        if self._mask is None:
            self._mask = segment_kernels.block_mask(self.blocks, padded_boundaries(self), self.spans)
        return self._mask


def segmented(
    cu_seqlens: Tensor, cu_seqlens_padded: Tensor | None = None, spans: Tensor | None = None
) -> SegmentedParams:
    """The parameters of one packed sequence.

    Args:
        cu_seqlens: int32 `[sequences + 1]` on the CPU, boundaries of the sequences themselves.
        cu_seqlens_padded: int32 `[sequences + 1]` on the CPU, where each starts; None: without padding.
        spans: see `SegmentedParams`.

    Raises:
        ValueError: boundaries that are not on the CPU, or a span that leaves its sequence.

    Example:
        >>> params = segmented(torch.tensor([0, 3, 5]), torch.tensor([0, 4, 8]))
        >>> params.boundaries, params.max_seqlen_q
        ((0, 4, 8), 4)
    """
    padded = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
    if padded.device.type != "cpu":
        raise ValueError(f"segmented: expected boundaries on the CPU, found {padded.device}; make them in the collator")
    boundaries = tuple(padded.tolist())
    longest = max((stop - start for start, stop in pairwise(boundaries)), default=0)
    apart = None if cu_seqlens_padded is None or torch.equal(cu_seqlens, cu_seqlens_padded) else cu_seqlens_padded
    return SegmentedParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=apart,
        cu_seqlens_kv_padded=apart,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        # Else TransformerEngine compares the boundaries on the device, and waits for it, in every layer.
        pad_between_seqs=apart is not None and not torch.equal(cu_seqlens[:-1], padded[:-1]),
        boundaries=boundaries,
        spans=spans,
        spanned=_spanned(spans, boundaries),
        blocks=None if spans is None else segment_kernels.block_lists(boundaries, spans),
    )


def on_device(params: SegmentedParams, sequences: int) -> SegmentedParams:
    """The same packed sequences, of which the host knows little: packs that differ in where samples begin are alike.

    Empty sequences behind the last make their number a multiple, and the longest is told as a power of two.

    Args:
        params: on the CPU.
        sequences: their number becomes a multiple of this.

    Example:
        >>> params = on_device(segmented(torch.tensor([0, 3, 5]), torch.tensor([0, 4, 8])), 4)
        >>> params.cu_seqlens_q.tolist(), params.cu_seqlens_q_padded.tolist(), params.max_seqlen_q, params.boundaries
        ([0, 3, 5, 5, 5], [0, 4, 8, 8, 8], 4, ())
    """
    own, padded = params.cu_seqlens_q, padded_boundaries(params)
    length, longest = int(padded[-1]), cast(int, params.max_seqlen_q)
    longest = min(1 << (longest - 1).bit_length(), length)
    own, padded = with_empty(own, sequences), with_empty(padded, sequences)
    changed: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), own)
    changed |= dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"), padded)
    changed |= dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), longest)
    return replace(params, **changed, boundaries=(), spanned=(any(params.spanned),))


def with_empty(boundaries: Tensor, sequences: int) -> Tensor:
    """Boundaries with empty sequences behind, so that their number is a multiple of `sequences`.

    Example:
        >>> with_empty(torch.tensor([0, 3, 5]), 4)
        tensor([0, 3, 5, 5, 5])
    """
    more = -(len(boundaries) - 1) % sequences
    return torch.cat([boundaries, boundaries[-1:].expand(more)])


def turned(params: PackedSeqParams | None, turn: Tensor | None) -> PackedSeqParams | None:
    """Packed sequences as attention takes them: int32 boundaries, and what turns each position.

    Args:
        params: of the batch. Of a class of its own they keep to Megatron's way of turning.
        turn: as `SegmentedParams` has it.
    """
    if params is None:
        return None
    wide = {
        name: x.int() for name, x in vars(params).items()
        if name.startswith("cu_seqlens") and isinstance(x, Tensor) and x.dtype is not torch.int32
    }  # fmt: skip
    turns = turn is not None and type(params) in (PackedSeqParams, SegmentedParams)
    if not wide and not turns:
        return params
    # Not made anew: a constructor may be another's, and Megatron's would wait for the device.
    made = copy.copy(params)
    if turns and type(params) is PackedSeqParams:
        made = SegmentedParams.__new__(SegmentedParams)
    for name, value in (vars(params) | wide | ({"turn": turn} if turns else {})).items():
        setattr(made, name, value)
    return made


def padded_boundaries(params: PackedSeqParams) -> Tensor:
    """Where each sequence begins, int32 `[sequences + 1]`, padding counted to the one before it."""
    return params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded


def _spanned(spans: Tensor | None, boundaries: Sequence[int]) -> tuple[bool, ...]:
    if spans is None:
        return ()
    if spans.shape != (boundaries[-1],):
        raise ValueError(f"spans: expected [{boundaries[-1]}], a number for each position, found {list(spans.shape)}")
    owners: dict[int, int] = {}
    found = []
    for sequence, (start, stop) in enumerate(pairwise(boundaries)):
        inside = {span for span in spans[start:stop].tolist() if span >= 0}
        for span in inside:
            if owners.setdefault(span, sequence) != sequence:
                raise ValueError(
                    f"spans: span {span} lies in the packed sequences {owners[span]} and {sequence}; give each span a "
                    "number of its own"
                )
        found.append(bool(inside))
    return tuple(found)


def stays_plain(config: TransformerConfig) -> bool:
    """Whether a language model's attention is `SegmentAttention` on every backend: TransformerEngine has no packs in
    float32, and no other backend context parallelism.

    Example:
        >>> stays_plain(TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1))
        True
    """
    return config.params_dtype is torch.float32 and config.context_parallel_size == 1


class SegmentAttention(DotProductAttention):
    """Megatron's attention in plain torch, which takes packed sequences too.

    Without `packed_seq_params` it is `DotProductAttention`. With them every sequence attends to itself alone. Positions
    of padding, which come last in their sequence, are seen by no other.

    Attributes:
        one_kernel: whether on a GPU one fused kernel takes the place of a call for each sample. 1.8 times as fast at
            4,096 positions and 6.9 times at 32,768 on an H100 (`python -m benchmarks.packed_attention`).
    """

    one_kernel: ClassVar[bool] = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """What attention gives.

        Args:
            query: rank-local `[S, B, heads, d]`, or packed `[S, heads, d]`; key and value with their own heads.
            attention_mask: of unpacked batches.
            packed_seq_params: boundaries of packed sequences.

        Returns:
            `[S, B, heads * d]`, or packed `[S, heads * d]`.

        Raises:
            ValueError: packed sequences with a window or a sink, which this attention lacks, or boundaries that only
                the device knows.
        """
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        self._check_packed()
        scale = self.softmax_scale * (self.layer_number if self.config.apply_query_key_layer_scaling else 1)
        causal = (attn_mask_type or self.attn_mask_type) not in (AttnMaskType.no_mask, AttnMaskType.padding)
        fused = self._fused(query, key, value, packed_seq_params, scale, causal)
        if fused is not None:
            return fused.flatten(1)
        boundaries, spans, spanned = _host_facts(packed_seq_params)
        outputs = []
        # As Megatron's: tensor-parallel ranks drop out their own heads, each with its own stream.
        apart = contextlib.nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()
        dropped = self.attention_dropout.p if self.training else 0.0
        with apart if dropped else contextlib.nullcontext():
            for sequence, (start, stop) in enumerate(pairwise(boundaries)):
                mask = None
                if spans is not None and spanned[sequence]:
                    mask = span_mask(spans[start:stop])
                q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
                found = F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=mask,
                    dropout_p=dropped,
                    is_causal=causal and mask is None,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
                outputs.append(found[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams, scale: float, causal: bool
    ) -> Tensor | None:
        """One kernel's output for all sequences, None where none can do it, such as on a CPU or with dropout."""
        spanned = isinstance(params, SegmentedParams) and any(params.spanned)
        if (spanned and not causal) or not self.takes_boundaries(query.device, spanned, query.dtype):
            return None
        if spanned:
            mask = cast(SegmentedParams, params).block_mask()
            return segment_kernels.flexible(query, key, value, mask, scale=scale)
        bounds = padded_boundaries(params).to(query.device)
        longest = len(query)  # of what nobody told, whose max_seqlen may leave padding out
        if isinstance(params, SegmentedParams) and params.boundaries is not None:
            told = max((stop - start for start, stop in pairwise(params.boundaries)), default=params.max_seqlen_q)
            longest = cast(int, told)
        return segment_kernels.varlen(query, key, value, bounds, longest, scale=scale, causal=causal)

    def takes_boundaries(self, device: torch.device, spanned: bool, dtype: torch.dtype | None = None) -> bool:
        """Whether one kernel does all sequences, which reads their boundaries on the device.

        Args:
            device: where attention runs.
            spanned: whether any sequence has a span that sees the whole of itself.
            dtype: of the queries; None for that of the weights.
        """
        if not self.one_kernel or (self.training and self.attention_dropout.p):
            return False
        width = self.hidden_size_per_attention_head
        if spanned:
            return segment_kernels.takes_flexible(device, width)
        return segment_kernels.takes_varlen(device, dtype or self.config.params_dtype, width)

    def _check_packed(self) -> None:
        if self.config.window_size is not None or self.config.softmax_type != "vanilla":
            raise ValueError(
                "packed sequences without TransformerEngine: expected window_size=None and softmax_type='vanilla', "
                f"found {self.config.window_size} and {self.config.softmax_type!r}. Use "
                "backend='transformer_engine', or do not pack."
            )


def span_mask(spans: Tensor) -> Tensor:
    """Which positions each sees, bool `[S, S]`: those before it, and all of its own span.

    Args:
        spans: int `[S]`, -1 outside of spans.

    Example:
        >>> span_mask(torch.tensor([-1, 7, 7, -1])).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    length = len(spans)
    before = torch.ones(length, length, dtype=torch.bool, device=spans.device).tril()
    return before | ((spans[:, None] == spans) & (spans >= 0))


def blind_to_spans(stack: nn.Module) -> str | None:
    """The name of a core attention in `stack` that would see a media span as text, None where all of them see it.

    Args:
        stack: the transformer layers of a pipeline stage.

    Example:
        >>> blind_to_spans(nn.Identity()) is None
        True
    """
    cores = (module.core_attention for module in stack.modules() if isinstance(module, Attention))
    return next((type(core).__name__ for core in cores if not isinstance(core, SegmentAttention)), None)


def reads_boundaries_there(stack: nn.Module, params: SegmentedParams, device: torch.device) -> bool:
    """Whether all attention of a stack reads the boundaries of a pack on the device, and none as the host's numbers.

    Args:
        stack: the transformer layers of a pipeline stage.
        params: of the pack.
        device: where the stack runs.

    Example:
        >>> reads_boundaries_there(nn.Identity(), segmented(torch.tensor([0, 3])), torch.device("cpu"))
        True
    """
    spanned = any(params.spanned)

    def reads(core: nn.Module) -> bool:
        if isinstance(core, SegmentAttention):
            return core.takes_boundaries(device, spanned)
        return type(core).__module__ == "megatron.core.extensions.transformer_engine"

    return all(reads(module.core_attention) for module in stack.modules() if isinstance(module, Attention))


def _host_facts(params: PackedSeqParams) -> tuple[Sequence[int], Tensor | None, Sequence[bool]]:
    """Boundaries as numbers, spans, and which sequences have any.

    Raises:
        ValueError: the boundaries lie on a device and the host does not know them.
    """
    spans: Tensor | None = None
    spanned: tuple[bool, ...] = ()
    if isinstance(params, SegmentedParams):
        spans, spanned = params.spans, params.spanned
        if params.boundaries:
            return params.boundaries, spans, spanned
    padded = padded_boundaries(params)
    if padded.device.type != "cpu":
        raise ValueError(
            f"packed sequences: the boundaries are on {padded.device} alone, and asking for them would wait for it. "
            "Make packed_seq_params with megatron_mimo.segments.segmented in the collator, or use "
            "backend='transformer_engine'."
        )
    boundaries = padded.tolist()
    return boundaries, spans, spanned if len(spanned) == len(boundaries) - 1 else _spanned(spans, boundaries)
