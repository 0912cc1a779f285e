"""One name for a parameter, however its model is built.

Megatron names one and the same parameter in three ways: layers of plain torch have norms of their own,
TransformerEngine's linear layers have the norm before them inside, and `HybridModel` makes two layers of each of
`GPTModel`'s. Tables are written in the first spelling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

_FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.local_experts\.)(\d+)(\..+)")
# TransformerEngine has the experts of a rank in one layer, whose parameters are numbered.
_IN_ONE_LAYER = re.compile(r"(mlp\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d+)")


def parameters_by_name(
    module: nn.Module, *, first_expert: int = 0, layer_kinds: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of `module` that this rank holds, by the names that tables use.

    Args:
        module: a language model, an encoder, or any other part, whose names are then taken as they are.
        first_expert: number of this rank's first expert.
        layer_kinds: of `HybridModel`, the kind of each layer of the whole model: ``*`` attention, ``-`` MLP, ``E``
            experts.

    Example:
        >>> sorted(parameters_by_name(nn.Linear(2, 3)))
        ['bias', 'weight']
    """
    numbers = _layer_numbers(module, layer_kinds)
    return {name_of(name, numbers, first_expert): parameter for name, parameter in module.named_parameters()}


def name_of(name: str, layer_numbers: Mapping[int, int], first_expert: int = 0) -> str:
    """The table's name of a parameter.

    Args:
        name: as its model has it.
        layer_numbers: this rank's index of a layer -> the number of the layer that a table means.
        first_expert: number of this rank's first expert.

    Example:
        >>> name_of("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", {0: 7})
        'decoder.layers.7.input_layernorm.weight'
        >>> name_of("decoder.final_norm.weight", {})
        'decoder.final_layernorm.weight'
    """
    if name.startswith("decoder.final_norm."):
        return name.replace("final_norm", "final_layernorm", 1)
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    rest = layer[2]
    for fused, alone in _FUSED.items():
        if rest.startswith(fused):
            rest = alone + rest.removeprefix(fused)
    rest = _IN_ONE_LAYER.sub(r"\1local_experts.\3.\2", rest)
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        rest = f"{expert[1]}{first_expert + int(expert[2])}{expert[3]}"
    return f"decoder.layers.{layer_numbers[int(layer[1])]}.{rest}"


def _layer_numbers(module: nn.Module, kinds: Sequence[str] | None) -> dict[int, int]:
    """This rank's index of each layer -> its number in the whole model, from 0."""
    children = dict(module.named_modules())
    stack = children.get("decoder.layers")
    if not isinstance(stack, nn.ModuleList):
        return {}
    layers: list[Any] = list(stack)
    numbers = {index: int(layer.layer_number) - 1 for index, layer in enumerate(layers)}
    if kinds is None:
        return numbers
    # The n-th attention and the n-th MLP are what GPTModel has in its n-th layer.
    attention = [kind == "*" for kind in kinds]
    return {index: attention[:number].count(attention[number]) for index, number in numbers.items()}


def respelled[Item](tensors: Mapping[str, Item], spellings: Sequence[tuple[str, str]]) -> dict[str, Item]:
    """`tensors` under one of several spellings of their names.

    Args:
        tensors: by any of them.
        spellings: pattern of a name's beginning -> what stands in its place, each tried in turn.

    Raises:
        ValueError: two of them get one name.

    Example:
        >>> respelled({"model.visual.norm": 0}, [(r"model\\.visual\\.", "visual.")])
        {'visual.norm': 0}
    """

    def spelled(name: str) -> str:
        for pattern, spelling in spellings:
            name = re.sub(rf"^{pattern}", spelling, name)
        return name

    return renamed(tensors, spelled)


def renamed[Item](tensors: Mapping[str, Item], rename: Callable[[str], str]) -> dict[str, Item]:
    """`tensors` under other names.

    Raises:
        ValueError: two of them get one name, of which one would be lost.

    Example:
        >>> renamed({"a.x": 1, "b": 2}, lambda name: name.removeprefix("a."))
        {'x': 1, 'b': 2}
    """
    before: dict[str, str] = {}
    for name in tensors:
        other = before.setdefault(rename(name), name)
        if other != name:
            raise ValueError(f"expected each tensor once, found {other} and {name}, two spellings of {rename(name)}.")
    return {new: tensors[old] for new, old in before.items()}
