"""Conversations -> samples: token ids with media laid out among them, what is learned, and the media's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.chat import ChatText, ChatTokens
from megatron_mimo.data.media import Sound, Video, open_image, open_sound, open_video
from megatron_mimo.data.messages import MEDIA_KINDS, Conversation, Kind, Medium, Part, SampleError
from megatron_mimo.data.positions import SEQUENTIAL, PositionRule, Span, positions
from megatron_mimo.data.readers import Inputs, Reader, Reading
from megatron_mimo.data.writers import Writer

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Handling:
    """How media of one kind are laid out in the ids, read and written.

    Args:
        modality: the model's name for it.
        special: the id at which the encoder's rows are placed (`special_token_ids`).
        generation: the id at which the decoder writes (`generation_token_ids`).
        begin, end: ids of the text that opens and closes a written span (`begin_token_ids`, `end_token_ids`). Without a
            begin token the first generation token is what the language model learns to open the span with.
        read_begin, read_end: ids around a span that is read, where no chat template writes them.
        reader: makes media ready for the encoder; None: this kind is not read.
        writer: makes targets; None: this kind is not written.
        reread: after a written span the same medium is read, so that later turns see it through the encoder.
        rule: positions of a span.
        whole: whether all positions of a span see the whole of it (`Pack.spans`), and not what is before them alone.
        max_items: of one sample; a sample with more is refused.

    Raises:
        ValueError: a reader without special token, a writer without generation token, or `reread` without both.
    """

    modality: str
    special: int | None = None
    generation: int | None = None
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    read_begin: tuple[int, ...] = ()
    read_end: tuple[int, ...] = ()
    reader: Reader | None = None
    writer: Writer | None = None
    reread: bool = False
    rule: PositionRule = SEQUENTIAL
    whole: bool = False
    max_items: int | None = None

    def __post_init__(self) -> None:
        if (self.reader is None) != (self.special is None):
            raise ValueError(f"{self.modality}: a reader and a special token go together; give both or neither")
        if (self.writer is None) != (self.generation is None):
            raise ValueError(f"{self.modality}: a writer and a generation token go together; give both or neither")
        if self.reread and (self.reader is None or self.writer is None):
            raise ValueError(f"{self.modality}: reread needs a reader and a writer")

    @classmethod
    def of(
        cls,
        config: MimoModelConfig,
        modality: str,
        *,
        reader: Reader | None = None,
        writer: Writer | None = None,
        **more: Any,
    ) -> Self:
        """Laid out as a model has it: special, generation, begin and end tokens are its configuration's.

        Args:
            config: of the model.
            modality: one of it.
            reader: needs the modality's special token.
            writer: needs its generation token; begin and end tokens are laid out where the model has them.
            more: `read_begin`, `read_end`, `reread`, `rule`, `max_items`; `whole` in place of the configuration's
                `whole_spans`.

        Raises:
            ValueError: the model lacks the modality, or the token of a reader or a writer.
        """
        if modality not in config.modality_submodules:
            raise ValueError(f"expected a modality of {sorted(config.modality_submodules)}, found {modality!r}")
        for what, given, name in (("reader", reader, "special_token_ids"), ("writer", writer, "generation_token_ids")):
            if given is not None and modality not in getattr(config, name):
                raise ValueError(
                    f"{modality}: a {what} needs the model's {name}[{modality!r}], found {dict(getattr(config, name))}"
                )
        begin, end = (ids.get(modality) for ids in (config.begin_token_ids, config.end_token_ids))
        return cls(
            modality,
            special=None if reader is None else config.special_token_ids[modality],
            generation=None if writer is None else config.generation_token_ids[modality],
            begin=() if writer is None or begin is None else (begin,),
            end=() if writer is None or end is None else (end,),
            reader=reader,
            writer=writer,
            **{"whole": modality in config.whole_spans, **more},
        )


@dataclass(frozen=True)
class Item:
    """One medium in a sample.

    Args:
        modality: the model's name for it.
        written: whether it is a target.
        start: of its positions in the sample, any text among them included.
        length: from its first to behind its last position.
        rows: positions that its rows fill or that it is written at.
        tensors: encoder or decoder -> keyword -> tensor.
        learn: of a written one, whether it counts in the loss.
        whole: whether its positions see all of each other.
    """

    modality: str
    written: bool
    start: int
    length: int
    rows: int
    tensors: Inputs
    learn: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Sample:
    """A conversation as the model takes it.

    Args:
        input_ids: int64 `[S]`.
        learn: bool `[S]`, True at each token that the language model learns to say.
        items: media in order.
        position_ids: int64 `[k, S]`.
        delta: see `positions`.
        cost: numbers that encoders read and decoders write.
        name: where it comes from, for messages.
    """

    input_ids: Tensor
    learn: Tensor
    items: tuple[Item, ...]
    position_ids: Tensor
    delta: int = 0
    cost: float = 0.0
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class _Layout:
    """A sample while it is laid out."""

    ids: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    cost: float = 0.0

    def text(self, ids: tuple[int, ...], learn: bool = False) -> None:
        self.ids += ids
        self.learn += [learn] * len(ids)


class SampleProcessor:
    """Makes samples of conversations.

    Args:
        chat: tokenises text.
        handling: kind of media -> how it is laid out, read and written.
        sections: k, of the rotary embedding.

    Raises:
        ValueError: a kind of media that does not exist.
    """

    def __init__(self, chat: ChatText, handling: Mapping[Kind, Handling] | None = None, *, sections: int = 1) -> None:
        self.chat, self.handling, self.sections = chat, dict(handling or {}), sections
        for kind in self.handling:
            if kind not in MEDIA_KINDS:
                raise ValueError(f"handling: expected some of {list(MEDIA_KINDS)}, found {kind!r}")

    def __call__(
        self, conversation: Conversation, media_root: Path | None = None, name: str = "", *, prompt: bool = False
    ) -> Sample:
        """The sample that a conversation makes.

        Args:
            conversation: turns of parts.
            media_root: the directory that paths of media must lie in.
            name: what errors and pages call it.
            prompt: lay it out for the model to answer: the assistant's turn is begun, and nothing is learned.

        Raises:
            SampleError: something in it cannot be used.
        """
        self._check_items(conversation)
        tokens = self.chat.encode(conversation, prompt=prompt)
        layout = self._laid_out(tokens, conversation, media_root)
        ids = torch.tensor(layout.ids, dtype=torch.long)
        if not len(ids):
            raise SampleError("empty", "expected at least one token, found none")
        position_ids, delta = positions(len(ids), layout.spans, self.sections)
        learn = torch.tensor(layout.learn)
        return Sample(ids, learn, tuple(layout.items), position_ids, delta, layout.cost, name)

    def _check_items(self, conversation: Conversation) -> None:
        """Refuses media that the model has no use for before any of them is opened."""
        counts = dict.fromkeys(MEDIA_KINDS, 0)
        for turn, part in conversation.media():
            handling = self.handling.get(part.kind)
            written = turn.role == "assistant"
            if handling is None or (handling.writer if written else handling.reader) is None:
                takes = (one.writer if written else one.reader for one in self.handling.values())
                others = [kind for kind, given in zip(self.handling, takes) if given is not None]
                what, does = ("writer", "writes") if written else ("reader", "reads")
                told = f"{part.kind}: this model has no {what} for it; it {does} {' and '.join(others) or 'text alone'}"
                raise SampleError("media", told)
            counts[part.kind] += 1
            if handling.max_items is not None and counts[part.kind] > handling.max_items:
                raise SampleError(
                    "too_many", f"{part.kind}: expected at most {handling.max_items} (max_items), found more"
                )

    def _laid_out(self, tokens: ChatTokens, conversation: Conversation, root: Path | None) -> _Layout:
        layout, media, start = _Layout(), conversation.media(), 0
        for position in sorted(tokens.media):
            layout.ids += tokens.ids[start:position]
            layout.learn += tokens.learn[start:position]
            turn, part = media[tokens.media[position]]
            if turn.role == "assistant":
                self._write(layout, part, root, learn=tokens.learn[position])
            else:
                self._read(layout, part, root)
            start = position + 1
        layout.ids += tokens.ids[start:]
        layout.learn += tokens.learn[start:]
        return layout

    def _read(self, layout: _Layout, part: Part, root: Path | None) -> None:
        handling = self.handling[part.kind]
        reader = cast(Reader, handling.reader)  # media without one were refused before
        reading = reader(_opened(part, reader, root))
        layout.text(handling.read_begin)
        self._place_reading(layout, handling, reading)
        layout.text(handling.read_end)

    def _place_reading(self, layout: _Layout, handling: Handling, reading: Reading) -> None:
        start = len(layout.ids)
        tokens = reading.tokens if reading.tokens is not None else (None,) * reading.rows
        grids = list(reading.grids)
        for run_start, run_stop in _runs(tokens):
            grid = grids.pop(0) if grids else None
            layout.spans.append(Span(start + run_start, run_stop - run_start, handling.rule, grid, reading.step))
        special = cast(int, handling.special)
        layout.text(tuple(special if token is None else token for token in tokens))
        layout.cost += reading.cost
        item = Item(handling.modality, False, start, len(tokens), reading.rows, reading.inputs, whole=handling.whole)
        layout.items.append(item)

    def _write(self, layout: _Layout, part: Part, root: Path | None, *, learn: bool) -> None:
        handling = self.handling[part.kind]
        writer, generation = cast(Writer, handling.writer), cast(int, handling.generation)
        writing = writer(_opened(part, writer, root))
        layout.text(handling.begin, learn)
        start = len(layout.ids)
        layout.spans.append(Span(start, writing.rows, handling.rule, writing.grid))
        layout.text((generation,) * writing.rows)
        if not handling.begin and learn:
            layout.learn[start] = True  # it is what opens the span
        layout.text(handling.end, learn)
        layout.cost += writing.cost
        rows = writing.rows
        item = Item(handling.modality, True, start, rows, rows, writing.targets, learn, handling.whole)
        layout.items.append(item)
        if handling.reread:
            self._read(layout, part, root)


def _runs(tokens: tuple[int | None, ...]) -> list[tuple[int, int]]:
    """Start and stop of each run of None."""
    edges = [
        at
        for at in range(len(tokens) + 1)
        if (at < len(tokens) and tokens[at] is None) != (at > 0 and tokens[at - 1] is None)
    ]
    return list(zip(edges[::2], edges[1::2]))


def _opened(part: Part, by: Reader | Writer, root: Path | None) -> Image | Sound | Video:
    medium = cast(Medium, part.medium)
    if part.kind == "image":
        return open_image(medium, root, by.limits)
    if part.kind == "audio":
        return open_sound(medium, int(by.rate), root, by.limits)
    return open_video(medium, by.rate, root, by.limits)


def cut(sample: Sample, length: int) -> Sample | None:
    """The sample's first `length` tokens, ended before a medium that would be cut; None if nothing learned is left.

    Example:
        >>> sample = Sample(torch.arange(4), torch.tensor([False, True, True, True]), (), torch.arange(4)[None])
        >>> len(cut(sample, 2))
        2
    """
    for item in sample.items:
        if item.start < length < item.start + item.length:
            length = item.start
    items = tuple(item for item in sample.items if item.start + item.length <= length)
    learn = sample.learn[:length]
    if not learn[1:].any() and not any(item.written and item.learn for item in items):
        return None
    return replace(
        sample,
        input_ids=sample.input_ids[:length],
        learn=learn,
        items=items,
        position_ids=sample.position_ids[:, :length],
        delta=int(sample.position_ids[:, :length].max()) + 1 - length,
    )


Policy = Literal["drop", "refuse", "cut"]


def fitted(sample: Sample, length: int, budget: float | None, policy: Policy) -> Sample:
    """The sample if it fits a pack; else as the policy says.

    Args:
        sample: any.
        length: tokens of a pack.
        budget: media cost of a pack, or None.
        policy: "cut" shortens its text, "drop" and "refuse" leave the decision of what an unusable sample means.

    Raises:
        SampleError: too long or too costly, of kind `too_long` or `too_costly`.
    """
    if budget is not None and sample.cost > budget:
        raise SampleError(
            "too_costly", f"expected a media cost of at most {budget:g} (cost budget), found {sample.cost:g}"
        )
    if len(sample) <= length:
        return sample
    shorter = cut(sample, length) if policy == "cut" else None
    if shorter is None:
        left = "; nothing learned is left of it when cut" if policy == "cut" else ""
        raise SampleError("too_long", f"expected at most {length} tokens, found {len(sample)}{left}")
    return shorter
