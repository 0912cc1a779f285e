"""From what encoders are given to rows: their keywords, their outputs, and how those of several follow each other.

Shapes: `n` items (images, clips), `s` rows of an item, `h` width of an encoder, `N` rows of the modality.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class EncodedRows:
    """Rows of one modality, and how many each image or clip gave.

    Attributes:
        rows: `[N, H]`, rank-local to the data-parallel rank.
        rows_per_item: in the items' order; None where that is unknown. An error then cannot name the sample.
    """

    rows: Tensor
    rows_per_item: list[int] | None = None


class Asked(Mapping[str, Mapping[str, Tensor]]):
    """Inputs on their way through `encode`, which tells what it knows of its rows beside them.

    Args:
        inputs: encoder name -> its keyword inputs.
        where: what an error calls them.

    Attributes:
        told: what the default `encode` made of these inputs; None while it made nothing.
    """

    def __init__(self, inputs: Inputs, where: str) -> None:
        self.inputs, self.where = inputs, where
        self.told: EncodedRows | None = None

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def about(self, rows: Tensor) -> EncodedRows:
        """The rows with what was told of these very rows: whoever made others of them knows better."""
        told = self.told
        return told if told is not None and told.rows is rows else EncodedRows(rows)


class EncoderKeywords:
    """Which keywords each encoder takes, and what users may call them.

    Args:
        encoders: of the modality.
        aliases: what users call an input -> what an encoder may call it instead.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], aliases: Mapping[str, str]) -> None:
        self._kinds = {name: type(encoder).__name__ for name, encoder in encoders.items()}
        self._accepted = {name: _keyword_names(encoder) for name, encoder in encoders.items()}
        self._aliases = aliases

    def of(self, encoder: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs under the encoder's own keywords."""
        accepted = self._accepted[encoder]
        if accepted is None:
            return dict(given)
        return {key if key in accepted else self._aliases.get(key, key): value for key, value in given.items()}

    def check(self, asked: Asked) -> None:
        """Refuses inputs that no encoder takes.

        Raises:
            TypeError: inputs that are not mappings, or a keyword that the encoder lacks.
            ValueError: an unknown encoder.
        """
        check_nested(asked.where, asked.inputs, "encoder name -> its inputs")
        for name, given in asked.items():
            if name not in self._kinds:
                raise ValueError(
                    f"{asked.where} has inputs for encoder {name!r}, but the modality's encoders are "
                    f"{sorted(self._kinds)}"
                )
            where, accepted = f"{asked.where}[{name!r}]", self._accepted[name]
            check_nested(where, given, "keyword -> value")
            for keyword in self.of(name, given) if accepted is not None else ():
                if keyword not in accepted:
                    raise TypeError(f"{where} has keyword {keyword!r}; {self._kinds[name]} takes {sorted(accepted)}")


def run_encoder(name: str, encoder: nn.Module, keywords: Mapping[str, Tensor]) -> Tensor:
    """An encoder's rows, `[n, s, h]` or `[n, h]`; floating-point inputs are cast to what it computes in.

    Megatron's mixed-precision wrapper casts a model's weights and its positional inputs only.

    Raises:
        TypeError, ValueError: an output without such rows.
    """
    weights = (p.dtype for p in encoder.parameters() if p.is_floating_point())
    dtype = next(weights, None)
    cast = {
        key: value.to(dtype) if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in keywords.items()
    }
    output = encoder(**cast)
    rows = output
    if isinstance(rows, Mapping):
        rows = tuple(rows.values())
    if isinstance(rows, tuple):
        rows = rows[0] if rows else None
    if not isinstance(rows, Tensor):
        raise TypeError(
            f"encoder {name!r} returned {type(output).__name__}; expected a tensor, or a tuple "
            "or mapping whose first element is one"
        )
    if rows.dim() not in (2, 3):
        raise ValueError(f"encoder {name!r} returned shape {list(rows.shape)}; expected [B, s, h] or [n, h]")
    return rows


def projected(output: Tensor | tuple[Tensor, nn.Parameter | None]) -> Tensor:
    """Output of a projection; Megatron's linear layers may leave adding their bias to the caller."""
    if not isinstance(output, tuple):
        return output
    rows, bias = output
    return rows if bias is None else rows + bias


def combined(outputs: Mapping[str, Tensor], combine: Literal["concatenate", "interleave"] | None) -> Tensor:
    """One `[N, h]` or `[n, s, h]` from the outputs of several encoders, in their order.

    Raises:
        ValueError: outputs that cannot follow each other so, or that look like the same images and nothing says how
            they follow each other.
    """
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    if combine is None:
        _check_not_the_same_items({name: rows.shape for name, rows in outputs.items()})
    _check_equal("width", {name: rows.shape[-1] for name, rows in outputs.items()})
    if combine != "interleave":
        return torch.cat([rows.flatten(0, -2) for rows in outputs.values()])
    for name, rows in outputs.items():
        if rows.dim() != 3:
            raise ValueError(
                f"encoder {name!r} returned {list(rows.shape)}; combine='interleave' needs [n, s, h] from every encoder"
            )
    _check_equal("item count", {name: rows.shape[0] for name, rows in outputs.items()})
    return torch.cat(list(outputs.values()), dim=1)


def rows_per_item(
    outputs: Mapping[str, Tensor], combine: Literal["concatenate", "interleave"] | None
) -> list[int] | None:
    """Rows that each item gave, in the order of `combined`; None where an output is flat."""
    if any(rows.dim() != 3 for rows in outputs.values()):
        return None
    shapes = [rows.shape for rows in outputs.values()]
    if combine == "interleave":
        return [sum(shape[1] for shape in shapes)] * shapes[0][0]
    return [length for count, length, _ in shapes for _ in range(count)]


def check_nested(where: str, value: object, form: str) -> None:
    """Refuses what should map names and does not.

    Raises:
        TypeError: naming `where`, the form and the type found.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must map {form}, got {type(value).__name__}")


def _check_equal(what: str, found: Mapping[str, int]) -> None:
    if len(set(found.values())) > 1:
        raise ValueError(
            f"encoders of one modality differ in {what}: {dict(found)}. One input projection for "
            "all needs equal widths; give one per encoder otherwise."
        )


def _check_not_the_same_items(shapes: Mapping[str, torch.Size]) -> None:
    counts = {shape[0] for shape in shapes.values()}
    if len(counts) == 1 and max(counts) > 1 and all(len(shape) == 3 for shape in shapes.values()):
        raise ValueError(
            f"encoders {sorted(shapes)} each returned {counts.pop()} items. Say how their rows follow each "
            "other: combine='interleave' (item by item, the same images through each) or "
            "combine='concatenate' (all items of the first, then all of the second)."
        )


def _keyword_names(module: nn.Module) -> frozenset[str] | None:
    """Keywords that a module's forward takes, None for any."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)
