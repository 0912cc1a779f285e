"""What a modality's decoder learns to write: one description, which its generation input is given too.

A description says what targets look like, how many generation tokens they stand for, and what is added to
them once a microbatch (codes of media, draws). Both ends of the language model hold the same one, on whichever
pipeline stages they are, so that they agree on every row.

Shapes: `N` rows (generation tokens) of one modality in this data-parallel rank's microbatch, `n` items (runs of
`rows_per_item` rows that stay together), `M` targets, `D` width of a target, `K` codebooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from megatron_mimo.decoders.arguments import at_least_one, check_weight, check_within
from megatron_mimo.decoders.path import RectifiedFlow
from megatron_mimo.decoders.prepared import Prepared, Targets
from megatron_mimo.decoders.tokenizers import Tokenizer, built

if TYPE_CHECKING:  # Megatron takes seconds to import and is not needed where modules are given built
    from megatron.core.transformer.spec_utils import ModuleSpec


class TargetDescription(ABC):
    """What targets of one decoder look like, how many rows they stand for, what completes them.

    Subclasses are frozen dataclasses with a `tokenizer`, which may be None; equal ones describe the same targets.

    Attributes:
        keyword: what is learned; a batch may hold `media` in its place where there is a tokenizer.
        optional: keywords that a batch may hold beside it.
        rows_per_item: rows that belong together and stay on one rank.
        targets_per_item: targets of an item.
        variable: whether media differ in their number of items: speech, images at their own resolution. A span then
            ends by its end token (`end_token_ids` of the model's configuration), which is learned as text, and so is
            each generation token before it: it says that the span goes on. Otherwise every image or clip has
            `rows_per_medium` rows.
    """

    keyword: ClassVar[str] = "target"
    optional: ClassVar[tuple[str, ...]] = ("weight",)
    tokenizer: Tokenizer | ModuleSpec | None
    rows_per_item: int = 1
    targets_per_item: int = 1
    variable: bool = False

    @property
    def rows_per_medium(self) -> int:
        """Rows of one image or clip, by the tokenizer's grid; of one item without a tokenizer, and of a variable
        number the fewest."""
        if self.tokenizer is None:
            return self.rows_per_item
        items = self._codec.tokens_per_item // self.targets_per_item
        return max(items, 1) * self.rows_per_item

    @property
    def sampled_rows(self) -> tuple[int, int] | None:
        """Of samples that are rows `[M, D]`: how many an item gives, and `D`. None where samples are whole media
        or codes."""
        return None

    def built(self) -> Self:
        """The same with its tokenizer built, where that is a spec."""
        if self.tokenizer is None or isinstance(self.tokenizer, nn.Module):
            return self
        return replace(cast(Any, self), tokenizer=built(self.tokenizer))

    def part_of(self, other: TargetDescription | None) -> bool:
        """Whether `other` says all that this one does: what is shown is then what is learned."""
        if other is None or not isinstance(other, type(self)):
            return False
        own = fields(cast(Any, self))
        return all(getattr(self, one.name) == getattr(other, one.name) for one in own if one.compare)

    def num_rows(self, targets: Targets, where: str = "") -> int:
        """Generation tokens that targets stand for, read from shapes alone.

        Args:
            targets: what the batch brought, or prepared ones.
            where: `"<modality>/<decoder>"`, for messages.

        Raises:
            TypeError: a target that is no tensor.
            ValueError: a keyword missing or unknown, or a shape that does not fit.
        """
        where = f"targets of {where}" if where else f"targets ({type(self).__name__})"
        self._check_keywords(targets, where)
        count = self._count(targets)
        if count % self.targets_per_item:
            raise ValueError(
                f"{where}: got {count} targets, which is no whole number of items of {self.targets_per_item}."
            )
        items = count // self.targets_per_item
        for name, shape in self.shapes(count, items, targets).items():
            if name in targets and tuple(targets[name].shape) != shape:
                raise ValueError(
                    f"{where}: {name} must have shape {list(shape)} beside the other targets, got "
                    f"{list(targets[name].shape)}"
                )
        return items * self.rows_per_item

    def prepare(self, targets: Targets, stream: str = "") -> Prepared:
        """The targets checked, counted, and with everything added that is computed once a microbatch.

        Args:
            targets: what the batch brought, for all `N` rows. Left unchanged; draws that it holds are used.
            stream: of the random draws, `"<modality>/<decoder>"`.

        Raises:
            TypeError, ValueError: as `num_rows`; a value that means nothing, as far as `check_beside` looks.
        """
        rows = self.num_rows(targets, stream)
        beside = {name: targets[name] for name in self.optional if name in targets}
        self.check_beside(beside, f"targets of {stream}: " if stream else "")
        tensors = dict(targets)
        if "media" in tensors:
            tensors[self.keyword] = self.encoded(tensors.pop("media"))
        tensors = self.drawn(tensors, rows // self.rows_per_item, stream)
        return Prepared(tensors, rows, self.rows_per_item)

    def check_beside(self, beside: Targets, where: str = "") -> None:
        """Refuses values of optional keywords that mean nothing, on the CPU; elsewhere looking would wait for the
        device.

        Raises:
            ValueError: a weight that is negative, infinite or NaN; draws out of their range.
        """
        if "weight" in beside:
            check_weight(beside["weight"], where)

    def loss_shape(self, targets: Targets) -> tuple[int, ...]:
        """Shape of the losses of these targets, by shapes alone and not checked: one a target.

        Raises:
            TypeError, ValueError: what is learned is missing or no tensor of any use.
        """
        self._check_keywords(targets, f"targets ({type(self).__name__})")
        return (self._count(targets),)

    @abstractmethod
    def check_value(self, value: Tensor, where: str) -> None:
        """Refuses a tensor that cannot be learned here.

        Raises:
            ValueError: naming both forms.
        """

    @abstractmethod
    def shapes(self, count: int, items: int, targets: Targets) -> dict[str, tuple[int, ...]]:
        """The shape that each optional keyword must have beside `count` targets of `items` items."""

    def encoded(self, media: Tensor) -> Tensor:
        """What the tokenizer makes of media `[n, ...]`."""
        return self._codec.encode(media)

    def media_count(self, media: Tensor) -> int:
        """Targets that media `[n, ...]` give."""
        return media.shape[0] * self._codec.tokens_per_item

    def drawn(self, tensors: dict[str, Tensor], items: int, stream: str) -> dict[str, Tensor]:
        """The targets with this microbatch's random draws. Here: as they are."""
        del items, stream
        return tensors

    def blank(self, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        """Targets for `num_rows` generation tokens of which nothing is sampled yet, under the one keyword.

        Raises:
            ValueError: samples are no rows that could be shown one after another.
        """
        raise ValueError(f"{type(self).__name__} has no blank target for {num_rows} rows on {device}")

    def _check_variable(self) -> None:
        """Refuses a variable number of rows where a tokenizer's grid fixes it."""
        if self.variable and self.tokenizer is not None:
            raise ValueError(
                f"{type(self).__name__}: variable=True, but its tokenizer makes the same number of tokens of every "
                "image or clip. Leave variable out, or give codes in place of media."
            )

    @property
    def _codec(self) -> Tokenizer:
        return cast(Tokenizer, self.tokenizer)  # of a built description that has one

    def _count(self, targets: Targets) -> int:
        if self._from_media(targets):
            return self.media_count(targets["media"])
        return targets[self.keyword].shape[0]

    def _from_media(self, targets: Targets) -> bool:
        return "media" in targets and self.tokenizer is not None

    def _check_keywords(self, targets: Targets, where: str) -> None:
        wanted = "media" if self._from_media(targets) else self.keyword
        if wanted not in targets and "media" in targets:
            raise ValueError(
                f"{where} hold media, but nothing here encodes them to {self.keyword!r}. Give the decoder's "
                "description the `tokenizer`."
            )
        unknown = [name for name in targets if name not in (wanted, *self.optional)]
        if wanted not in targets or unknown:
            problem = f"hold the unknown {unknown}" if wanted in targets else f"lack [{wanted!r}]"
            raise ValueError(
                f"{where} {problem}: expected [{wanted!r}] and optionally {list(self.optional)}, found "
                f"{sorted(targets)}."
            )
        for name, value in targets.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{where}: {name} must be a tensor, got {type(value).__name__}. Convert it where the "
                    "batch is collated."
                )
        if wanted == self.keyword:
            self.check_value(targets[wanted], where)


@dataclass(frozen=True)
class CodeTargets(TargetDescription):
    """Codes of one or several codebooks, one row each: `codes` int64 `[N]`, or `[N, K]`; optionally `weight` `[N]` or
    `[N, K]`, and `drop` bool `[N]`, rows whose condition is dropped.

    Args:
        codebook_sizes: entries of the codebook, or of each of the `K`.
        tokenizer: frozen codec, or its spec, that makes codes of `media` and media of codes.

    Raises:
        ValueError: no codebook, or one without entries.

    Example:
        >>> CodeTargets(32).prepare({"codes": torch.arange(6)}).num_rows
        6
    """

    keyword: ClassVar[str] = "codes"
    optional: ClassVar[tuple[str, ...]] = ("weight", "drop")

    codebook_sizes: int | Sequence[int]
    tokenizer: Tokenizer | ModuleSpec | None = field(default=None, compare=False, repr=False)
    variable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._check_variable()
        object.__setattr__(self, "codebook_sizes", self.sizes)  # so that equal ones are equal
        if not self.sizes:
            raise ValueError("CodeTargets: codebook_sizes must name at least one codebook, found none")
        for size in self.sizes:
            at_least_one("CodeTargets", codebook_sizes=size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each of the `K` codebooks."""
        return (self.codebook_sizes,) if isinstance(self.codebook_sizes, int) else tuple(self.codebook_sizes)

    def check_value(self, value: Tensor, where: str) -> None:
        """Refuses what are no int64 codes of these codebooks."""
        books = len(self.sizes)
        fits = (value.ndim == 2 and value.shape[1] == books) or value.ndim == books == 1
        if not fits or value.dtype != torch.int64:
            form = "[N]" if books == 1 else f"[N, {books}]"
            raise ValueError(f"{where}: codes must be int64 {form}, got {value.dtype} {list(value.shape)}")

    def shapes(self, count: int, items: int, targets: Targets) -> dict[str, tuple[int, ...]]:
        """`weight` `[N]` or `[N, K]`, `drop` `[N]`."""
        weight = targets.get("weight")
        each = (len(self.sizes),) if weight is not None and weight.ndim == 2 else ()
        return {"drop": (items,), "weight": (count, *each)}

    def loss_shape(self, targets: Targets) -> tuple[int, ...]:
        """One loss for each row and codebook."""
        return (*super().loss_shape(targets), len(self.sizes))

    def blank(self, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        """`codes` `[num_rows]`, or `[num_rows, K]` for several codebooks, int64 zeros."""
        books = len(self.sizes)
        shape = (num_rows,) if books == 1 else (num_rows, books)
        return {"codes": torch.zeros(shape, dtype=torch.int64, device=device)}


@dataclass(frozen=True)
class VectorTargets(TargetDescription):
    """One vector a row: `target` floating `[N, D]`; optionally `weight` `[N]`.

    Args:
        width: `D`.
        tokenizer: frozen codec, or its spec, that makes targets of `media` and media of samples.

    Raises:
        ValueError: a width below 1.

    Example:
        >>> VectorTargets(4).prepare({"target": torch.zeros(6, 4)}).num_rows
        6
    """

    width: int
    tokenizer: Tokenizer | ModuleSpec | None = field(default=None, compare=False, repr=False)
    variable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._check_variable()
        at_least_one(type(self).__name__, target_width=self.width)

    @property
    def sampled_rows(self) -> tuple[int, int] | None:
        """An item's targets; None where the tokenizer makes media of them."""
        return (self.targets_per_item, self.width) if self.tokenizer is None else None

    def check_value(self, value: Tensor, where: str) -> None:
        """Refuses what is no `[M, D]`."""
        if value.ndim != 2 or value.shape[1] != self.width:
            raise ValueError(f"{where}: target must be [N, {self.width}], got {list(value.shape)}")

    def shapes(self, count: int, items: int, targets: Targets) -> dict[str, tuple[int, ...]]:
        """`weight` `[M]`."""
        del items, targets
        return {"weight": (count,)}

    def blank(self, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        """`target` `[num_rows, D]`, float32 zeros."""
        return {"target": torch.zeros(num_rows, self.width, device=device)}


@dataclass(frozen=True)
class FlowTargets(VectorTargets):
    """Vectors that a rectified flow draws, item by item: `target` floating `[M, D]`; optionally `weight` `[M]` and the
    draws `time` `[n]`, `noise` `[M, D]` and `drop` bool `[n]`, which are added otherwise.

    Args:
        width: `D`.
        tokenizer: frozen codec, or its spec, that makes targets of `media` and media of samples.
        flow: how time is drawn.
        rows_per_item: rows of an item, which share one time.
        targets_per_item: targets of an item; None for as many as rows.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> prepared = FlowTargets(4, rows_per_item=2).prepare({"target": torch.zeros(6, 4)})
        >>> prepared["time"].shape, prepared["noise"].shape
        (torch.Size([3]), torch.Size([6, 4]))
    """

    optional: ClassVar[tuple[str, ...]] = ("weight", "time", "noise", "drop")

    flow: RectifiedFlow = field(default_factory=RectifiedFlow)
    rows_per_item: int = 1
    targets_per_item: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets_per_item is None:
            object.__setattr__(self, "targets_per_item", self.rows_per_item)
        at_least_one("FlowTargets", rows_per_item=self.rows_per_item, targets_per_item=self.targets_per_item)

    def shapes(self, count: int, items: int, targets: Targets) -> dict[str, tuple[int, ...]]:
        """`weight` `[M]`, `time` and `drop` `[n]`, `noise` `[M, D]`."""
        del targets
        return {"weight": (count,), "time": (items,), "drop": (items,), "noise": (count, self.width)}

    def check_beside(self, beside: Targets, where: str = "") -> None:
        """A `time` outside [0, 1] is refused too: there is no point of the path there."""
        super().check_beside(beside, where)
        if "time" in beside:
            check_within(beside["time"], f"{where}time", 0, 1)

    def drawn(self, tensors: dict[str, Tensor], items: int, stream: str) -> dict[str, Tensor]:
        """With `time` and `noise`."""
        return self.flow.add_draws(tensors, items, stream)
