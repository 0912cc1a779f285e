"""What the language model sees at a modality's generation tokens.

These modules live on the first pipeline stage, the decoders on the last. Without one, the model sees
the generation token's own embedding.

Shapes: `N` rows of the modality in the microbatch, `n` items (spans), `H` hidden width of the
language model, `D` width of the targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from megatron_mimo.decoders.base import (
    Targets,
    at_least_one,
    check_shapes,
    check_tensors,
    phase,
    usable,
)
from megatron_mimo.decoders.discrete import in_codebooks
from megatron_mimo.decoders.layers import Sharding, TimeEmbedding
from megatron_mimo.decoders.rectified_flow import RectifiedFlow, noised, repeated
from megatron_mimo.decoders.tokenizers import Tokenizer, built

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class GenerationInput(nn.Module, ABC):
    """Rows `[N, H]` for the generation tokens, from the targets of one of the modality's decoders.

    Args:
        hidden_size: `H`.
        decoder: whose targets to read; None where the modality has one decoder.

    Attributes:
        shows_target: whether a position's row tells its own target. A decoder that reads its own
            position would then copy its answer, so it must read the predecessor.
        shares: settings that it must have in common with the decoder whose targets it reads.
        rows_per_item: positions that are filled together, all of one sample.
    """

    shows_target: ClassVar[bool] = False
    shares: ClassVar[tuple[str, ...]] = ()
    rows_per_item: int = 1

    def __init__(self, *, hidden_size: int, decoder: str | None = None) -> None:
        super().__init__()
        at_least_one(type(self).__name__, hidden_size=hidden_size)
        self.hidden_size = hidden_size
        self.decoder = decoder

    def pick(self, targets: Mapping[str, Targets]) -> Targets:
        """The targets to read, of a modality's targets by decoder.

        Raises:
            ValueError: the decoder's targets are missing, or there are several decoders and none
                was named.
        """
        name = self.decoder
        if name is None and len(targets) == 1:
            name = next(iter(targets))
        if name not in targets:
            wanted = "the only decoder" if name is None else f"decoder {name!r}"
            raise ValueError(
                f"{type(self).__name__} reads the targets of {wanted}, found targets of "
                f"{sorted(targets)}. Name one of them as its `decoder`."
            )
        return targets[name]

    def reads(self, decoder: str) -> bool:
        """Whether this input reads the targets of that decoder of its modality."""
        return self.decoder in (None, decoder)

    def num_rows(self, targets: Targets) -> int | None:
        """Generation tokens that targets stand for, read from shapes; None if it cannot tell."""
        del targets
        return None

    def blank(self, num_rows: int) -> dict[str, Tensor]:
        """Inputs for `num_rows` generation tokens of which nothing is sampled yet, under the one keyword
        where samples of the decoder are fed back.

        Raises:
            ValueError: this input shows no samples.
        """
        raise ValueError(
            f"{type(self).__name__} does not show the language model what was sampled, of {num_rows} "
            "positions; CodeInput and TargetInput do."
        )

    def prepare(self, targets: Targets, stream: str = "") -> dict[str, Tensor]:
        """What the decoder's `prepare` adds of what this input reads, made here without the decoder.

        Pipeline stages then agree: both draw from the same stream. What is there already stays.
        """
        del stream
        return dict(targets)

    @abstractmethod
    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """Rows `[num_rows, H]`.

        Args:
            targets: prepared targets of the decoder, for all rows of the microbatch; None where
                there are none, as in inference.
            num_rows: `N`, at least 1.
        """

    @classmethod
    def check_agreement(cls, own: Mapping[str, object], decoder: str, others: Mapping[str, object]) -> None:
        """Refuses a decoder that does not fit this input; both may be on different pipeline stages.

        Args:
            own: this input's settings by name, as far as known.
            decoder: name of the decoder whose targets it reads.
            others: that decoder's settings.

        Raises:
            ValueError: naming the decoder, the setting and both values.
        """
        for key in cls.shares:
            if key in own and key in others and _plain(own[key]) != _plain(others[key]):
                raise ValueError(
                    f"decoder {decoder!r} has {key}={others[key]!r}, but the generation input {cls.__name__}, "
                    f"which reads its targets, has {key}={own[key]!r}. Give both the same."
                )
        if "position_rule" in others:
            cls.check_rule(others["position_rule"])

    @classmethod
    def check_rule(cls, position_rule: str) -> None:
        """Refuses a decoder that would read its answer off its own position.

        Raises:
            ValueError: naming input and rule.
        """
        if cls.shows_target and position_rule == "own":
            raise ValueError(
                f"{cls.__name__} shows each position its own target, and the decoder reads the "
                "hidden state at that position: it would learn to copy. Set the decoder's "
                "position_rule to 'predecessor', or feed the positions with QueryInput or "
                "NoisedTargetInput."
            )


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

    def __init__(self, *, hidden_size: int, rows_per_item: int, decoder: str | None = None) -> None:
        super().__init__(hidden_size=hidden_size, decoder=decoder)
        at_least_one("QueryInput", rows_per_item=rows_per_item)
        self.rows_per_item = rows_per_item
        # Like a token's embedding beside it, which Megatron starts at this spread too.
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(rows_per_item, hidden_size), std=0.02))

    def pick(self, targets: Mapping[str, Targets]) -> None:
        """None: queries read no targets."""
        del targets

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
        target_width: `D`.
        hidden_width: width of a hidden layer with GELU; None for a linear map.
        tokenizer: frozen codec, or its spec, that makes targets from media where the decoder, and so
            its own tokenizer, is on another pipeline stage.
        decoder: whose targets to read.

    Example:
        >>> feed = TargetInput(hidden_size=16, target_width=4)
        >>> feed({"target": torch.zeros(6, 4)}, num_rows=6).shape
        torch.Size([6, 16])
    """

    shows_target = True
    shares = ("target_width",)

    def __init__(
        self,
        *,
        hidden_size: int,
        target_width: int,
        hidden_width: int | None = None,
        tokenizer: Tokenizer | ModuleSpec | None = None,
        decoder: str | None = None,
    ) -> None:
        super().__init__(hidden_size=hidden_size, decoder=decoder)
        at_least_one("TargetInput", target_width=target_width)
        self.target_width = target_width
        self.projection = _projection(target_width, hidden_width, hidden_size)
        self.tokenizer = None if tokenizer is None else built(tokenizer)

    def num_rows(self, targets: Targets) -> int:
        """The number of targets (or tokens of the media), one a row."""
        return _count(self, targets, "target", (self.target_width,))

    def blank(self, num_rows: int) -> dict[str, Tensor]:
        """`target` `[num_rows, D]`, float32 zeros."""
        weight = next(self.parameters())
        return {"target": torch.zeros(num_rows, self.target_width, device=weight.device)}

    def prepare(self, targets: Targets, stream: str = "") -> dict[str, Tensor]:
        """The targets with `target` in place of `media`."""
        self.num_rows(targets)
        return _encoded(self, targets, "target")

    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """`target` `[N, D]` projected to `[N, H]`."""
        target = usable(_given(self, targets, "target", num_rows), targets.get("weight"))
        return self.projection(target.to(_dtype(self)))


class CodeInput(GenerationInput):
    """Teacher forcing with codes: each position sees the embedding of its own code, projected.

    With several codebooks the embeddings of a row's codes are added. The decoder reads the
    predecessor, as in next-token prediction. In generation, feed sampled codes back the same way.

    Args:
        hidden_size: `H`.
        codebook_sizes: entries of the codebook, or of each.
        embedding_width: width of the codes' embeddings; None for `H` without a projection.
        hidden_width: width of a hidden layer with GELU in the projection; None for a linear one.
        tokenizer: frozen codec, or its spec, that makes codes from media where the decoder, and so
            its own tokenizer, is on another pipeline stage.
        decoder: whose targets to read.

    Example:
        >>> feed = CodeInput(hidden_size=16, codebook_sizes=32)
        >>> feed({"codes": torch.arange(6)}, num_rows=6).shape
        torch.Size([6, 16])
    """

    shows_target = True
    shares = ("codebook_sizes",)

    def __init__(
        self,
        *,
        hidden_size: int,
        codebook_sizes: int | Sequence[int],
        embedding_width: int | None = None,
        hidden_width: int | None = None,
        tokenizer: Tokenizer | ModuleSpec | None = None,
        decoder: str | None = None,
    ) -> None:
        super().__init__(hidden_size=hidden_size, decoder=decoder)
        sizes = (codebook_sizes,) if isinstance(codebook_sizes, int) else tuple(codebook_sizes)
        self.codebook_sizes = sizes
        width = hidden_size if embedding_width is None else embedding_width
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.02)
        plain = embedding_width is None and hidden_width is None
        self.projection = nn.Identity() if plain else _projection(width, hidden_width, hidden_size)
        self.tokenizer = None if tokenizer is None else built(tokenizer)

    def num_rows(self, targets: Targets) -> int:
        """The number of codes (or tokens of the media), one a row."""
        books = len(self.codebook_sizes)
        return _count(self, targets, "codes", (books,), *(((),) if books == 1 else ()))

    def blank(self, num_rows: int) -> dict[str, Tensor]:
        """`codes` `[num_rows]`, or `[num_rows, K]` for several codebooks, int64 zeros."""
        books = len(self.codebook_sizes)
        shape = (num_rows,) if books == 1 else (num_rows, books)
        device = self.embeddings[0].weight.device
        return {"codes": torch.zeros(shape, dtype=torch.int64, device=device)}

    def prepare(self, targets: Targets, stream: str = "") -> dict[str, Tensor]:
        """The targets with `codes` in place of `media`."""
        self.num_rows(targets)
        return _encoded(self, targets, "codes")

    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """Embeddings of `codes` `[N]` or `[N, K]`, added and projected: `[N, H]`.

        A code outside its codebook raises on the CPU; on a device, where looking would wait for it, the
        nearest code stands in and the decoder's loss is NaN. Codes of weight 0 may be anything.
        """
        codes = _given(self, targets, "codes", num_rows).reshape(num_rows, -1)
        codes, _ = in_codebooks(codes, self.codebook_sizes, targets.get("weight"))
        embedded = sum(table(code) for table, code in zip(self.embeddings, codes.unbind(1)))
        return self.projection(embedded)


class NoisedTargetInput(GenerationInput):
    """Each position sees its noised target `x_t = (1 - t) * target + t * noise` and the time.

    The language model then takes part in denoising and its own positions are read (Chen et al.,
    "JanusFlow", arXiv 2411.07975, section 3.2). A sampler runs the model at every step, with the
    decoder's `velocity`.

    Args:
        hidden_size: `H`; even.
        target_width: `D`.
        rows_per_item: rows that share one time: the decoder's.
        flow: how time is drawn: the decoder's.
        tokenizer: frozen codec, or its spec, that makes targets from media where the decoder, and so
            its own tokenizer, is on another pipeline stage.
        decoder: whose targets to read.

    Example:
        >>> feed = NoisedTargetInput(hidden_size=16, target_width=4, rows_per_item=3)
        >>> targets = feed.prepare({"target": torch.zeros(6, 4)}, "images/pixels")
        >>> feed(targets, num_rows=6).shape
        torch.Size([6, 16])
    """

    shares = ("target_width", "rows_per_item", "flow")

    def __init__(
        self,
        *,
        hidden_size: int,
        target_width: int,
        rows_per_item: int = 1,
        flow: RectifiedFlow = RectifiedFlow(),
        tokenizer: Tokenizer | ModuleSpec | None = None,
        decoder: str | None = None,
    ) -> None:
        super().__init__(hidden_size=hidden_size, decoder=decoder)
        at_least_one("NoisedTargetInput", target_width=target_width, rows_per_item=rows_per_item)
        self.target_width = target_width
        self.rows_per_item = rows_per_item
        self.flow = flow
        self.projection = nn.Linear(target_width, hidden_size)
        self.time = TimeEmbedding(hidden_size, Sharding())
        self.tokenizer = None if tokenizer is None else built(tokenizer)

    def num_rows(self, targets: Targets) -> int:
        """The number of targets (or tokens of the media, or rows of a sampler's state), one a row."""
        keyword = "x" if "x" in targets else "target"
        rows = _count(self, targets, keyword, (self.target_width,))
        if rows % self.rows_per_item:
            raise ValueError(
                f"NoisedTargetInput got {rows} targets, which is no whole number of items of {self.rows_per_item}."
            )
        shapes = {"time": (rows // self.rows_per_item,), "noise": (rows, self.target_width)}
        check_shapes("NoisedTargetInput", targets, **shapes)
        return rows

    def prepare(self, targets: Targets, stream: str = "") -> dict[str, Tensor]:
        """The targets with `target`, `time` and `noise`, as a `FlowDecoder` of the same flow has them."""
        items = self.num_rows(targets) // self.rows_per_item
        return self.flow.add_draws(_encoded(self, targets, "target"), items, phase(self, stream))

    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """`x_t` of `target` `[N, D]`, `noise` `[N, D]`, `time` `[n]`, embedded: `[N, H]`.

        Or, in sampling, of the state `x` `[N, D]` itself at `time` `[n]`.
        """
        if targets is not None and "x" in targets:
            return self.at(_given(self, targets, "x", num_rows), targets["time"])
        clean = usable(_given(self, targets, "target", num_rows), targets.get("weight"))
        x = noised(clean, targets["noise"], targets["time"])
        return self.at(x, targets["time"])

    def at(self, x: Tensor, time: Tensor) -> Tensor:
        """Rows `[N, H]` for a sampler's state `x` `[N, D]` at `time` `[n]` or scalar."""
        time_rows = repeated(self.time(time.reshape(-1)), x.shape[0])
        return self.projection(x.to(_dtype(self))) + time_rows


def _projection(width: int, hidden_width: int | None, hidden_size: int) -> nn.Module:
    if hidden_width is None:
        return nn.Linear(width, hidden_size)
    return nn.Sequential(nn.Linear(width, hidden_width), nn.GELU(), nn.Linear(hidden_width, hidden_size))


def _plain(setting: object) -> object:
    """A setting for comparison: one codebook may be named by its size alone."""
    return tuple(setting) if isinstance(setting, Sequence) else (setting,)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _count(
    feed: TargetInput | CodeInput | NoisedTargetInput,
    targets: Targets,
    keyword: str,
    *inner: tuple[int, ...],
) -> int:
    """Rows that targets stand for, of which `keyword` must be `[N, *one of inner]`; from shapes."""
    name = type(feed).__name__
    check_tensors(name, targets)
    if keyword not in targets and "media" in targets:
        if feed.tokenizer is None:
            raise ValueError(
                f"{name} reads {keyword!r} but the targets hold media, and its decoder, whose tokenizer "
                "would encode them, is on another pipeline stage. Give the input that `tokenizer` too."
            )
        rows = targets["media"].shape[0] * feed.tokenizer.tokens_per_item
    elif keyword in targets:
        shape = tuple(targets[keyword].shape)
        if not shape or shape[1:] not in inner:
            forms = " or ".join(str(["N", *sizes]).replace("'", "") for sizes in inner)
            raise ValueError(f"{name}'s {keyword} must be {forms}, got {list(shape)}")
        rows = shape[0]
    else:
        raise ValueError(f"{name} reads the target {keyword!r}, found {sorted(targets)}")
    if "weight" in targets and targets["weight"].shape[:1] != (rows,):
        found = list(targets["weight"].shape)
        raise ValueError(f"{name} got {rows} {keyword} and a weight of shape {found}")
    return rows


def _encoded(feed: TargetInput | CodeInput | NoisedTargetInput, targets: Targets, keyword: str) -> dict[str, Tensor]:
    """The targets with `keyword` in place of media."""
    targets = dict(targets)
    if "media" in targets:
        targets[keyword] = feed.tokenizer.encode(targets.pop("media"))
    return targets


def _given(feed: GenerationInput, targets: Targets | None, keyword: str, num_rows: int) -> Tensor:
    """The target that an input reads, refused if it is missing or of another count."""
    if targets is None or keyword not in targets:
        raise ValueError(
            f"{type(feed).__name__} feeds {num_rows} generation tokens from the target {keyword!r}, "
            f"found {sorted(targets or {})}. Give it in modality_targets; in generation, give what was "
            "sampled so far."
        )
    value = targets[keyword]
    if value.shape[0] != num_rows:
        raise ValueError(f"{type(feed).__name__} has {value.shape[0]} {keyword} for {num_rows} generation tokens")
    return value
