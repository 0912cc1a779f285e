"""Sampling with the language model in the loop by whole passes. Deprecated: `generate` does it with a cache.

Both loops run `MimoModel.forward` on the whole sequence each time, as in training, on any layout with one
pipeline stage. Every tensor- and context-parallel rank calls them with the same arguments and gets the
same samples.

Shapes: `N` generation tokens of the modality in the batch, in the order of `input_ids`; `D` width of a
target.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_mimo.decoders.arguments import check_sample_options, finite
from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.guidance import guided
from megatron_mimo.decoders.inputs import GenerationInput, NoisedTargetInput
from megatron_mimo.decoders.rectified_flow import RectifiedFlowDecoder, integrate


@torch.no_grad()
def sample_one_by_one(
    model: nn.Module,
    input_ids: Tensor,
    modality: str,
    decoder: str | None = None,
    *,
    options: Mapping[str, object] | None = None,
    unconditional_ids: Tensor | None = None,
    **inputs,
) -> Tensor:
    """Samples for every generation token, each drawn from a language model that saw those before it.

    Deprecated, goes with version 0.3: `generate` draws them with a cache, and begins spans by itself.

    For a generation input that shows each position's own sample, `CodeInput` or `TargetInput`. The model
    runs as often as a sample of the batch has generation tokens; samples go on side by side.

    Args:
        model: a `MimoModel` in eval mode, or Megatron's wrappers around one.
        input_ids: `[B, S]`, with generation tokens where samples are wanted.
        modality: which one.
        decoder: whose samples; may be left out where the modality has one.
        options: keyword options of the decoder's `sample`. A `generator` must be in the same state on
            every tensor- and context-parallel rank, as torch's default is after `initialize`.
        unconditional_ids: `[B, S]`, the prompt without its condition and the same generation tokens, to
            contrast with where `options` hold `guidance`; the model runs on it too, with the same samples
            and the same `inputs`. None takes the decoder's null condition.
        inputs: further arguments of `MimoModel.forward`, like `modality_inputs`.

    Returns:
        `[N, ...]` as the decoder's `sample` gives them: codes int64 `[N]` or `[N, K]`, targets `[N, D]`.
        `model.modality_submodules[modality].finish(samples)` makes images or waveforms of them.

    Raises:
        ValueError: a model in training mode or cut into pipeline stages, a generation input that shows
            no samples, a decoder that draws several rows together, or guidance of another form.
    """
    _warn("sample_one_by_one")
    writer = _Writer.of(model, input_ids, modality, decoder, inputs)
    chosen: dict[str, Any] = dict(options or {})
    check_sample_options(writer.decoder, chosen, "options")
    if "unconditional_rows" in chosen:
        raise ValueError(
            f"{modality}: unconditional_rows change with every sample that the language model sees; give "
            "unconditional_ids, whose rows are made at each step"
        )
    writer.check_unconditional(input_ids, unconditional_ids, chosen.get("guidance", 1))
    if writer.decoder.rows_per_item > 1:
        raise ValueError(
            f"{modality}: {type(writer.decoder).__name__} draws {writer.decoder.rows_per_item} rows "
            "together; one after the other needs a decoder with rows_per_item=1"
        )
    written = input_ids == writer.token
    shown = writer.feed.blank(int(written.sum()))
    ((keyword, samples),) = shown.items()
    turn = written.cumsum(dim=1)[written] - 1  # place of each token among those of its sample
    for step in range(int(written.sum(dim=1).max())):
        rows = writer.rows(input_ids, {keyword: samples}, inputs)
        if unconditional_ids is not None:
            contrast = writer.unconditional_rows(unconditional_ids, {keyword: samples}, inputs)
            chosen["unconditional_rows"] = contrast[turn == step]
        samples[turn == step] = writer.decoder.sample(rows[turn == step], **chosen).to(samples)
    return samples


@torch.no_grad()
def sample_flow(
    model: nn.Module,
    input_ids: Tensor,
    modality: str,
    decoder: str | None = None,
    *,
    steps: int = 25,
    solver: Literal["euler", "heun"] = "euler",
    shift: float = 1.0,
    guidance: float = 1.0,
    unconditional_ids: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **inputs,
) -> Tensor:
    """Samples of a flow that the language model takes part in: it sees the state at every solver step.

    Deprecated, goes with version 0.3: `generate` draws them with a cache, and begins spans by itself.

    For a decoder of rectified flow whose generation input is `NoisedTargetInput`. The model runs once a
    step, with `"heun"` twice.

    Args:
        model: a `MimoModel` in eval mode, or Megatron's wrappers around one.
        input_ids: `[B, S]`, with generation tokens where samples are wanted.
        modality: which one.
        decoder: whose samples; may be left out where the modality has one.
        steps, solver, shift: of the integration, see `megatron_mimo.decoders.rectified_flow.integrate`.
        guidance: scale of classifier-free guidance on the velocity, 1 is off.
        unconditional_ids: `[B, S]`, the prompt without its condition and the same generation tokens, to
            contrast with; the model runs on it too, with the same state and the same `inputs`. None takes
            the decoder's null condition.
        noise: `[N, D]` to start from; None draws it from `generator`, or torch's default.
        generator: on the ids' device, in the same state on every tensor- and context-parallel rank.
        inputs: further arguments of `MimoModel.forward`, like `modality_inputs`.

    Returns:
        Targets `[N, D]`, float32. `model.modality_submodules[modality].finish(samples)` makes images or
        waveforms of them.

    Raises:
        ValueError: a model in training mode or cut into pipeline stages, a decoder or generation input
            of another kind, spans that do not fit the decoder, or unconditional ids that do not fit.
    """
    _warn("sample_flow")
    writer = _Writer.of(model, input_ids, modality, decoder, inputs)
    finite("sample_flow", guidance=guidance)
    writer.check_unconditional(input_ids, unconditional_ids, guidance)
    network, feed = writer.decoder, writer.feed
    if not (isinstance(network, RectifiedFlowDecoder) and isinstance(feed, NoisedTargetInput)):
        raise ValueError(
            f"{modality}: a flow with the language model in it needs a decoder of rectified flow and "
            f"NoisedTargetInput, found {type(network).__name__} and {type(feed).__name__}"
        )
    count = int((input_ids == writer.token).sum())
    shape = (count, network.target_width)
    if noise is None:
        noise = torch.randn(shape, device=input_ids.device, generator=generator)
    if noise.shape != shape:
        raise ValueError(
            f"{modality}: noise must be {list(shape)}, a row for each generation token, got {list(noise.shape)}"
        )

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        shown = {"x": x, "time": time.expand(count // feed.rows_per_item)}
        rows, contrast = writer.rows(input_ids, shown, inputs), None
        conditional = network.velocity(rows, x, time)
        if guidance == 1:
            return conditional
        if unconditional_ids is not None:
            contrast = writer.unconditional_rows(unconditional_ids, shown, inputs)
        contrast = network.condition_dropout.unconditional(rows, contrast)
        return guided(conditional, network.velocity(contrast, x, time), guidance)

    return integrate(velocity, noise, steps=steps, solver=solver, shift=shift)


def _warn(name: str) -> None:
    warnings.warn(
        f"{name} runs the whole sequence at every step and goes with version 0.3: model.generate(prompts, rows, "
        "modalities={name: Writing(rows=rows, options=...)}) draws the same with a cache",
        DeprecationWarning,
        stacklevel=4,  # past the caller's decorator
    )


@dataclass(frozen=True)
class _Writer:
    """One modality of a model that writes, and one of its decoders."""

    model: nn.Module
    modality: str
    name: str
    decoder: Decoder
    feed: GenerationInput
    token: int

    @classmethod
    def of(cls, model: nn.Module, input_ids: Tensor, modality: str, decoder: str | None, inputs: Mapping) -> _Writer:
        mimo = unwrap_model(model)
        if not (mimo.pre_process and mimo.post_process):
            raise ValueError(
                "sampling with the language model in the loop needs the whole model on one pipeline stage: "
                "what the last stage draws would have to travel to the first. Load the checkpoint with "
                "pipeline_model_parallel_size=1."
            )
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before sampling")
        tokens = mimo.mimo_config.generation_token_ids
        if modality not in tokens:
            raise ValueError(f"modality {modality!r} is not one of those written: {sorted(tokens)}")
        submodule = mimo.modality_submodules[modality]
        if submodule.generation_input is None:
            raise ValueError(
                f"{modality} has no generation_input, so the language model sees no samples: one pass "
                "and model.decode(outputs) draw them"
            )
        name = submodule.decoder_name(decoder)
        placement = mimo.place(input_ids, inputs.get("packed_seq_params"))
        total = int(placement.generation_total(modality))
        placement.check_generation(modality, total, submodule.span_of(name), submodule.medium_of(name))
        return cls(model, modality, name, submodule.decoders[name], submodule.generation_input, tokens[modality])

    def check_unconditional(self, input_ids: Tensor, unconditional_ids: Tensor | None, guidance: float) -> None:
        """Refuses unconditional ids of no use, or whose generation tokens stand elsewhere than the prompt's."""
        if unconditional_ids is None:
            return
        if guidance == 1:
            raise ValueError(
                f"{self.modality}: unconditional_ids are contrasted with by guidance, which is off; give a "
                "guidance other than 1 or leave them out"
            )
        written, contrasted = input_ids == self.token, unconditional_ids == self.token
        if written.shape != contrasted.shape or not torch.equal(written, contrasted):
            raise ValueError(
                f"{self.modality}: unconditional_ids {list(unconditional_ids.shape)} must have its generation tokens "
                f"where input_ids {list(input_ids.shape)} has them. Replace tokens of the condition one by one, by "
                "padding for example."
            )

    def unconditional_rows(self, ids: Tensor, shown: Mapping[str, Tensor], inputs: Mapping) -> Tensor:
        """`rows` for the prompt without its condition, of which a placement of the prompt knows nothing."""
        return self.rows(ids, shown, {key: value for key, value in inputs.items() if key != "placement"})

    def rows(self, input_ids: Tensor, shown: Mapping[str, Tensor], inputs: Mapping) -> Tensor:
        """The decoder's rows `[N, W]` when the language model sees `shown` at its generation tokens."""
        others = inputs.get("generation_inputs") or {}
        given = {**inputs, "generation_inputs": {**others, self.modality: shown}}
        outputs, _ = self.model(input_ids, **given)
        submodule = unwrap_model(self.model).modality_submodules[self.modality]
        return submodule.rows_for(self.name, outputs.modalities[self.modality].hidden)
