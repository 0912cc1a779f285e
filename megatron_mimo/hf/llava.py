"""LLaVA 1.5: CLIP's or SigLIP's tower, two linear layers, and a language model of the library's families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_mimo.hf.family import ACTIVATIONS, INERT
from megatron_mimo.hf.table import Table, table, whole

MODEL_TYPE, ARCHITECTURE = "llava", "LlavaForConditionalGeneration"
#: Where its three parts are in a file that transformers 5 writes.
LANGUAGE, TOWER, PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."

# Of its own; those of its parts are their families' to read.
_FIELDS = {
    "vision_config", "text_config", "image_token_index", "image_seq_length", "projector_hidden_act",
    "vision_feature_select_strategy", "vision_feature_layer", "multimodal_projector_bias", "tie_word_embeddings",
}  # fmt: skip

#: Spellings of names -> the one above. In memory transformers 5 has `model.` in front; files of 2024 have
#: `vision_model` within the tower.
SPELLINGS = (
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"vision_tower\.vision_model\.", "vision_tower."),
)


class Projector(nn.Module):
    """LLaVA's two linear layers, `[..., inputs]` -> `[..., outputs]`.

    Args:
        inputs: width of the tower's states.
        outputs: width of the language model.
        activation: between the two, as transformers names it.
        bias: whether both have one.
    """

    def __init__(self, inputs: int, outputs: int, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs, bias=bias)
        self.linear_2 = nn.Linear(outputs, outputs, bias=bias)
        self._activate = ACTIVATIONS[activation]

    def forward(self, rows: Tensor) -> Tensor:
        """Projected rows."""
        return self.linear_2(self._activate(self.linear_1(rows)))


@dataclass(frozen=True)
class Projection:
    """What a `Projector` is made with."""

    inputs: int
    outputs: int
    activation: str = "gelu"
    bias: bool = True

    def spec(self) -> ModuleSpec:
        """Of the `Projector`."""
        return ModuleSpec(module=Projector, params=dict(vars(self)))

    def table(self) -> Table:
        """The tensors of the `Projector`, without their prefix."""
        rules = []
        for layer, inputs in (("linear_1", self.inputs), ("linear_2", self.outputs)):
            rules.append(whole(f"{layer}.weight", f"{layer}.weight", (self.outputs, inputs)))
            if self.bias:
                rules.append(whole(f"{layer}.bias", f"{layer}.bias", (self.outputs,)))
        return table(rules, 0)


def problems(config: Any) -> list[str]:
    """One line for each field of LLaVA's own that is not mapped."""
    told = []
    if not isinstance(config.vision_feature_layer, int):
        told.append(f"llava: vision_feature_layer = {config.vision_feature_layer!r}: expected one layer")
    if config.vision_feature_select_strategy not in ("default", "full"):
        told.append(f"llava: vision_feature_select_strategy = {config.vision_feature_select_strategy!r}: not mapped")
    if config.projector_hidden_act not in ACTIVATIONS:
        told.append(
            f"llava: projector_hidden_act = {config.projector_hidden_act!r}: expected one of {sorted(ACTIVATIONS)}"
        )
    defaults = type(config)()
    known: Sequence[str] = sorted(_FIELDS | INERT)
    for name, value in config.to_dict().items():
        if name not in known and name in vars(defaults) and value != getattr(defaults, name):
            told.append(f"llava: {name} = {value!r}: not mapped")
    return told
