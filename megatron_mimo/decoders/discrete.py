"""Discrete codes per row: the output side of autoregressive image and audio models.

Shapes: `N` rows, `W` width of the rows, `K` codebooks, `V` entries of a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mimo.decoders.arguments import at_least_one, finite, not_both
from megatron_mimo.decoders.base import Decoder, PositionRule, over, phase, weighted_sum
from megatron_mimo.decoders.guidance import ConditionDropout, guided
from megatron_mimo.decoders.layers import Sharding
from megatron_mimo.decoders.targets import CodeTargets, Prepared, Targets
from megatron_mimo.decoders.tokenizers import Tokenizer
from megatron_mimo.losses import LossTerm

if TYPE_CHECKING:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec


class DiscreteDecoder(Decoder):
    """Predicts one code per row and codebook with cross-entropy; samples codes.

    Codes of one row are predicted independently of each other given the row.

    Targets: `codes` int64 `[N]`, or `[N, K]` for several codebooks; or, with a tokenizer, `media`
    `[n, ...]` from which `prepare` makes them. Optionally `weight` `[N]` or `[N, K]`, and `drop` bool
    `[N]`, which `prepare` adds where conditions are dropped.

    Args:
        width: `W`.
        codebook_sizes: `V`, or one for each of the `K` codebooks.
        targets: describes the codes in place of `codebook_sizes` and `tokenizer`.
        hidden_width: width of a hidden layer with GELU before the heads; None for heads alone.
        condition_dropout: how often a row is replaced by a learned null condition in training, for
            guidance in sampling without unconditional rows from the language model.
        tokenizer: frozen codec, or its spec, that makes codes from media and media from codes.
        position_rule: see `Decoder`; next-token prediction reads the predecessor.
        config: the language model's config cuts the heads over its tensor-parallel ranks by
            codebook entries, and the cross-entropy with them; None keeps them whole on each.
        pg_collection: process groups, of which a config makes use of `tp`; None for Megatron's.

    Raises:
        ValueError: an argument is out of range, or a codebook cannot be shared out evenly.

    Example:
        >>> decoder = DiscreteDecoder(width=16, codebook_sizes=32)
        >>> decoder.loss(torch.ones(6, 16), {"codes": torch.arange(6)}).count
        tensor(6.)
        >>> decoder.sample(torch.ones(6, 16), top_k=5).shape
        torch.Size([6])
    """

    def __init__(
        self,
        *,
        width: int,
        codebook_sizes: int | Sequence[int] | None = None,
        targets: CodeTargets | None = None,
        hidden_width: int | None = None,
        condition_dropout: float = 0.0,
        tokenizer: Tokenizer | ModuleSpec | None = None,
        position_rule: PositionRule = "predecessor",
        config: ModelParallelConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        if targets is not None:
            not_both("DiscreteDecoder", codebook_sizes=codebook_sizes, tokenizer=tokenizer)
        elif codebook_sizes is None:
            raise ValueError("DiscreteDecoder: expected codebook_sizes or a description as `targets`, found neither")
        else:
            targets = CodeTargets(codebook_sizes, tokenizer)
        super().__init__(width=width, position_rule=position_rule, targets=targets)
        sizes = self.codebook_sizes = targets.sizes
        sharding = Sharding(config, pg_collection)
        _check_sizes(sizes, sharding.size)
        self.condition_dropout = ConditionDropout(width, condition_dropout)
        if hidden_width is not None:
            at_least_one("DiscreteDecoder", hidden_width=hidden_width)
        self.hidden = None if hidden_width is None else sharding.whole(width, hidden_width)
        self.heads = nn.ModuleList(sharding.column(hidden_width or width, size) for size in sizes)
        self._group = sharding.group()

    @classmethod
    def describe(cls, params: Mapping[str, Any]) -> CodeTargets | None:
        """Codes of `codebook_sizes`, from the `tokenizer` where there is one."""
        if params.get("codebook_sizes") is None:
            return params.get("targets")
        return CodeTargets(params["codebook_sizes"], params.get("tokenizer"))

    def prepare(self, targets: Targets, stream: str = "") -> Prepared:
        """The targets with `codes` in place of `media`, and `drop` where conditions are dropped."""
        prepared, stream = super().prepare(targets, stream), phase(self, stream)
        return self.condition_dropout.drawn(prepared, prepared["codes"].device, stream)

    def loss(self, rows: Tensor, targets: Targets) -> LossTerm:
        """Cross-entropy summed over rows and codebooks, and the codes' weight.

        A code outside its codebook raises on the CPU; on a device, where looking would wait for it,
        it makes the loss NaN. Codes of weight 0 may be anything.
        """
        targets = self.prepared(targets)
        self.check_rows(rows, expected=targets.num_rows)
        if rows.shape[0] == 0:
            return self.zero_loss(rows)
        codes = targets["codes"].reshape(rows.shape[0], -1)
        codes, valid = in_codebooks(codes, self.codebook_sizes, targets.get("weight"))
        logits = self._local_logits(self.condition_dropout(rows, targets.get("drop")))
        losses = torch.stack([self._cross_entropy(*pair) for pair in zip(logits, codes.unbind(1))], dim=1)
        return weighted_sum(losses.masked_fill(~valid, torch.nan), targets.get("weight"))

    def logits(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Float32 `[N, V]` of each codebook for rows `[N, W]`, whole on every tensor-parallel rank."""
        local = self._local_logits(rows)
        if self._group is not None:
            from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

            local = [gather_from_tensor_model_parallel_region(part, self._group) for part in local]
        return tuple(part.float() for part in local)

    @torch.no_grad()
    def sample(
        self,
        rows: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        unconditional_rows: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes int64 `[N]`, or `[N, K]` for several codebooks, drawn for rows `[N, W]`.

        Tensor-parallel ranks draw the same codes if their generators are in the same state.

        Args:
            rows: conditions.
            temperature: divides the logits; 0 takes the likeliest code.
            top_k: draw among this many likeliest codes.
            top_p: draw among the likeliest codes that together reach this probability.
            guidance: scale of classifier-free guidance on the logits, 1 is off.
            unconditional_rows: `[N, W]` to contrast `rows` with, e.g. of the same prompt without its
                text; None takes the null condition learned with `condition_dropout`.
            generator: to draw from, on the rows' device; None for torch's default.

        Raises:
            ValueError: an option is out of range.
        """
        self.check_rows(rows)
        finite(type(self).__name__, guidance=guidance)
        logits = self.logits(rows)
        if guidance != 1:
            null = self.condition_dropout.unconditional(rows, unconditional_rows)
            logits = tuple(guided(*pair, guidance) for pair in zip(logits, self.logits(null)))
        codes = [draw_codes(part, temperature, top_k, top_p, generator) for part in logits]
        return torch.stack(codes, dim=1) if len(codes) > 1 else codes[0]

    def render(self, samples: Tensor) -> Tensor:
        """Media of sampled codes if there is a tokenizer, else the codes."""
        return samples if self.tokenizer is None else self.tokenizer.decode(samples)

    def _local_logits(self, rows: Tensor) -> list[Tensor]:
        """`[N, V / tensor-parallel size]` of each codebook, rank-local."""
        rows = rows.to(cast(Tensor, self.heads[0].weight).dtype)
        if self.hidden is not None:
            rows = F.gelu(self.hidden(rows))
        return [head(rows) for head in self.heads]

    def _cross_entropy(self, logits: Tensor, codes: Tensor) -> Tensor:
        """`[N]`, float32, from rank-local logits `[N, V / tensor-parallel size]`."""
        if self._group is None:
            return F.cross_entropy(logits.float(), codes, reduction="none")
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        return vocab_parallel_cross_entropy(logits.float(), codes, tp_group=self._group)


def in_codebooks(codes: Tensor, sizes: Sequence[int], weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes that are safe to look up, and which of them were inside their codebooks.

    Args:
        codes: int64 `[N, K]`.
        sizes: entries of each of the `K` codebooks.
        weight: `[N]` or `[N, K]`; codes of weight 0 are not looked at. None uses all.

    Returns:
        Codes clamped to their codebooks `[N, K]`, and bool `[N, K]`, true where weight is 0.

    Raises:
        ValueError: a code that is used lies outside, on the CPU, where looking costs no wait.

    Example:
        >>> in_codebooks(torch.tensor([[1], [-100]]), (4,), torch.tensor([1, 0]))[0].flatten()
        tensor([1, 0])
    """
    last = torch.stack([torch.full((), size - 1, device=codes.device) for size in sizes])
    clamped = codes.clamp(min=0).minimum(last)
    valid = clamped == codes
    if weight is not None:
        valid = valid | (over(weight, codes) == 0)
    if codes.device.type == "cpu" and not valid.all():
        row, book = (~valid).nonzero()[0].tolist()
        raise ValueError(
            f"codes must lie in [0, {sizes[book]}), found {codes[row, book].item()} in row {row}, "
            f"codebook {book}. Give padding a weight of 0."
        )
    return clamped, valid


def draw_codes(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Int64 `[N]` drawn from logits `[N, V]`, narrowed by top-k first, then top-p.

    Args:
        logits: float32.
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: keep this many likeliest codes.
        top_p: keep the likeliest codes that together reach this probability (Holtzman et al., arXiv
            1904.09751, section 3.1), at least one.
        generator: to draw from, on the logits' device; None for torch's default.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> draw_codes(torch.tensor([[0.0, 2.0, 1.0]]), top_k=1)
        tensor([1])
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, codes = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    if top_p is not None:
        probability = logits.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        logits = logits.masked_fill(before >= top_p, -torch.inf)
    if logits.shape[0] == 0:
        return codes[:, 0]
    rank = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    return codes.gather(1, rank).squeeze(1)


def _check_sizes(sizes: tuple[int, ...], parts: int) -> None:
    for size in sizes:
        if size % parts:
            raise ValueError(
                f"DiscreteDecoder: a codebook of {size} entries cannot be shared out over {parts} "
                "tensor-parallel ranks. Round its size up: entries that no code names stay unused."
            )
