"""Prompts in, answers out: one prefill, then cached steps, each sample in a state of its own.

Every tensor- and pipeline-parallel rank runs the same loop on the same numbers; only the last stage has hidden states,
and what it draws is agreed on before anybody uses it. Tokens are read one step late, so that the host waits for the
device at most once a token and never before the next step is on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from megatron_mimo.cached_attention import bucketed
from megatron_mimo.generation.events import Event, Finished
from megatron_mimo.generation.loop import Loop
from megatron_mimo.generation.messages import placed_as_trained, prompt_of
from megatron_mimo.generation.prompts import Request, per_sample, request_of
from megatron_mimo.generation.rescore import rescored
from megatron_mimo.generation.results import GenerationOutput
from megatron_mimo.generation.sampling import Sampling
from megatron_mimo.generation.session import Session
from megatron_mimo.generation.spans import span_rules

#: Tokens from which on recording a graph takes less time than it saves: a capture is three steps.
WORTH_RECORDING = 16
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def generate(
    model: Any,
    prompts: Sequence[Any],
    max_new_tokens: int | Sequence[int] = 128,
    *,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    processor: Any = None,
    modalities: Any = None,
    on_error: Literal["raise", "return"] = "raise",
    rescore: bool = False,
    stream: bool = False,
    memory: int | None = None,
    session: Session | None = None,
) -> list[GenerationOutput] | Iterator[Event]:
    """What the model answers to each prompt.

    Ranks of one tensor- and pipeline-parallel group call it together with the same arguments and get the same answers;
    data-parallel ranks call it with prompts of their own, or not at all. The model may be in training mode and on its
    training layout: whatever the call changes is put back, also after an exception.

    Args:
        model: a `MimoModel`, this rank's part, not wrapped.
        prompts: each a dict of `input_ids` (a list or int64 `[S]`), `modality_inputs` and `generation_inputs` (of this
            sample alone, as `MimoModel.forward` takes them), `position_ids` (`[S]` or `[k, S]`) with `delta` for models
            with mrope, and `unconditional`, a second prompt that guidance contrasts with; or a list of messages, for
            which `processor` is needed.
        max_new_tokens: positions that a sample may add: text, written spans and what is read again. One for all, or
            one each; so are the next six.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. 0 is greedy.
        seed: of the draws. One number gives sample `i` the seed `seed + i`; a list gives each its own, with which it
            draws the same in any batch and on any layout.
        stop_ids: tokens that end an answer; they are part of it.
        stop_strings: texts that end an answer. They need a tokenizer.
        tokenizer: anything with `decode(ids)`, for texts; None takes the processor's.
        processor: makes prompts of messages: `data.SampleProcessor`, or a processor of transformers.
        modalities: which may be written: None for all that can be sampled, names, or name -> `Writing`.
        on_error: "raise" refuses the whole call for one bad prompt; "return" gives that sample its error.
        rescore: also ask one training forward over each whole sequence for the log-probabilities of its text.
        stream: give an iterator of `Token`, `Medium` and `Finished`; the model is in use until it ends or is closed.
        memory: bytes that the cache may take on this rank; None for what is free, or for the session's own limit.
        session: whose cache, compiled layers and graphs serve this call; None for one of its own. Rescoring ends what
            it holds.

    Raises:
        ValueError: before any work: a prompt that cannot be used, naming the sample; a layout or model that the engine
            does not serve; a cache that does not fit.
    """
    if on_error not in ("raise", "return"):
        raise ValueError(f"on_error: expected 'raise' or 'return', found {on_error!r}")
    if isinstance(prompts, (str, dict)) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(
            f"prompts: expected a list of at least one prompt, found {type(prompts).__name__} {prompts!r:.80}"
        )
    ends = session is None
    if session is None:
        session = Session(model, memory=memory, graphs=None if _worth(max_new_tokens) else False)
    elif memory is not None:
        raise ValueError("memory: expected None beside a session, which has its own; give Session(memory=...)")
    if session.model is not model:
        raise ValueError("session: expected one of this model, found another's")
    known = session.known
    tokenizer = tokenizer or getattr(processor, "chat", None) or getattr(processor, "tokenizer", None)
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings: expected a tokenizer beside them, found none; give tokenizer=...")
    rules = placed_as_trained(span_rules(model, modalities, known), processor, known)
    given = dict(zip(_SAMPLING, (temperature, top_k, top_p, min_p, repetition_penalty, seed)))
    requests: dict[int, Request] = {}
    errors: dict[int, ValueError] = {}
    for index, prompt in enumerate(prompts):
        try:
            own = {name: per_sample(name, value, len(prompts), index) for name, value in given.items()}
            if isinstance(seed, int):
                own["seed"] = seed + index
            limit = per_sample("max_new_tokens", max_new_tokens, len(prompts), index)
            stops = dict(stop_ids=frozenset(stop_ids), stop_strings=tuple(stop_strings))
            made = prompt_of(prompt, processor, model)
            requests[index] = request_of(made, limit, Sampling(**own), known, rules, **stops)
        except ValueError as error:
            errors[index] = ValueError(f"sample {index}: {error}")
            if on_error == "raise":
                raise errors[index] from error
    events = _served(session, requests, errors, tokenizer, on_error == "return", rescore, ends)
    if stream:
        return events
    outputs = [GenerationOutput() for _ in prompts]
    for event in events:
        if isinstance(event, Finished):
            outputs[event.sample] = event.output
    return outputs


def _worth(limit: int | Sequence[int]) -> bool:
    longest = limit if isinstance(limit, int) else max((one for one in limit if isinstance(one, int)), default=0)
    return longest >= WORTH_RECORDING


@torch.no_grad()
def _served(
    session: Session,
    requests: dict[int, Request],
    errors: dict[int, ValueError],
    tokenizer: Any,
    returns: bool,
    rescore: bool,
    ends: bool,
) -> Iterator[Event]:
    """Events of one call whose prompts are known to be good. (The decorator lets go of the mode at each of them.)"""
    for index in sorted(errors):
        yield Finished(index, GenerationOutput(reason="error", error=errors[index]))
    if not requests:
        return
    seconds = [request for request in (r.unconditional for r in requests.values()) if request is not None]
    # One slot more, which idle rows write to.
    slots = bucketed(max(len(r.ids) + r.limit for r in (*requests.values(), *seconds)) + 1)
    done: list[Finished] = []
    try:
        state, slots = session.prepare(len(requests) + len(seconds), slots)
        stage, known = session.stage, session.known
        loop = Loop(session.model, stage, known, requests, state, slots, tokenizer, returns, session.recorder)
        for event in loop.events():
            if isinstance(event, Finished) and rescore:
                done.append(event)
            else:
                yield event
        if rescore:
            session.close()
            yield from rescored(session.model, stage, known, done, loop.samples)
    finally:
        if ends:
            session.close()
