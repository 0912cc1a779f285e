"""From what encoders are given to rows: their keywords, their outputs, and how those of several follow each other.

Shapes: `n` items (images, clips), `s` rows of an item, `h` width of an encoder, `N` rows of the modality.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_mimo.modality.seam import in_dtype_of
from megatron_mimo.modality.zeros import with_zeros

Inputs = Mapping[str, Mapping[str, Tensor]]
Combine = Literal["concatenate", "interleave"]

#: Beside an encoder's inputs: how many rows each of its items gives, for an encoder that does not say so itself.
ROWS_PER_ITEM = "rows_per_item"


@dataclass(frozen=True)
class EncodedRows:
    """Rows of one modality or encoder, and how many each image or clip gave.

    An encoder whose output is flat (`[N, h]`: ragged audio, images at their own resolution) returns it, so that rows
    are compared with special tokens sample by sample. Without counts only the totals of the batch are compared: a
    sample with a row too many beside one with a row too few then passes, and the second reads a row of the first.

    Attributes:
        rows: `[N, H]`, rank-local to the data-parallel rank; an encoder may give `[n, s, h]` too.
        rows_per_item: ints on the host, in the items' order, which add up to N; None where that is unknown.
        reaches_all: whether their backward pass gives every trainable parameter that reads a gradient, zeros at
            least. Where this is not said the model adds zeros.

    Example:
        >>> EncodedRows(torch.zeros(8, 4), rows_per_item=[3, 5]).rows_per_item
        [3, 5]
    """

    rows: Tensor
    rows_per_item: list[int] | None = None
    reaches_all: bool = False


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

    def about(self, rows: Tensor | EncodedRows) -> EncodedRows:
        """The rows with what was told of these very rows: whoever made others of them knows better."""
        if isinstance(rows, EncodedRows):
            return rows
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
        self._required = {name: _required_names(encoder) for name, encoder in encoders.items()}
        self._aliases = aliases

    def of(self, encoder: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs under the encoder's own keywords, without those that are not for it."""
        return {self._own(encoder, key): value for key, value in given.items() if not self._is_count(encoder, key)}

    def tells_rows(self, encoder: str) -> bool:
        """Whether `rows_per_item` beside the inputs tells the rows of each item, and is no input of the encoder."""
        return self._is_count(encoder, ROWS_PER_ITEM)

    def check(self, asked: Asked) -> None:
        """Refuses inputs that no encoder takes.

        Raises:
            TypeError: inputs that are not mappings, a keyword that the encoder lacks, or one that it needs.
            ValueError: no encoder at all, an unknown one, or one input under two names.
        """
        check_nested(asked.where, asked.inputs, "encoder name -> its inputs")
        if not asked:
            raise ValueError(
                f"{asked.where} is empty: expected inputs of at least one of the modality's encoders "
                f"{sorted(self._kinds)}. Leave the modality out of modality_inputs where a batch has none of it."
            )
        for name, given in asked.items():
            if name not in self._kinds:
                raise ValueError(
                    f"{asked.where} has inputs for encoder {name!r}, but the modality's encoders are "
                    f"{sorted(self._kinds)}"
                )
            where = f"{asked.where}[{name!r}]"
            check_nested(where, given, "keyword -> value")
            self._check_keywords(where, name, list(given))

    def _own(self, encoder: str, key: str) -> str:
        accepted = self._accepted[encoder]
        return key if accepted is None or key in accepted else self._aliases.get(key, key)

    def _is_count(self, encoder: str, key: str) -> bool:
        """Whether a key tells the rows and is no input of this encoder."""
        return key == ROWS_PER_ITEM and key not in (self._accepted[encoder] or ())

    def _check_keywords(self, where: str, name: str, given: list[str]) -> None:
        kind, accepted = self._kinds[name], self._accepted[name]
        names: dict[str, str] = {}
        for key in given:
            if self._is_count(name, key):
                continue
            own = self._own(name, key)
            if accepted is not None and own not in accepted:
                raise TypeError(f"{where} has keyword {own!r}; {kind} takes {sorted(accepted)}")
            other = names.setdefault(own, key)
            if other != key:
                raise ValueError(
                    f"{where} has {other!r} and {key!r}, which are both {own!r} of {kind}: one would be dropped. Give "
                    "it once."
                )
        missing = sorted(self._required[name] - names.keys())
        if missing:
            raise TypeError(f"{where} lacks {missing}, which {kind} needs; found {sorted(given)}")


def run_encoder(name: str, encoder: nn.Module, keywords: Mapping[str, Tensor], counts: object = None) -> EncodedRows:
    """An encoder's rows, `[n, s, h]` or `[n, h]`; floating-point inputs are cast to what it computes in.

    Megatron's mixed-precision wrapper casts a model's weights and its positional inputs only.

    Args:
        name, encoder, keywords: what to run on what.
        counts: rows of each item, where its inputs tell them.

    Returns:
        With the rows of each item where they are told, or where the shape `[n, s, h]` says them. (`[1, s, h]` does
        not: it may hold the rows of several items, packed.)

    Raises:
        TypeError: an output without such rows, images of whole numbers that it cannot compute with, counts that are
            no ints.
        ValueError: another shape, counts that do not add up.
    """
    try:
        output = encoder(**{key: in_dtype_of(encoder, value) for key, value in keywords.items()})
    except RuntimeError as error:
        of_bytes = [key for key, value in keywords.items() if isinstance(value, Tensor) and value.dtype == torch.uint8]
        if not of_bytes:
            raise
        raise TypeError(
            f"encoder {name!r} ({type(encoder).__name__}) cannot compute with {of_bytes} of dtype uint8. Scale and "
            "normalise images to floating point where the batch is made, as the encoder was trained."
        ) from error
    told = counts
    if isinstance(output, EncodedRows):
        told = counts if output.rows_per_item is None else output.rows_per_item
        output = output.rows
    rows = with_zeros(_rows_of(name, output), encoder)
    if told is not None:
        return EncodedRows(rows, _checked_counts(name, told, rows.shape[:-1].numel()))
    return EncodedRows(rows, _items_by_shape(rows) if len(rows) != 1 else None)


def _rows_of(name: str, output: object) -> Tensor:
    """The rows in what an encoder returned."""
    rows = tuple(output.values()) if isinstance(output, Mapping) else output
    if isinstance(rows, tuple):
        rows = rows[0] if rows else None
    if not isinstance(rows, Tensor):
        raise TypeError(
            f"encoder {name!r} returned {type(output).__name__}; expected a tensor, EncodedRows, or a tuple "
            "or mapping whose first element is a tensor"
        )
    if not rows.is_floating_point():
        raise TypeError(f"encoder {name!r} returned {rows.dtype}; expected floating-point rows")
    if rows.dim() not in (2, 3):
        raise ValueError(f"encoder {name!r} returned shape {list(rows.shape)}; expected [B, s, h] or [n, h]")
    return rows


def projected(projection: nn.Module, rows: Tensor) -> Tensor:
    """Rows through a projection, cast to what it computes in; Megatron's linear layers may leave adding their bias to
    the caller."""
    output = projection(in_dtype_of(projection, rows))
    if not isinstance(output, tuple):
        return output
    projected_rows, bias = output
    return projected_rows if bias is None else projected_rows + bias


def combined(outputs: Mapping[str, EncodedRows], combine: Combine | None) -> EncodedRows:
    """One `[N, h]` or `[n, s, h]` from the outputs of several encoders, in their order, and the rows of each item.

    Args:
        outputs: encoder name -> its rows, at least one.
        combine: None: item by item, as for encoders that see the same images. For one image that is also what
            concatenation gives.

    Raises:
        ValueError: outputs that cannot follow each other so.
    """
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    _check_equal("width", {name: output.rows.shape[-1] for name, output in outputs.items()})
    items = {name: _items(output) for name, output in outputs.items()}
    flat = {name: output.rows.flatten(0, -2) for name, output in outputs.items()}
    if combine == "concatenate":
        counts = [count for known in items.values() for count in known or ()]
        return EncodedRows(torch.cat(list(flat.values())), None if None in items.values() else counts)
    _check_same_items(outputs, items, combine)
    per_item = [sum(counts) for counts in zip(*items.values(), strict=True)]
    if all(output.rows.dim() == 3 for output in outputs.values()):
        return EncodedRows(torch.cat([output.rows for output in outputs.values()], dim=1), per_item)
    pieces = [flat[name].split(counts) for name, counts in items.items()]
    following = [piece for item in zip(*pieces, strict=True) for piece in item]
    return EncodedRows(torch.cat(following or list(flat.values())), per_item)


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


def _check_same_items(
    outputs: Mapping[str, EncodedRows], items: Mapping[str, list[int] | None], combine: Combine | None
) -> None:
    """Refuses rows that cannot follow each other item by item."""
    numbers = {name: None if counts is None else len(counts) for name, counts in items.items()}
    if None not in numbers.values() and len(set(numbers.values())) == 1:
        return
    found = {name: f"{list(outputs[name].rows.shape)}, {'?' if n is None else n} items" for name, n in numbers.items()}
    raise ValueError(
        f"combine={combine!r} lets the rows of several encoders follow each other item by item, which needs [n, s, h] "
        f"or EncodedRows(rows, rows_per_item) with one n from each; found {found}. Set combine='concatenate' for "
        "encoders that see different items: all of the first, then all of the second."
    )


def _items(output: EncodedRows) -> list[int] | None:
    """Rows of each item, told or by the shape."""
    return _items_by_shape(output.rows) if output.rows_per_item is None else output.rows_per_item


def _items_by_shape(rows: Tensor) -> list[int] | None:
    return [rows.shape[1]] * rows.shape[0] if rows.dim() == 3 else None


def _checked_counts(name: str, told: object, rows: int) -> list[int]:
    """Rows of each item as a list of ints, which add up.

    Raises:
        TypeError: something else; on a device, where looking would wait for it.
        ValueError: another sum, or a negative one.
    """
    if isinstance(told, Tensor) and told.device.type == "cpu" and not told.is_floating_point():
        told = told.tolist()
    counts = list(told) if isinstance(told, Sequence) else None
    if counts is None or not all(isinstance(one, int) and not isinstance(one, bool) for one in counts):
        what = f"a tensor on {told.device}" if isinstance(told, Tensor) else repr(told)
        raise TypeError(
            f"encoder {name!r}: {ROWS_PER_ITEM} must be a list of ints on the host, one for each item, found {what}"
        )
    if sum(counts) != rows or min(counts, default=0) < 0:
        raise ValueError(
            f"encoder {name!r}: {ROWS_PER_ITEM} {counts} adds up to {sum(counts)}, but it returned {rows} rows. "
            "Count the rows of each item after pooling, and those of padding only if they are returned."
        )
    return counts


def _keyword_names(module: nn.Module) -> frozenset[str] | None:
    """Keywords that a module's forward takes, None for any."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def _required_names(module: nn.Module) -> frozenset[str]:
    """Keywords without which a module's forward cannot be called."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(module.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variable)
