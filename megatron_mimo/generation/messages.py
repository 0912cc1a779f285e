"""Messages -> prompts in the form of a dict, by the data module's processor or one of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mimo.data.messages import Conversation, SampleError, conversation_of
from megatron_mimo.data.packs import joined
from megatron_mimo.data.positions import SEQUENTIAL
from megatron_mimo.data.readers import TEXT_OUTPUTS
from megatron_mimo.data.samples import SampleProcessor
from megatron_mimo.generation.placing import check_positions
from megatron_mimo.generation.prompts import Known
from megatron_mimo.generation.spans import SpanRule


def prompt_of(prompt: object, processor: Any, model: Any) -> object:
    """A prompt with `input_ids`: messages are laid out, anything else comes back as it is.

    Args:
        prompt: a dict, or messages, a list of turns or a dict with `messages`.
        processor: `data.SampleProcessor`, or a processor or tokenizer of transformers with a chat template.
        model: a `MimoModel`, whose only reading modality takes what a processor of transformers makes.

    Raises:
        ValueError: messages that cannot be laid out, or no processor for them.
    """
    messages = prompt.get("messages") if isinstance(prompt, Mapping) else prompt
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return prompt
    if processor is None:
        raise ValueError("messages: expected a processor beside them, found none; give processor=...")
    beside = {} if not isinstance(prompt, Mapping) else {k: v for k, v in prompt.items() if k != "messages"}
    if isinstance(processor, SampleProcessor):
        try:
            return laid_out(conversation_of({"messages": messages}), processor) | beside
        except SampleError as error:
            raise ValueError(str(error)) from error
    return _of_transformers(messages, processor, model) | beside


def laid_out(conversation: Conversation, processor: SampleProcessor, media_root: Path | None = None) -> dict[str, Any]:
    """A conversation that ends with a user's turn as a prompt in the form of a dict.

    Args:
        conversation: turns of parts.
        processor: as in training.
        media_root: below which its media lie; None takes no paths.

    Raises:
        SampleError: it cannot be laid out.
    """
    sample = processor(conversation, media_root, prompt=True)
    read = [item for item in sample.items if not item.written]
    # Nothing is learned of a prompt, which would leave them out as padding is.
    written = joined(replace(item, learn=True) for item in sample.items if item.written)
    prompt: dict[str, Any] = {"input_ids": sample.input_ids, "modality_inputs": joined(read)}
    # What was written in earlier turns is shown as it was then.
    prompt["generation_inputs"] = {name: next(iter(of.values())) for name, of in written.items()}
    if len(sample.position_ids) > 1 or sample.delta:
        prompt |= {"position_ids": sample.position_ids, "delta": sample.delta}
    return prompt


def placed_as_trained(rules: Mapping[str, SpanRule], processor: Any, known: Known) -> dict[str, SpanRule]:
    """The rules, each with the positions that its processor gives such spans in training, where it names none.

    Raises:
        ValueError: positions that its spans cannot have.
    """
    found = dict(rules)
    handlings = processor.handling.values() if isinstance(processor, SampleProcessor) and known.sections > 1 else ()
    for handling in handlings:
        rule = found.get(handling.modality)
        if rule is None or handling.writer is None or rule.writing.positions is not None:
            continue
        if handling.rule != SEQUENTIAL:
            placed = replace(rule.writing, positions=handling.rule, grid=getattr(handling.writer, "grid", None))
            found[handling.modality] = replace(rule, writing=placed)
    for name, rule in found.items():
        try:
            check_positions(rule, known.sections)
        except ValueError as error:
            raise ValueError(f"modalities[{name!r}]: {error}") from error
    return found


def _of_transformers(messages: Sequence[object], processor: Any, model: Any) -> dict[str, Any]:
    made = processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = {name: value for name, value in made.items() if name not in TEXT_OUTPUTS and isinstance(value, Tensor)}
    prompt: dict[str, Any] = {"input_ids": made["input_ids"][0]}
    if not inputs:
        return prompt
    special = model.mimo_config.special_token_ids
    specs = {name: model.mimo_config.submodule_specs(name).get("encoders") or {} for name in special}
    if len(specs) != 1 or len(next(iter(specs.values()))) != 1:
        raise ValueError(
            f"messages: a processor of transformers gave {sorted(inputs)}, and the model has encoders "
            f"{ {name: sorted(of) for name, of in specs.items()} }: expected one. Give a data.SampleProcessor."
        )
    ((modality, encoders),) = specs.items()
    prompt["modality_inputs"] = {modality: {next(iter(encoders)): inputs}}
    return prompt
