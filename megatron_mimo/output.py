"""What `MimoModel.forward` returns when the model also writes modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megatron_mimo.losses import LossTerm, language_term


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
    """

    language: Tensor
    modalities: Mapping[str, ModalityOutput]


def loss_terms(outputs: Tensor | MimoOutput, loss_mask: Tensor | None = None) -> dict[str, LossTerm]:
    """Every term of one microbatch by name: `text`, and `modality/decoder` for each decoder.

    Args:
        outputs: from `MimoModel.forward` on the last pipeline stage, called with labels.
        loss_mask: the mask that came back beside it.
    """
    if isinstance(outputs, Tensor):
        return {"text": language_term(outputs, loss_mask)}
    terms = {"text": language_term(outputs.language, loss_mask)}
    for modality, output in outputs.modalities.items():
        terms.update({f"{modality}/{name}": term for name, term in output.losses.items()})
    return terms
