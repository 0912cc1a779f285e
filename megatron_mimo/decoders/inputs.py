"""What the language model sees at a modality's generation tokens.

These modules live on the first pipeline stage, the decoders on the last. Both are given one description of the
targets (`decoders.targets`): a modality's spec names it once, with the decoder. Without a generation input the
model sees the generation token's own embedding.

Shapes: `N` rows of the modality in the microbatch, `n` items (spans), `H` hidden width of the
language model, `D` width of the targets.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from megatron_mimo.decoders.arguments import at_least_one
from megatron_mimo.decoders.base import usable
from megatron_mimo.decoders.discrete import in_codebooks
from megatron_mimo.decoders.generation_input import GenerationInput
from megatron_mimo.decoders.layers import Sharding, TimeEmbedding
from megatron_mimo.decoders.path import RectifiedFlow, noised, repeated
from megatron_mimo.decoders.targets import CodeTargets, FlowTargets, Prepared, TargetDescription, Targets, VectorTargets
from megatron_mimo.decoders.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class QueryInput(GenerationInput):
    """Learned queries, one for each position of a span, the same for every span.

    Args:
        hidden_size: `H`.
        rows_per_item: length of a span.
        decoder: unused by queries; see `GenerationInput`.

    Example:
        >>> QueryInput(hidden_size=16, rows_per_item=4)(None, num_rows=8).shape
        torch.Size([8, 16])
    """

    reads_any = False

    def __init__(self, *, hidden_size: int, rows_per_item: int, decoder: str | None = None) -> None:
        super().__init__(hidden_size=hidden_size, decoder=decoder)
        at_least_one("QueryInput", rows_per_item=rows_per_item)
        self.rows_per_item = rows_per_item
        # Like a token's embedding beside it, which Megatron starts at this spread too.
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(rows_per_item, hidden_size), std=0.02))

    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """The queries, once for every span: `[num_rows, H]`."""
        del targets
        span = self.queries.shape[0]
        if num_rows % span:
            raise ValueError(
                f"QueryInput has queries for spans of {span} positions, but the batch has {num_rows} "
                "generation tokens, which is no whole number of spans."
            )
        return self.queries.expand(num_rows // span, -1, -1).flatten(0, 1)


class TargetInput(GenerationInput):
    """Teacher forcing with continuous targets: each position sees its own target, projected.

    The decoder reads the predecessor, so that it predicts a target from those before it.

    Args:
        hidden_size: `H`.
        targets: the decoder's description; in a spec it comes from there.
        hidden_width: width of a hidden layer with GELU; None for a linear map.
        decoder: whose targets to read.
        target_width, tokenizer: describe the targets without a decoder beside.

    Example:
        >>> feed = TargetInput(hidden_size=16, targets=VectorTargets(4))
        >>> feed({"target": torch.zeros(6, 4)}, num_rows=6).shape
        torch.Size([6, 16])
    """

    shows_target = True

    def __init__(
        self,
        *,
        hidden_size: int,
        targets: VectorTargets | None = None,
        hidden_width: int | None = None,
        decoder: str | None = None,
        target_width: int | None = None,
        tokenizer: Tokenizer | ModuleSpec | None = None,
    ) -> None:
        targets = _described(self, VectorTargets, targets, tokenizer, width=target_width)
        super().__init__(hidden_size=hidden_size, decoder=decoder, targets=targets)
        self.projection = _projection(targets.width, hidden_width, hidden_size)

    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """`target` `[N, D]` projected to `[N, H]`."""
        prepared = self.read(targets, "target", num_rows)
        target = usable(prepared["target"], prepared.get("weight"))
        return self.projection(target.to(_dtype(self)))


class CodeInput(GenerationInput):
    """Teacher forcing with codes: each position sees the embedding of its own code, projected.

    With several codebooks the embeddings of a row's codes are added. The decoder reads the
    predecessor, as in next-token prediction. In generation, feed sampled codes back the same way.

    Args:
        hidden_size: `H`.
        targets: the decoder's description; in a spec it comes from there.
        embedding_width: width of the codes' embeddings; None for `H` without a projection.
        hidden_width: width of a hidden layer with GELU in the projection; None for a linear one.
        decoder: whose targets to read.
        codebook_sizes, tokenizer: describe the codes without a decoder beside.

    Example:
        >>> feed = CodeInput(hidden_size=16, targets=CodeTargets(32))
        >>> feed({"codes": torch.arange(6)}, num_rows=6).shape
        torch.Size([6, 16])
    """

    shows_target = True

    def __init__(
        self,
        *,
        hidden_size: int,
        targets: CodeTargets | None = None,
        embedding_width: int | None = None,
        hidden_width: int | None = None,
        decoder: str | None = None,
        codebook_sizes: int | Sequence[int] | None = None,
        tokenizer: Tokenizer | ModuleSpec | None = None,
    ) -> None:
        targets = _described(self, CodeTargets, targets, tokenizer, codebook_sizes=codebook_sizes)
        super().__init__(hidden_size=hidden_size, decoder=decoder, targets=targets)
        self.codebook_sizes = targets.sizes
        width = hidden_size if embedding_width is None else embedding_width
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in targets.sizes)
        for table in self.embeddings.parameters():
            nn.init.normal_(table, std=0.02)
        plain = embedding_width is None and hidden_width is None
        self.projection = nn.Identity() if plain else _projection(width, hidden_width, hidden_size)

    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """Embeddings of `codes` `[N]` or `[N, K]`, added and projected: `[N, H]`.

        A code outside its codebook raises on the CPU; on a device, where looking would wait for it, the
        nearest code stands in and the decoder's loss is NaN. Codes of weight 0 may be anything.
        """
        prepared = self.read(targets, "codes", num_rows)
        codes = prepared["codes"].reshape(num_rows, -1)
        codes, _ = in_codebooks(codes, self.codebook_sizes, prepared.get("weight"))
        embedded = sum(table(code) for table, code in zip(self.embeddings, codes.unbind(1)))
        return self.projection(embedded)


class NoisedTargetInput(GenerationInput):
    """Each position sees its noised target `x_t = (1 - t) * target + t * noise` and the time.

    The language model then takes part in denoising and its own positions are read (Chen et al.,
    "JanusFlow", arXiv 2411.07975, section 3.2). A sampler runs the model at every step, with the
    decoder's `velocity`.

    Args:
        hidden_size: `H`; even.
        targets: the decoder's description; in a spec it comes from there.
        decoder: whose targets to read.
        target_width, rows_per_item, flow, tokenizer: describe the targets without a decoder beside.

    Example:
        >>> feed = NoisedTargetInput(hidden_size=16, targets=FlowTargets(4, rows_per_item=3))
        >>> targets = feed.prepare({"target": torch.zeros(6, 4)}, "images/pixels")
        >>> feed(targets, num_rows=6).shape
        torch.Size([6, 16])
    """

    targets: FlowTargets

    def __init__(
        self,
        *,
        hidden_size: int,
        targets: FlowTargets | None = None,
        decoder: str | None = None,
        target_width: int | None = None,
        rows_per_item: int | None = None,
        flow: RectifiedFlow | None = None,
        tokenizer: Tokenizer | ModuleSpec | None = None,
    ) -> None:
        named = dict(width=target_width, rows_per_item=rows_per_item, flow=flow)
        targets = _described(self, FlowTargets, targets, tokenizer, **named)
        super().__init__(hidden_size=hidden_size, decoder=decoder, targets=targets)
        self.rows_per_item = targets.rows_per_item
        self.projection = nn.Linear(targets.width, hidden_size)
        self.time = TimeEmbedding(hidden_size, Sharding())

    def num_rows(self, targets: Targets) -> int:
        """The number of targets (or tokens of the media, or rows of a sampler's state), one a row."""
        if "x" not in targets:
            return super().num_rows(targets)
        state = {"target": targets["x"], **{key: value for key, value in targets.items() if key != "x"}}
        return super().num_rows(state)

    def prepare(self, targets: Targets, stream: str = "") -> Prepared:
        """The targets with `target`, `time` and `noise`, as the decoder has them; a sampler's state `x` `[N, D]` at
        `time` `[n]` as it is."""
        if "x" in targets:
            self.targets.check_beside(targets, f"{stream}: " if stream else "")
            return Prepared(dict(targets), self.num_rows(targets), self.rows_per_item)
        return super().prepare(targets, stream)

    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """`x_t` of `target` `[N, D]`, `noise` `[N, D]`, `time` `[n]`, embedded: `[N, H]`.

        Or, in sampling, of the state `x` `[N, D]` itself at `time` `[n]`.
        """
        prepared = self.read(targets, "target", num_rows)
        if "x" in prepared:
            return self.at(prepared["x"], prepared["time"])
        clean = usable(prepared["target"], prepared.get("weight"))
        return self.at(noised(clean, prepared["noise"], prepared["time"]), prepared["time"])

    def at(self, x: Tensor, time: Tensor) -> Tensor:
        """Rows `[N, H]` for a sampler's state `x` `[N, D]` at `time` `[n]` or scalar."""
        time_rows = repeated(self.time(time.reshape(-1)), x.shape[0])
        return self.projection(x.to(_dtype(self))) + time_rows


def _described[Described: TargetDescription](
    feed: GenerationInput,
    kind: type[Described],
    targets: TargetDescription | None,
    tokenizer: Tokenizer | ModuleSpec | None,
    **named: object,
) -> Described:
    """The description that an input was given, or the one that its own keywords make.

    Raises:
        TypeError: a description of another kind than the input shows.
        ValueError: neither, or keywords that say something else than the description.
    """
    owner = type(feed).__name__
    given = {key: value for key, value in named.items() if value is not None}
    if targets is None:
        if next(iter(named.values())) is None:
            raise ValueError(
                f"{owner}: expected a description of the decoder's targets, found none. In a spec it comes from the "
                "decoder that this input names as `decoder`; else give `targets`."
            )
        return cast(Any, kind)(**given, tokenizer=tokenizer)
    if targets.rows_per_item != targets.targets_per_item:
        raise ValueError(
            f"{owner} shows one target a row, but its decoder has {targets.targets_per_item} targets for "
            f"{targets.rows_per_item} rows. Feed the positions with QueryInput."
        )
    if not isinstance(targets, kind):
        raise TypeError(f"{owner} shows {kind.__name__}, but its decoder writes {type(targets).__name__}")
    if replace(cast(Any, targets), **given) != targets:
        raise ValueError(
            f"{owner} is given {given}, but its decoder's targets are {targets}. Leave that out: the decoder's "
            "description serves both."
        )
    if given or tokenizer is not None:
        warnings.warn(
            f"{owner} needs no {[*given, *(['tokenizer'] if tokenizer is not None else [])]} beside the decoder's "
            "description, which serves both; the keywords go in the next release",
            DeprecationWarning,
            stacklevel=3,
        )
    return targets


def _projection(width: int, hidden_width: int | None, hidden_size: int) -> nn.Module:
    if hidden_width is None:
        return nn.Linear(width, hidden_size)
    return nn.Sequential(nn.Linear(width, hidden_width), nn.GELU(), nn.Linear(hidden_width, hidden_size))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
