"""Prompts of a call -> requests, one a sample, with everything refused that can be told before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_mimo.check.batch import check_modalities, with_data
from megatron_mimo.generation.sampling import Sampling

if TYPE_CHECKING:
    from megatron_mimo.generation.spans import SpanRule

_KEYS = ("input_ids", "modality_inputs", "generation_inputs", "position_ids", "delta", "unconditional")


class Known(NamedTuple):
    """What the engine reads of a model's configuration.

    Attributes:
        vocabulary: text ids are below it; padding behind it is never drawn.
        length: positions that the model has.
        sections: k of its position ids, 1 for plain ones.
        learned: whether positions are learned, and so part of a text's rows.
        special, generation, begin, end: modality -> token id.
    """

    vocabulary: int
    length: int
    sections: int
    learned: bool
    special: Mapping[str, int]
    generation: Mapping[str, int]
    begin: Mapping[str, int]
    end: Mapping[str, int]

    @classmethod
    def of(cls, model: Any) -> Known:
        """Of a `MimoModel`."""
        config, language = model.mimo_config, model.language_model
        size = config.language_model.params.get("vocab_size") or language.vocab_size
        return cls(
            getattr(language, "vocabulary", size),
            language.max_sequence_length,
            3 if language.position_embedding_type == "mrope" else 1,
            language.position_embedding_type == "learned_absolute",
            config.special_token_ids,
            config.generation_token_ids,
            config.begin_token_ids,
            config.end_token_ids,
        )

    def sayable(self, writes: Mapping[str, SpanRule], size: int) -> Tensor:
        """Bool `[size]` on the host: text, and what opens a modality of `writes`."""
        allowed = torch.arange(size) < self.vocabulary
        own = {*self.special.values(), *self.generation.values(), *self.begin.values()}
        hidden = own - {rule.opening for rule in writes.values()}
        allowed[[token for token in hidden if 0 <= token < size]] = False
        return allowed


@dataclass
class Request:
    """One sample's part of a call.

    Attributes:
        ids: of the prompt.
        inputs, shown: its `modality_inputs` and `generation_inputs`, without what holds no data.
        positions: int64 `[k, S]`, or None to count.
        delta: how far the position of a new token is ahead of its place.
        limit: positions that may follow.
        sampling: how its text is drawn.
        stop_ids, stop_strings: what ends it.
        writes: modality -> how it is written; others are never begun.
        unconditional: the second prompt, which guidance contrasts with; None without one.
        opens: the modality that the prompt's last token begins, or None.
    """

    ids: list[int]
    limit: int
    sampling: Sampling
    inputs: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)
    positions: Tensor | None = None
    delta: int = 0
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    writes: Mapping[str, SpanRule] = field(default_factory=dict)
    unconditional: Request | None = None
    opens: str | None = None


def per_sample(name: str, value: Any, count: int, index: int) -> Any:
    """A sample's own of an option that is one for all or a list with one each.

    Raises:
        ValueError: a list of another length.
    """
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name}: expected one value or {count}, one for each prompt, found {len(value)}")
        return value[index]
    return value


def request_of(
    prompt: object, limit: object, sampling: Sampling, known: Known, writes: Mapping[str, SpanRule], **stops: Any
) -> Request:
    """The request that a prompt in the form of a dict makes.

    Args:
        prompt: `input_ids` (list or int tensor `[S]`), and optionally `modality_inputs`, `generation_inputs`,
            `position_ids` `[S]` or `[k, S]`, `delta` and `unconditional`, a prompt too.
        limit: positions that may follow.
        sampling: how its text is drawn.
        known: of the model.
        writes: modalities that may be written.
        stops: `stop_ids` and `stop_strings`.

    Raises:
        ValueError: something in it cannot be used; nothing has run.
    """
    if not isinstance(prompt, Mapping):
        raise ValueError(f"expected a prompt with 'input_ids', found {type(prompt).__name__}")
    unknown = sorted(set(prompt) - set(_KEYS), key=str)
    if unknown or "input_ids" not in prompt:
        raise ValueError(f"expected a prompt of {list(_KEYS)} with 'input_ids', found {sorted(prompt, key=str)}")
    ids = _ids(prompt["input_ids"])
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"max_new_tokens: expected an integer of at least 1, found {limit!r}")
    inputs, shown = _media(prompt, known)
    opens = _opens(ids, known)
    if opens is not None and known.begin.get(opens) is None:
        ids = ids[:-1]  # the label that opens a span is its first position
    request = Request(ids, limit, sampling, inputs, shown, writes=writes, opens=opens, **stops)
    _check_length(request, known)
    _check_tokens(request, known)
    request.positions, request.delta = _positions(prompt, len(ids), known, inputs)
    if opens is not None and opens not in writes:
        raise ValueError(
            f"{opens}: the prompt ends with the token that begins it, but it is not among the modalities that can be "
            f"written: {sorted(writes)}. Give its decoder a sample method, or name it in modalities."
        )
    second = prompt.get("unconditional")
    if second is not None:
        request.unconditional = request_of(second, limit, sampling, known, writes)
        if request.unconditional.opens != opens:
            raise ValueError("unconditional: expected a prompt that begins the same modality at its end")
    return request


def _ids(given: object) -> list[int]:
    if isinstance(given, Tensor):
        if given.dim() != 1 or given.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: expected integers [S], found {given.dtype} {list(given.shape)}")
        given = given.tolist()
    elif not isinstance(given, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
        raise ValueError(f"input_ids: expected a list or tensor of integers, found {type(given).__name__}")
    if not given:
        raise ValueError("input_ids: expected at least one token, found an empty prompt")
    return list(given)


def _media(prompt: Mapping, known: Known) -> tuple[dict[str, Any], dict[str, Any]]:
    given = {name: prompt.get(name) for name in ("modality_inputs", "generation_inputs")}
    for name, tokens in zip(given, (known.special, known.generation)):
        try:
            check_modalities(name, given[name], tokens)
        except TypeError as error:
            raise ValueError(str(error)) from error
    return with_data(given["modality_inputs"]), with_data(given["generation_inputs"])


def _opens(ids: Sequence[int], known: Known) -> str | None:
    for modality, token in known.generation.items():
        if ids[-1] == known.begin.get(modality, token):
            return modality
    return None


def _check_length(request: Request, known: Known) -> None:
    if len(request.ids) + request.limit > known.length:
        raise ValueError(
            f"expected at most {known.length} positions, which the model has, found a prompt of {len(request.ids)} and "
            f"max_new_tokens={request.limit}. Shorten one of them, or raise max_sequence_length."
        )
    if not request.ids:
        raise ValueError("input_ids: expected a token before the one that begins a span, found none")


def _check_tokens(request: Request, known: Known) -> None:
    """Media without tokens, tokens without media, and ids that are no tokens at all."""
    ids = set(request.ids)
    for modality, token in known.special.items():
        given, shown = modality in request.inputs, modality in request.shown
        if token in ids and not given and not (known.generation.get(modality) == token):
            raise ValueError(f"{modality}: expected modality_inputs for its tokens ({token}), found none")
        if given and token not in ids:
            raise ValueError(f"{modality}: expected its token ({token}) where modality_inputs go, found none")
        if given and shown and known.generation.get(modality) == token:
            raise ValueError(f"{modality}: expected modality_inputs or generation_inputs at its token, found both")
    for modality in request.shown:
        if known.generation[modality] not in ids:
            raise ValueError(f"{modality}: expected its generation token where generation_inputs go, found none")
    own = {*known.special.values(), *known.generation.values()}
    strange = sorted(i for i in ids - own if not 0 <= i < known.vocabulary)
    if strange:
        raise ValueError(f"input_ids: expected ids in [0, {known.vocabulary}), found {strange[:5]}")


def _positions(prompt: Mapping, length: int, known: Known, media: Mapping) -> tuple[Tensor | None, int]:
    given, delta = prompt.get("position_ids"), prompt.get("delta")
    if given is None:
        if known.sections > 1 and media:
            raise ValueError(
                f"position_ids: expected [{known.sections}, {length}] for a prompt with {sorted(media)}: mrope counts "
                "time, height and width apart within media, found none"
            )
        if delta:
            raise ValueError(f"delta: expected position_ids beside it, found delta={delta!r} alone")
        return None, 0
    if not isinstance(given, Tensor) or given.dim() not in (1, 2) or given.shape[-1] < length:
        raise ValueError(f"position_ids: expected int64 [S] or [k, S] with S={length}, found {given!r}")
    sections = given.reshape(-1, given.shape[-1])[:, :length].expand(known.sections, -1).long().cpu()
    following = int(sections.max()) + 1 - length
    return sections, following if delta is None or given.shape[-1] > length else int(delta)


class Batch(NamedTuple):
    """Prompts of unequal length side by side, padded behind.

    Attributes:
        ids: int64 `[B, S]`.
        positions: int64 `[k, B, S]`, or None where the model counts.
        inputs, shown: as `MimoModel.embed` takes them.
    """

    ids: Tensor
    positions: Tensor | None
    inputs: dict[str, Any]
    shown: dict[str, Any]


def batched(requests: Sequence[Request], known: Known, device: torch.device | str, multiple: int = 1) -> Batch | None:
    """The batch of these requests, its length a multiple; None where their media do not fit into one tensor each."""
    inputs, shown = joined([r.inputs for r in requests]), joined([r.shown for r in requests])
    if inputs is None or shown is None:
        return None
    length = -(-max(len(r.ids) for r in requests) // multiple) * multiple
    own = {*known.special.values(), *known.generation.values()}
    padding = next(token for token in range(len(own) + 1) if token not in own)
    ids = torch.tensor([r.ids + [padding] * (length - len(r.ids)) for r in requests]).to(device)
    positions = None
    if known.sections > 1 or any(r.positions is not None for r in requests):
        counted = torch.arange(length).expand(known.sections, length)
        places = [counted if r.positions is None else nn.functional.pad(r.positions, (0, length)) for r in requests]
        positions = torch.stack([place[:, :length] for place in places], dim=1).to(device)
        positions = positions[0] if known.sections == 1 else positions
    return Batch(ids, positions, _moved(inputs, device), _moved(shown, device))


def joined(parts: Sequence[Any]) -> Any:
    """Nested mappings of tensors and lists, one after the other along their first dim; None where they do not fit."""
    parts = [part for part in parts if part is not None and not (isinstance(part, Mapping) and not part)]
    if not parts:
        return {}
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(isinstance(part, Mapping) for part in parts):
        names = list(dict.fromkeys(name for part in parts for name in part))
        together = {name: joined([part[name] for part in parts if name in part]) for name in names}
        return None if any(value is None for value in together.values()) else together
    if all(isinstance(part, Tensor) for part in parts):
        fits = all(part.shape[1:] == first.shape[1:] and part.dtype == first.dtype for part in parts)
        return torch.cat(list(parts)) if fits and first.dim() else None
    if all(isinstance(part, (list, tuple)) for part in parts):
        return [item for part in parts for item in part]
    return first if all(part == first for part in parts) else None


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
