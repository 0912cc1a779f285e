"""A nested batch as one flat buffer of bytes, so that it moves in one transfer.

A batch of several modalities is a dozen small tensors of several dtypes. Broadcast one by one they cost
a dozen collectives; in one buffer they cost one, and one copy from the host to the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# Every tensor starts on a multiple of this many bytes: kernels that read 16 bytes at once ask for
# 16, and whole lines of the device's memory are fetched either way.
ALIGNMENT = 128


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the buffer: its dtype, its shape, and its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """The byte after its last one."""
        return self.start + self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Record:
    """A dataclass whose fields were taken apart."""

    kind: type
    fields: dict[str, object]


@dataclass(frozen=True)
class Manifest:
    """What lies where in a batch's buffer; small.

    Args:
        tree: the batch with a `Slot` in place of each tensor and a `Record` of each dataclass. Fields
            of dataclasses with the metadata `on_host` are in it as they are.
        size: bytes of the buffer.
    """

    tree: object
    size: int


def to_bytes(batch: object, pin: bool = False) -> tuple[Manifest, Tensor]:
    """The manifest of a batch and its buffer, uint8 `[size]` on the CPU.

    Args:
        batch: tensors on the CPU, and anything that can be pickled, in nested mappings, lists,
            tuples and dataclasses.
        pin: put the buffer into pinned memory, from which copies to a device do not wait.

    Raises:
        ValueError: a tensor is not on the CPU.

    Example:
        >>> manifest, buffer = to_bytes({"input_ids": torch.arange(3), "name": "first"})
        >>> from_bytes(manifest, buffer)
        {'input_ids': tensor([0, 1, 2]), 'name': 'first'}
    """
    tensors: list[tuple[Slot, Tensor]] = []
    tree = _described(batch, "batch", tensors)
    size = tensors[-1][0].stop if tensors else 0
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for slot, tensor in tensors:
        _view(buffer, slot).copy_(tensor)
    return Manifest(tree, size), buffer


def from_bytes(manifest: Manifest, buffer: Tensor) -> Any:
    """The batch again, its tensors views of `buffer`.

    Args:
        manifest: from `to_bytes`, here or on another rank.
        buffer: uint8 `[manifest.size]`, on any device.
    """
    return _rebuilt(manifest.tree, buffer)


def _described(node: object, where: str, tensors: list[tuple[Slot, Tensor]]) -> object:
    """`node` with slots for its tensors, which are added to `tensors`."""
    if isinstance(node, Tensor):
        if node.device.type != "cpu":
            raise ValueError(
                f"{where} lies on {node.device}, expected the CPU: one rank reads a batch and sends it "
                "to the others' devices. Leave the copy to the training step."
            )
        end = tensors[-1][0].stop if tensors else 0
        slot = Slot(node.dtype, tuple(node.shape), -(-end // ALIGNMENT) * ALIGNMENT)
        tensors.append((slot, node))
        return slot
    if isinstance(node, Mapping):
        return {key: _described(value, f"{where}[{key!r}]", tensors) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        items = [_described(value, f"{where}[{i}]", tensors) for i, value in enumerate(node)]
        return items if isinstance(node, list) else tuple(items)
    if is_dataclass(node) and not isinstance(node, type):
        values = {
            field.name: getattr(node, field.name)
            if field.metadata.get("on_host")
            else _described(getattr(node, field.name), f"{where}.{field.name}", tensors)
            for field in fields(node)
        }
        return Record(type(node), values)
    return node


def _rebuilt(node: Any, buffer: Tensor) -> Any:
    if isinstance(node, Slot):
        return _view(buffer, node)
    if isinstance(node, Record):
        return node.kind(**_rebuilt(node.fields, buffer))
    if isinstance(node, dict):
        return {key: _rebuilt(value, buffer) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_rebuilt(value, buffer) for value in node)
    return node


def _view(buffer: Tensor, slot: Slot) -> Tensor:
    return buffer[slot.start : slot.stop].view(slot.dtype).view(slot.shape)
