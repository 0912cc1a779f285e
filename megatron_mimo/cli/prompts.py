"""Records as prompts: what stands before the last answer is asked, the answer is what is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data import Conversation, SampleError, SampleProcessor, Turn, conversation_of
from megatron_mimo.data.messages import DOCUMENT, Medium
from megatron_mimo.data.sources import Source
from megatron_mimo.generation.messages import laid_out
from megatron_mimo.pretrained import load_processor


@dataclass(frozen=True)
class Prompt:
    """One record as the model is asked.

    Args:
        index: of the record, from 0.
        given: as `MimoModel.generate` takes it; None where the record cannot be used.
        error: why it cannot be used.
        read: files that it shows, as the data name them.
    """

    index: int
    given: dict[str, Any] | None
    error: str | None = None
    read: tuple[str, ...] = ()


def prompts_of(source: Source, process: SampleProcessor, indices: Iterable[int] | None = None) -> Iterator[Prompt]:
    """The records of a source as prompts, in order.

    Args:
        source: of records.
        process: lays them out.
        indices: of those that are wanted; None for all.
    """
    for index in range(len(source)) if indices is None else indices:
        read: tuple[str, ...] = ()
        try:
            asked = asked_of(source, index)[0]
            read = tuple(part.medium.path for _, part in asked.media() if part.medium and part.medium.path)
            yield Prompt(index, laid_out(asked, process, source.media_root), read=read)
        except SampleError as error:
            yield Prompt(index, None, error=f"{source.where(index)}: {error}", read=read)


def asked_of(source: Source, index: int) -> tuple[Conversation, tuple[str, ...]]:
    """What a record asks, up to its last answer, and the texts that it is to be answered with.

    Raises:
        SampleError: it cannot be read, or has an answer alone.
    """
    record = source.record(index)
    turns = list(conversation_of(record, columns=source.columns, unanswered=True).turns)
    answered = _text(turns.pop()) if turns[-1].role == "assistant" else None
    if not turns:
        raise SampleError("form", "expected a question before the answer, found none")
    if turns[-1].role == DOCUMENT:  # a text alone is one to go on from
        turns[-1] = replace(turns[-1], role="user")
    several = record.get("answers")
    answers = tuple(map(_answer, several)) if isinstance(several, list) else (answered,) if answered else ()
    return Conversation(tuple(turns)), answers


def picture_of(source: Source, index: int) -> Medium | None:
    """The picture that a record is to be answered with; None where it has none or cannot be read."""
    try:
        answer = conversation_of(source.record(index), columns=source.columns).turns[-1]
    except SampleError:
        return None
    media = [part.medium for part in answer.parts if part.kind == "image"] if answer.role == "assistant" else []
    return media[0] if media else None


def text_of(conversation: Conversation) -> str:
    """What is asked in words, a line a turn."""
    return "\n".join(text for turn in conversation.turns if turn.role != "assistant" and (text := _text(turn)))


def _answer(given: Any) -> str:
    """One of a record's `answers`: a text, or VQA's mapping with one."""
    return str(given["answer"] if isinstance(given, dict) and "answer" in given else given)


def _text(turn: Turn) -> str:
    return "".join(part.text for part in turn.parts if part.kind == "text").strip()


class Spoken:
    """What a pretrained model's ids say, without control tokens; a tokenizer as `MimoModel.generate` takes it.

    Args:
        config: of the model.

    Attributes:
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, config: MimoModelConfig) -> None:
        found = load_processor(config)
        self._tokenizer = getattr(found, "tokenizer", found)
        end = self._tokenizer.eos_token_id
        self.ends = () if end is None else (int(end),)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
