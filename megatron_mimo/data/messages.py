"""Records of many spellings -> one form of conversation: turns of parts, each part text or one medium.

    {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Draw it"}, {"type": "image", "image": "cat.png"}]},
        {"role": "assistant", "content": [{"type": "image", "image": "drawn.png"}]}
    ]}

A medium in a user's turn is read, one in an assistant's turn is to be written. `"learn": false` on a part or a turn
takes it out of the loss. What a record may also be: messages of plain text with `<image>` tags and columns of media,
ShareGPT's and LLaVA's `conversations`, a text beside media columns, and question beside answer. Nothing is opened here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast
from urllib.parse import unquote_to_bytes

Kind = Literal["text", "image", "audio", "video"]
MEDIA_KINDS: tuple[Kind, ...] = ("image", "audio", "video")
DOCUMENT = "document"
"""The role of a text that stands by itself: it is laid out without a chat template, and learned whole."""

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    "system": "system",
    "developer": "system",
    DOCUMENT: DOCUMENT,
}
_TAG = re.compile("<(image|audio|video)>")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
_COLUMNS = {kind: (kind, f"{kind}s", f"{kind}_path", f"{kind}_paths") for kind in MEDIA_KINDS}
_TEXTS = ("text", "caption")
_QUESTIONS = ("instruction", "query", "question", "prompt")
_ANSWERS = ("output", "response", "answer", "completion")


class SampleError(ValueError):
    """A sample that cannot be used. A run counts it under `kind` and goes on, or stops, as it was set.

    Args:
        kind: the word it is counted under.
        message: what was expected and what was found.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Medium:
    """One image, clip or video that is not opened yet: a path below the media root, encoded bytes, or a value.

    Args:
        path: relative to the media root, or absolute and below it.
        data: the bytes of a file.
        value: an image of PIL, or `(samples, rate)` of a sound.
    """

    path: str | None = None
    data: bytes | None = None
    value: object = None


@dataclass(frozen=True)
class Part:
    """A piece of a message.

    Args:
        kind: text or the kind of the medium.
        text: of a text part.
        medium: of any other.
        learn: whether an assistant's part counts in the loss.
    """

    kind: Kind
    text: str = ""
    medium: Medium | None = None
    learn: bool = True


@dataclass(frozen=True)
class Turn:
    """What one side said: `role` is system, user, assistant, tool or document."""

    role: str
    parts: tuple[Part, ...]
    learn: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns of parts: the form that every record takes."""

    turns: tuple[Turn, ...]

    def media(self) -> list[tuple[Turn, Part]]:
        """The media in the order of the conversation, each with the turn it stands in."""
        return [(turn, part) for turn in self.turns for part in turn.parts if part.kind != "text"]


def conversation_of(
    record: object, *, columns: Literal["read", "write"] = "read", unanswered: bool = False
) -> Conversation:
    """The conversation that a record of any known spelling stands for.

    Args:
        record: a mapping, as a line of JSON gives it.
        columns: where a record has a text and media columns alone: "read" makes the media a user's and the text the
            answer, "write" makes the text a user's and the media the answer, which the model learns to write.
        unanswered: whether media columns without a text are a question without an answer.

    Raises:
        SampleError: the record is none of them, a turn is empty, tags and media differ in number, or a URL is given.

    Example:
        >>> record = {"messages": [{"role": "user", "content": "<image>What is it?"}], "images": ["cat.png"]}
        >>> [part.kind for part in conversation_of(record).turns[0].parts]
        ['image', 'text']
    """
    if not isinstance(record, Mapping):
        raise SampleError("form", f"expected a record with names, found a {type(record).__name__}")
    if record.get("messages") is not None:
        turns = [_turn(turn, "role", "content") for turn in _list(record["messages"], "messages")]
    elif record.get("conversations") is not None:
        turns = [_sharegpt_turn(turn) for turn in _list(record["conversations"], "conversations")]
        if isinstance(record.get("system"), str) and record["system"]:
            turns.insert(0, Turn("system", (Part("text", record["system"]),)))
    else:
        return _checked(_from_columns(record, columns, unanswered))
    given = {kind: media for kind in MEDIA_KINDS if (media := _column(record, kind))}
    return _checked(_with_tags(turns, given) if given else turns)


def _checked(turns: Sequence[Turn]) -> Conversation:
    if not turns:
        raise SampleError("empty", "expected at least one turn, found none")
    for index, turn in enumerate(turns):
        if not any(part.kind != "text" or part.text.strip() for part in turn.parts):
            raise SampleError("empty", f"turn {index} ({turn.role}) is empty: expected text or a medium in it")
    return Conversation(tuple(turns))


def _list(value: object, name: str) -> Sequence:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SampleError("form", f"{name}: expected a list of turns, found a {type(value).__name__}")
    return value


def _turn(turn: object, role_key: str, content_key: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise SampleError("form", f"expected a turn with {role_key!r} and {content_key!r}, found {_short(turn)}")
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError("form", f"{role_key}: expected one of {sorted(_ROLES)}, found {_short(role)}")
    if isinstance(content, str):
        parts: tuple[Part, ...] = (Part("text", content),)
    elif content is None:
        parts = ()
    else:
        parts = tuple(_part(part) for part in _list(content, content_key))
    return Turn(_ROLES[role], parts, _learn(turn))


def _sharegpt_turn(turn: object) -> Turn:
    if isinstance(turn, Mapping) and "role" in turn:
        return _turn(turn, "role", "content")
    return _turn(turn, "from", "value")


def _learn(node: Mapping) -> bool:
    learn = node.get("learn", True)
    if learn is None:  # a table has a column for all
        return True
    if not isinstance(learn, bool):
        raise SampleError("form", f"learn: expected true or false, found {_short(learn)}")
    return learn


def _part(part: object) -> Part:
    if isinstance(part, str):
        return Part("text", part)
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise SampleError("form", f"expected a part with a 'type', found {_short(part)}")
    kind = part["type"]
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise SampleError("form", f"a text part needs 'text', a string; found {_short(part.get('text'))}")
        return Part("text", part["text"], learn=_learn(part))
    if kind == "input_audio":  # OpenAI's
        given = part.get("input_audio")
        if not isinstance(given, Mapping) or not isinstance(given.get("data"), str):
            raise SampleError("form", "an input_audio part needs 'input_audio' with 'data' in base64")
        return Part("audio", medium=Medium(data=_base64(given["data"])), learn=_learn(part))
    base = kind.removesuffix("_url")
    if base not in MEDIA_KINDS:
        raise SampleError("form", f"type: expected text, image, audio or video, found {kind!r}")
    given = next((part[name] for name in (kind, base, "path", "url", "bytes") if part.get(name) is not None), None)
    return Part(base, medium=medium_of(given, base), learn=_learn(part))


def medium_of(given: object, kind: Kind) -> Medium:
    """The medium that a value of a record names: a path, a `data:` URL, bytes, or something already decoded.

    Raises:
        SampleError: a URL, which is never fetched, or a value that is no medium.

    Example:
        >>> medium_of("data:text/plain;base64,aGk=", "image").data
        b'hi'
    """
    if isinstance(given, Mapping):
        if given.get("array") is not None and given.get("sampling_rate"):
            return Medium(value=(given["array"], int(given["sampling_rate"])))
        for name in ("bytes", "path", "url"):
            if given.get(name) is not None:
                return medium_of(given[name], kind)
        raise SampleError("form", f"{kind}: expected 'path', 'bytes' or 'url', found {sorted(map(str, given))}")
    if isinstance(given, (bytes, bytearray)):
        return Medium(data=bytes(given))
    if isinstance(given, str) and given:
        return _named(given, kind)
    if given is None or isinstance(given, (str, int, float, Sequence)):
        raise SampleError("form", f"{kind}: expected a path or bytes, found {_short(given)}")
    return Medium(value=given)


def _named(given: str, kind: Kind) -> Medium:
    if given[:5].lower() == "data:":
        head, comma, body = given.partition(",")
        if not comma:
            raise SampleError("media", f"{kind}: a data: URL without a comma has no data")
        return Medium(data=_base64(body) if head.endswith(";base64") else unquote_to_bytes(body))
    if _SCHEME.match(given):
        raise SampleError(
            "url",
            f"{kind}: expected a path below the media root, found the URL {_short(given)}. URLs are not fetched: "
            "download the file first, or give its bytes as a data: URL.",
        )
    return Medium(path=given)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SampleError("media", "expected base64, found other characters in it or a wrong length") from None


# Columns -------------------------------------------------------------------------------------


def _column(record: Mapping, kind: Kind) -> list[Medium]:
    for name in _COLUMNS[kind]:
        value = record.get(name)
        if value is None:
            continue
        # A tuple of samples and rate is one sound, not a list of paths.
        several = isinstance(value, list) or (isinstance(value, tuple) and kind != "audio")
        return [medium_of(one, kind) for one in (value if several else [value])]
    return []


def _with_tags(turns: Sequence[Turn], given: Mapping[Kind, list[Medium]]) -> list[Turn]:
    """The turns with media in the places of their tags; media of a kind without any tag open the first user turn."""
    tags = dict.fromkeys(given, 0)
    for turn in turns:
        for part in turn.parts:
            if part.kind != "text":
                raise SampleError(
                    "form", "media stand both in the parts of a turn and in a column; expected one of them"
                )
            for found in _TAG.findall(part.text):
                if found in tags:
                    tags[found] += 1
    untagged = [kind for kind in given if not tags[kind] and len(given[kind]) == 1]
    for kind in given:
        if kind not in untagged and tags[kind] != len(given[kind]):
            raise SampleError(
                "tags",
                f"{kind}: {tags[kind]} tags <{kind}> but {len(given[kind])} in the column. Expected as many tags as "
                "media; a text that speaks of tags belongs into parts.",
            )
    left = {kind: iter(media) for kind, media in given.items()}
    placed = [replace(turn, parts=tuple(p for part in turn.parts for p in _split(part, tags, left))) for turn in turns]
    for kind in reversed(untagged):
        first = next((i for i, turn in enumerate(placed) if turn.role == "user"), None)
        if first is None:
            raise SampleError("tags", f"{kind}: no tag <{kind}> and no user's turn to put it into")
        opening = Part(kind, medium=next(left[kind]))
        placed[first] = replace(placed[first], parts=(opening, *placed[first].parts))
    return placed


def _split(part: Part, tags: Mapping[Kind, int], left: Mapping) -> list[Part]:
    """A text part cut at its tags. Tags of kinds that have no column stay text."""
    parts, start = [], 0
    for match in _TAG.finditer(part.text):
        kind = cast(Kind, match.group(1))
        if kind not in tags:
            continue
        parts += [replace(part, text=part.text[start : match.start()])]
        parts += [Part(kind, medium=next(left[kind]), learn=part.learn)]
        start = match.end()
    parts.append(replace(part, text=part.text[start:]))
    return [part for part in parts if part.kind != "text" or part.text]


def _from_columns(record: Mapping, columns: Literal["read", "write"], unanswered: bool) -> list[Turn]:
    media = [Part(kind, medium=medium) for kind in MEDIA_KINDS for medium in _column(record, kind)]
    question, answer = _first_text(record, _QUESTIONS), _first_text(record, _ANSWERS)
    if answer is not None and question is not None:
        asked = question if not record.get("input") else f"{question}\n{record['input']}"
        turns = [Turn("user", (*media, Part("text", asked))), Turn("assistant", (Part("text", answer),))]
        system = record.get("system")
        return [Turn("system", (Part("text", system),)), *turns] if isinstance(system, str) and system else turns
    text = _first_text(record, _TEXTS)
    if text is None and unanswered and media:
        return [Turn("user", tuple(media))]
    if text is None:
        raise SampleError(
            "form",
            "expected 'messages', 'conversations', a text column "
            f"{list(_TEXTS)} or a pair such as 'question' and 'answer'; found {sorted(map(str, record))[:12]}",
        )
    if not media:
        return [Turn(DOCUMENT, (Part("text", text),))]
    if columns == "write":
        return [Turn("user", (Part("text", text),)), Turn("assistant", tuple(media))]
    return [Turn("user", tuple(media)), Turn("assistant", (Part("text", text),))]


def _first_text(record: Mapping, names: Sequence[str]) -> str | None:
    return next((record[name] for name in names if isinstance(record.get(name), str)), None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
