"""Conversations -> token ids with a mark on each that is learned, and the places of media among them.

The text is rendered by the tokenizer's chat template and tokenised as one string, so that ids are those of
`apply_chat_template`. Before that, whatever a user typed that the tokenizer would take for a control token is put
aside, and tokenised as the text that it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from megatron_mimo.data.messages import DOCUMENT, Conversation, Kind, Part, SampleError, Turn

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)
"""A chat template for models that have none: turns end with a line break, answers with the end token."""

# Private characters around a letter and a number: what is put aside while a template renders.
_OPEN, _CLOSE = "\ue000", "\ue001"
_ASIDE = re.compile(f"{_OPEN}([a-z])([0-9]*){_CLOSE}")
_STAND_IN = f"{_OPEN}{_CLOSE}"
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTokens:
    """A tokenised conversation whose media are still one position each.

    Args:
        ids: token ids; 0 where a medium stands.
        learn: whether the token is one that the model learns to say.
        media: position -> which of `Conversation.media()` stands there.
    """

    ids: list[int]
    learn: list[bool]
    media: dict[int, int]


@dataclass
class _Aside:
    """What was put aside in one conversation: typed control tokens, and media by their number."""

    typed: list[str] = field(default_factory=list)
    media: int = 0


class ChatText:
    """Tokenises conversations.

    Args:
        tokenizer: of `transformers`, backed by `tokenizers`.
        template: a chat template; None: the tokenizer's own.
        placeholders: kind of media -> the text that the template writes for one, such as `<|image_pad|>`.
            Templates that know no media need none: a medium then stands where its part stands.
        add_eos: end a conversation with the end token where the template does not.
        max_characters: of one conversation; a longer one is refused before it is tokenised.

    Raises:
        TypeError: a tokenizer that is not backed by `tokenizers`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        placeholders: Mapping[Kind, str] | None = None,
        add_eos: bool = False,
        max_characters: int = 1_000_000,
    ) -> None:
        if not tokenizer.is_fast:
            raise TypeError(
                f"{type(tokenizer).__name__} is not backed by the `tokenizers` library, expected one that is: "
                "offsets of tokens in the text say which of them are learned"
            )
        self._tokenizer, self._add_eos, self.max_characters = tokenizer, add_eos, max_characters
        self._template = template or tokenizer.chat_template
        self._placeholders = dict(placeholders or {})
        self._encoder, self._stand_in = _with_stand_in(tokenizer)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = _pattern([*special, *self._placeholders.values()])
        self._control_ids = set(self._encoder.encode("".join(special), add_special_tokens=False).ids)
        self._names = dict(tokenizer.special_tokens_map)
        self._takes_parts: dict[str, bool] | None = None

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> ChatTokens:
        """Tokens of a conversation.

        Args:
            conversation: turns of parts.
            prompt: end with what begins the assistant's turn, which the model shall say; nothing is learned.

        Raises:
            SampleError: it is too long, the template does something else than lay out turns one after another, or a
                prompt ends with an answer.
            ValueError: there is no chat template.
        """
        size = sum(len(part.text) for turn in conversation.turns for part in turn.parts)
        if size > self.max_characters:
            raise SampleError("too_long", f"expected at most {self.max_characters} characters of text, found {size}")
        if all(turn.role == DOCUMENT for turn in conversation.turns):
            return self._encode_document(conversation, ends=not prompt)
        if self._template is None:
            raise ValueError(
                f"{type(self._tokenizer).__name__} has no chat template; give ChatText(template=...), for instance "
                "PLAIN_TEMPLATE."
            )
        if not prompt:
            return self._encode_turns(conversation)
        if conversation.turns[-1].role == "assistant":
            raise SampleError("form", "a prompt ends with a turn of the assistant, expected one that it can answer")
        aside = _Aside()
        text, _ = self._rendered([self._message(turn, aside) for turn in conversation.turns], prompt=True)
        return self._tokens(text, bytearray(len(text)), aside, self._read_media(conversation))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens written out."""
        return str(self._tokenizer.decode(list(ids)))

    def _encode_document(self, conversation: Conversation, ends: bool) -> ChatTokens:
        aside = _Aside()
        text = "".join(self._flat(part, aside) for turn in conversation.turns for part in turn.parts)
        tokens = self._tokens(text, bytearray(b"\1") * len(text), aside, [], whole=True)
        return self._ended(tokens) if ends else tokens

    def _encode_turns(self, conversation: Conversation) -> ChatTokens:
        turns, aside = conversation.turns, _Aside()
        messages = [self._message(turn, aside) for turn in turns]
        if _MARKS_ANSWERS.search(self._template):
            text, spans = self._rendered(messages, marks=True)
            spans = _learned_marks(spans, [turn for turn in turns if turn.role == "assistant"])
        else:
            text, _ = self._rendered(messages)
            spans = [self._span_of(index, messages, text) for index, turn in enumerate(turns) if _is_learned(turn)]
        learned = bytearray(len(text))
        for start, stop in spans:
            learned[start:stop] = b"\1" * (stop - start)
        tokens = self._tokens(text, learned, aside, self._read_media(conversation))
        if len(tokens.media) != len(conversation.media()):
            raise SampleError(
                "template", f"the chat template placed {len(tokens.media)} of {len(conversation.media())} media"
            )
        return self._ended(tokens) if self._add_eos and turns[-1].role == "assistant" else tokens

    # Text in, text out ------------------------------------------------------------------------

    def _message(self, turn: Turn, aside: _Aside) -> dict[str, Any]:
        takes_parts = self._roles_with_parts().get(turn.role, False)
        if not takes_parts:
            return {"role": turn.role, "content": "".join(self._flat(part, aside, turn.learn) for part in turn.parts)}
        content = []
        for part in turn.parts:
            if part.kind == "text" or turn.role == "assistant" or part.kind not in self._placeholders:
                content.append({"type": "text", "text": self._flat(part, aside, turn.learn)})
            else:
                aside.media += 1
                content.append({"type": part.kind})
        return {"role": turn.role, "content": content}

    def _flat(self, part: Part, aside: _Aside, learn: bool = True) -> str:
        """A part as text in which nothing is a control token, between brackets if it is not to be learned."""
        if part.kind != "text":
            aside.media += 1
            text = f"{_OPEN}m{aside.media - 1}{_CLOSE}"
        else:
            text = self._control.sub(lambda match: _put_aside(match.group(), aside), part.text)
        return text if part.learn and learn else f"{_OPEN}b{_CLOSE}{text}{_OPEN}e{_CLOSE}"

    def _roles_with_parts(self) -> dict[str, bool]:
        """Which roles the template takes as a list of parts, with a placeholder for each medium; found by trying it."""
        if self._takes_parts is None:
            self._takes_parts = {}
            kinds = list(self._placeholders)
            for role in ("system", "user", "assistant", "tool") if kinds else ():
                media = [{"type": kind} for kind in kinds] if role == "user" else []
                turn = {"role": role, "content": [*media, {"type": "text", "text": "probe"}]}
                opening = [] if role in ("user", "system") else [{"role": "user", "content": "first"}]
                try:
                    text, _ = self._rendered([*opening, turn])
                except Exception:  # a template raises what it likes at a form that it does not know
                    continue
                told = all(text.count(self._placeholders[kind]) == 1 for kind in kinds) or role != "user"
                self._takes_parts[role] = told and "probe" in text and "'type'" not in text
        return self._takes_parts

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        chats: list[list[dict[str, Any]]] = [[dict(message) for message in messages]]
        rendered: Any = render_jinja_template(  # annotated as a text, and a pair of lists
            chats,
            chat_template=self._template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **self._names,
        )
        texts, spans = rendered
        return texts[0], [(start, stop) for start, stop in spans[0]] if marks else []

    def _span_of(self, index: int, messages: Sequence[Mapping[str, Any]], text: str) -> tuple[int, int]:
        """Where turn `index` stands in `text`, by what it adds to the turns before it."""
        before, _ = self._rendered(messages[:index], prompt=True) if index else ("", [])
        after, _ = self._rendered(messages[: index + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise SampleError(
                "template",
                f"turn {index}: the chat template renders earlier turns otherwise once this one follows, so that it "
                "cannot be told which tokens the model says. Give a template with {% generation %} marks.",
            )
        return len(before), len(after)

    # Tokens -----------------------------------------------------------------------------------

    def _tokens(
        self, text: str, learned: bytearray, aside: _Aside, read: Sequence[tuple[Kind, int]], whole: bool = False
    ) -> ChatTokens:
        """Tokens of rendered text, with what was put aside in its places."""
        text, learned = self._placeholders_aside(text, learned, read)
        pieces, flags, order, start, muted = [], bytearray(), [], 0, False
        for match in _ASIDE.finditer(text):
            pieces.append(text[start : match.start()])
            flags += bytes(match.start() - start) if muted else learned[start : match.start()]
            start, letter = match.end(), match.group(1)
            if letter in "be":
                muted = letter == "b"
                continue
            order.append((letter, int(match.group(2))))
            pieces.append(_STAND_IN)
            flags += bytes(2) if muted else learned[match.start() : match.start() + 1] * 2
        pieces.append(text[start:])
        flags += learned[start:]
        return self._spliced("".join(pieces), flags, order, aside, whole)

    def _placeholders_aside(
        self, text: str, learned: bytearray, read: Sequence[tuple[Kind, int]]
    ) -> tuple[str, bytearray]:
        """The template's own placeholders put aside too, each the next medium of its kind in `read`."""
        if not self._placeholders:
            return text, learned
        kinds = {placeholder: kind for kind, placeholder in self._placeholders.items()}
        numbers = {kind: iter([number for one, number in read if one == kind]) for kind in self._placeholders}
        pieces, flags, start = [], bytearray(), 0
        for match in re.finditer("|".join(map(re.escape, sorted(kinds, key=len, reverse=True))), text):
            number = next(numbers[kinds[match.group()]], None)
            if number is None:
                raise SampleError("template", f"the chat template wrote more {match.group()} than there are media")
            piece = f"{_OPEN}m{number}{_CLOSE}"
            pieces += [text[start : match.start()], piece]
            flags += learned[start : match.start()] + learned[match.start() : match.start() + 1] * len(piece)
            start = match.end()
        return "".join([*pieces, text[start:]]), flags + learned[start:]

    def _spliced(
        self, text: str, flags: bytearray, order: Sequence[tuple[str, int]], aside: _Aside, whole: bool
    ) -> ChatTokens:
        encoded = self._encoder.encode(text, add_special_tokens=whole)
        ids: list[int] = []
        learn: list[bool] = []
        media: dict[int, int] = {}
        following = iter(order)
        for token, (start, stop) in zip(encoded.ids, encoded.offsets):
            told = any(flags[start:stop])
            if token != self._stand_in:
                ids.append(token)
                learn.append(told)
                continue
            letter, number = next(following)
            if letter == "m":
                media[len(ids)] = number
                ids.append(0)
                learn.append(told)
            else:
                typed = self._as_text(aside.typed[number])
                ids += typed
                learn += [told] * len(typed)
        return ChatTokens(ids, learn, media)

    def _as_text(self, typed: str) -> list[int]:
        """Ids of a control token's letters. Cut in two it is none any more."""
        if typed in (_OPEN, _CLOSE):
            return self._encoder.encode(typed, add_special_tokens=False).ids
        halves = [typed[:1], typed[1:]]
        ids = [id for half in halves for id in self._encoder.encode(half, add_special_tokens=False).ids]
        if self._control_ids.isdisjoint(ids):
            return ids
        return [id for letter in typed for id in self._encoder.encode(letter, add_special_tokens=False).ids]

    def _read_media(self, conversation: Conversation) -> list[tuple[Kind, int]]:
        """Kind and number of the media that the template itself writes placeholders for."""
        parted = self._roles_with_parts()
        return [
            (part.kind, number)
            for number, (turn, part) in enumerate(conversation.media())
            if parted.get(turn.role) and turn.role != "assistant" and part.kind in self._placeholders
        ]

    def _ended(self, tokens: ChatTokens) -> ChatTokens:
        end = self._tokenizer.eos_token_id
        if end is None or (tokens.ids and tokens.ids[-1] == end):
            return tokens
        return ChatTokens([*tokens.ids, end], [*tokens.learn, True], tokens.media)


def _is_learned(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.learn


def _learned_marks(spans: list[tuple[int, int]], said: Sequence[Turn]) -> list[tuple[int, int]]:
    """The template's marks without those of turns that are not learned.

    A template may mark several pieces of a turn; what is not learned is then left out by the brackets around it.
    """
    if len(spans) < len(said):
        raise SampleError(
            "template", f"the chat template marks {len(spans)} of {len(said)} answers; it leaves turns out"
        )
    return [span for span, turn in zip(spans, said) if turn.learn] if len(spans) == len(said) else spans


def _put_aside(typed: str, aside: _Aside) -> str:
    aside.typed.append(typed)
    return f"{_OPEN}t{len(aside.typed) - 1}{_CLOSE}"


def _pattern(control: Sequence[str]) -> re.Pattern[str]:
    """What may not stand in a user's text as it is; the longest of two that begin alike comes first."""
    longest_first = sorted(filter(None, set(control)), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), _OPEN, _CLOSE]))


def _with_stand_in(tokenizer: Any) -> tuple[Any, int]:
    """A copy of the tokenizer's machine with one token more, which takes the place of what is put aside."""
    from tokenizers import AddedToken, Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.add_special_tokens([AddedToken(_STAND_IN, special=True, normalized=False)])
    return encoder, cast(int, encoder.token_to_id(_STAND_IN))
