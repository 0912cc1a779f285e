"""What `MimoModel.forward` returns when the model also writes modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megatron_mimo.losses import LossTerm, language_term
from megatron_mimo.placement import Placement


@dataclass(frozen=True)
class ModalityOutput:
    """One modality's part of an output.

    Args:
        hidden: `[N, H]` hidden states that the modality's decoders read, in the order of its
            generation tokens in `input_ids`, equal on tensor- and context-parallel ranks. None in
            training without targets where only the device knows how many tokens there are.
        losses: decoder name -> its loss term, for every decoder; zero over zero without targets.
            Put all of them in the loss: the zeros give idle decoders their gradient.
    """

    hidden: Tensor | None
    losses: Mapping[str, LossTerm] = field(default_factory=dict)


@dataclass(frozen=True)
class MimoOutput:
    """Output of a model with generation tokens.

    Args:
        language: what the language model returned: per-token loss `[B, S / cp]` with labels,
            logits `[B, S / cp, V or V / tp]` without.
        modalities: modality name -> `ModalityOutput`.
        placement: which positions the hidden states are from, so that `MimoModel.decode` refuses an image
            or clip of two samples; None where that is unknown.
    """

    language: Tensor
    modalities: Mapping[str, ModalityOutput]
    placement: Placement | None = None


def loss_terms(outputs: Tensor | MimoOutput, loss_mask: Tensor | None = None) -> dict[str, LossTerm]:
    """Every term of one microbatch by name: `text`, and `modality/decoder` for each decoder.

    Args:
        outputs: from `MimoModel.forward` on the last pipeline stage. Without labels the language
            output is logits, and there is no `text` term.
        loss_mask: the mask that came back beside it.

    Raises:
        ValueError: there is no term at all: logits of a model that decodes nothing.
    """
    output = MimoOutput(outputs, {}) if isinstance(outputs, Tensor) else outputs
    terms = {}
    if output.language.dim() == 2:  # [B, S / cp] losses; logits have a vocabulary dim too
        terms["text"] = language_term(output.language, loss_mask)
    for modality, decoded in output.modalities.items():
        terms.update({f"{modality}/{name}": term for name, term in decoded.losses.items()})
    if not terms:
        raise ValueError(
            f"no loss in an output of shape {list(output.language.shape)}: these are logits. Call the "
            "model with labels."
        )
    return terms
