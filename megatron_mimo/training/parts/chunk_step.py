"""A training step's microbatches for one chunk of a model, before its schedule runs.

    key       what a capture takes for granted: shapes, rows of the loss, which terms count anything
    inputs    what changes from step to step: the microbatches, one buffer each, the targets as they were prepared,
              and the numbers by which the loss is divided

Targets are prepared here, outside a graph: what is drawn for them comes from the streams of each microbatch
(`draws.restart_draws`), whose seeds the host tells, and a tokenizer may do what it likes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from megatron_mimo.batch import Batch
from megatron_mimo.compat.torch import flatten, unflatten
from megatron_mimo.data.step import Counts
from megatron_mimo.data.transfer import Manifest, Record, Slot, from_bytes
from megatron_mimo.decoders.prepared import Prepared
from megatron_mimo.model import MimoModel
from megatron_mimo.placement import Placement
from megatron_mimo.rotary import asks_for_no_boundaries
from megatron_mimo.segments import SegmentedParams
from megatron_mimo.tally import HostFacts
from megatron_mimo.training import auxiliary
from megatron_mimo.training.forward import Ahead, ForwardStep
from megatron_mimo.training.scale import StepScale, ToldScale, numbers_of, told_of
from megatron_mimo.training.speed import counts as names

#: Modality -> decoder -> what it learns of a microbatch.
AllPrepared = Mapping[str, Mapping[str, Prepared]]


@dataclass(frozen=True)
class ChunkStep:
    """One chunk's microbatches of a step.

    Attributes:
        model: the chunk.
        key: equal for steps that one capture serves.
        inputs: on the chunk's device, of equal shapes for equal keys.
    """

    model: MimoModel
    key: Hashable
    inputs: list[Tensor]
    _manifests: list[Manifest]
    _counts: list[Counts]
    _targets: list[AllPrepared]
    _scale: StepScale | None

    @classmethod
    def read(
        cls,
        batches: Iterable[Batch],
        model: MimoModel,
        forward_step: ForwardStep,
    ) -> ChunkStep:
        """The step's microbatches, checked, on the device, with their targets prepared.

        Args:
            batches: on the CPU; looked at on rank 0 of the tensor-parallel group alone.
            model: the chunk.
            forward_step: reads them.

        Raises:
            ValueError: a bad batch.
        """
        step, scale = forward_step.read(iter(batches), model)
        each = [step.next_bytes() for _ in range(len(step))]
        manifests = [manifest for manifest, _, _ in each]
        buffers = [buffer for _, buffer, _ in each]
        counts = [counted for _, _, counted in each]
        targets = []
        for index, (manifest, buffer, _) in enumerate(each):
            forward_step.begin(model, index)
            targets.append(_prepared(from_bytes(manifest, buffer), model))
        tensors, forms = zip(*(_taken_apart(of_batch) for of_batch in targets), strict=True)
        inputs = [*buffers, *(tensor for of_batch in tensors for tensor in of_batch)]
        if scale is not None:
            held = (forward_step.held(counted, model) for counted in counts)
            inputs.append(numbers_of(scale, held, buffers[0].device))
        key = (
            tuple(signature(manifest.tree) for manifest in manifests),
            tuple(model.shapes(_placement(manifest)) for manifest in manifests),
            forms,
            tuple((tensor.shape, tensor.dtype) for tensor in inputs),
            tuple(_counts_nothing(counted) for counted in counts),
            None if scale is None else tuple((term, count == 0) for term, count in scale.counts.items()),
        )
        return cls(model, key, inputs, manifests, counts, targets, scale)

    @property
    def microbatches(self) -> int:
        """How many there are in the step."""
        return len(self._manifests)

    def ahead(self, inputs: Sequence[Tensor]) -> list[Ahead]:
        """The microbatches as `ForwardStep.given` takes them, on other tensors.

        Args:
            inputs: in place of `self.inputs`.
        """
        number = len(self._manifests)
        buffers, rest = inputs[:number], iter(inputs[number:])
        batches = [from_bytes(*one) for one in zip(self._manifests, buffers, strict=True)]
        instead = [_put_together(prepared, rest) for prepared in self._targets]
        told: Sequence[ToldScale | None] = [None] * number
        if self._scale is not None:
            told = told_of(self._scale, next(rest))
        each = zip(batches, instead, self._counts, [self._scale] * number, told, strict=True)
        return list(each)

    def scale_mtp(self, inputs: Sequence[Tensor]) -> None:
        """Tells multi-token prediction its weight in the step, on the device; nothing before the last stage.

        Args:
            inputs: in place of `self.inputs`.
        """
        if self._scale is not None:
            numbers, text = inputs[-1], [*self._scale.counts].index("text")
            auxiliary.scale_mtp(self.model.config, numbers[len(self._scale.counts)], numbers[text])

    @property
    def captured(self) -> bool:
        """Whether a graph may be captured: nothing asks the device for boundaries of packed sequences.

        Megatron does for multi-token prediction, layers of another's may, and TransformerEngine where it is not told
        what lies between sequences, as `segments.segmented` tells.
        """
        each = (cast(Any, manifest.tree).get("packed_seq_params") for manifest in self._manifests)
        packed = [one for one in each if one is not None]
        told = all(isinstance(one, Record) and one.kind is SegmentedParams for one in packed)
        return not packed or (told and asks_for_no_boundaries(self.model.language_model))

    def recheck(self, brought: Sequence[Sequence[tuple[str, int, tuple[int, ...] | None]]]) -> None:
        """Holds the rows that a replay will make against the tokens of this step's microbatches.

        Args:
            brought: `(table, rows, rows of each item)` of each microbatch, as the capture made them.

        Raises:
            ValueError: as `Placement.check_rows`.
        """
        for manifest, rows_of_tables in zip(self._manifests, brought, strict=True):
            placement = _placement(manifest)
            for table, rows, items in rows_of_tables:
                cast(Placement, placement).check_rows(table, rows, items)


def _placement(manifest: Manifest) -> Placement | None:
    """A microbatch's placement, of whose tensors nothing is looked at."""
    return from_bytes(manifest, torch.empty(manifest.size, dtype=torch.uint8)).get("placement")


def _prepared(batch: Batch, model: MimoModel) -> AllPrepared:
    """What this chunk's parts learn or are shown of a microbatch; without modalities of which they read nothing."""
    given = {modality: of for modality, of in (batch.get("modality_targets") or {}).items() if of}
    with torch.no_grad():
        return {modality: of for modality, of in model.prepare(given).items() if of}


def _taken_apart(prepared: AllPrepared) -> tuple[list[Tensor], Hashable]:
    """The tensors of prepared targets, and the rest, which tells apart what runs differently."""
    leaves, form = flatten({name: {key: dict(one) for key, one in of.items()} for name, of in prepared.items()})
    rest = tuple(None if isinstance(leaf, Tensor) else signature(leaf) for leaf in leaves)
    rows = tuple((one.num_rows, one.rows_per_item) for of in prepared.values() for one in of.values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], (form, rest, rows)


def _put_together(prepared: AllPrepared, tensors: Iterator[Tensor]) -> dict[str, object]:
    """Prepared targets with other tensors, as the model takes them; nothing where there are none."""
    if not prepared:
        return {}
    plain = {name: {key: dict(one) for key, one in of.items()} for name, of in prepared.items()}
    leaves, form = flatten(plain)
    found = unflatten([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)
    targets = {
        name: {key: replace(one, tensors=found[name][key]) for key, one in of.items()} for name, of in prepared.items()
    }
    return {"modality_targets": targets}


def _counts_nothing(counted: Counts) -> Hashable:
    """Terms of a microbatch, and of which it counts nothing: those of which it does are held against their losses."""
    return tuple((term, count == 0) for term, count in counted.items() if term[0] == names.LOSS)


def signature(node: Any) -> Hashable:
    """What a capture takes for granted of a microbatch: all of its manifest but what the host alone looks at.

    Args:
        node: of the manifest.
    """
    match node:
        case Record(kind=kind) if kind is HostFacts:
            return kind  # `MimoModel.shapes` says what it makes of shapes
        case Record(kind=kind, fields=values):
            hidden = {"checks", "arrival"} if kind is Placement else set()
            return kind, signature({name: value for name, value in values.items() if name not in hidden})
        case Mapping():
            return tuple((key, signature(value)) for key, value in node.items())
        case list() | tuple():
            return tuple(signature(value) for value in node)
        case Slot() | None | bool() | int() | float() | str() | torch.dtype():
            return type(node), node
        case _ if is_dataclass(node):
            return type(node), node
    return object()  # what may hold anything is a shape of its own, each time: such steps run without a graph
