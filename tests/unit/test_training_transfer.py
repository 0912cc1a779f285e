"""A nested batch survives the trip through one flat buffer, and each pipeline stage gets what it needs."""

import pickle
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mimo.data.step import part_for_stage
from megatron_mimo.data.transfer import ALIGNMENT, Slot, from_bytes, to_bytes
from megatron_mimo.deferred import Checks
from megatron_mimo.placement import build_placement

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
]  # fmt: skip


@dataclass(frozen=True)
class Clip:
    frames: Tensor
    rate: int
    parts: tuple


def sent(batch: object) -> object:
    """`batch` as another process gets it: the manifest pickled, the bytes copied."""
    manifest, buffer = to_bytes(batch)
    assert buffer.dtype == torch.uint8 and buffer.shape == (manifest.size,)
    return from_bytes(pickle.loads(pickle.dumps(manifest)), buffer.clone())


def same(found: object, expected: object) -> bool:
    """Whether two trees agree in types, dtypes, shapes and bits."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or (found.dtype, found.shape) != (expected.dtype, expected.shape):
            return False
        return found.contiguous().flatten().view(torch.uint8).equal(expected.contiguous().flatten().view(torch.uint8))
    if type(found) is not type(expected):
        return False
    if isinstance(expected, Checks):
        return True  # a copy waits for nothing
    if is_dataclass(expected):
        return all(same(getattr(found, each.name), getattr(expected, each.name)) for each in fields(expected))
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2), (1,), (5, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype, shape):
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(shape)
    # An odd number of bytes before it and an empty tensor behind it: it starts where its dtype may be read.
    batch = {"before": torch.ones(3, dtype=torch.uint8), "it": tensor, "behind": torch.empty(0, dtype=dtype)}
    assert same(sent(batch), batch)


def test_nested_batch_of_tensors_dataclasses_and_plain_values_comes_back():
    ids = torch.tensor([[5, -1, -1, 6], [7, 8, 9, 9]])
    batch = {
        "input_ids": ids,
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "every other": torch.arange(10.0)[::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "placement": build_placement(ids, {"images": -1}, {"images": 9}, vocabulary_size=10),
        "modality_inputs": {"images": {"vit": {"x": torch.randn(1, 2, 3), "names": ["a", "b"], "scale": 0.5}}},
        "clips": [Clip(torch.randn(2, 2), 16000, (torch.tensor(True), None)), Clip(torch.empty(0, 2), 8000, ())],
        "empty": {},
        "nothing": None,
        1: (torch.tensor(3), "three"),
    }
    assert same(sent(batch), batch)


def test_placement_that_came_over_still_knows_its_counts_and_spans():
    ids = torch.tensor([[5, -1, -1, 6], [9, 9, -1, 7]])
    made = build_placement(ids, {"images": -1}, {"images": 9})
    got = sent(made)
    assert got.generation_count("images") == 2
    assert got.spans("images").equal(made.spans("images"))


def test_packed_sequences_come_back():
    boundaries = torch.tensor([0, 5, 8], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=5,
        max_seqlen_kv=5,
        total_tokens=8,
    )
    assert same(sent(packed), packed)


@pytest.mark.parametrize("batch", [{}, {"name": "no tensor"}, torch.tensor(2.5), [torch.empty(0)]], ids=str)
def test_batches_of_no_tensor_one_or_an_empty_one_come_back(batch):
    assert same(sent(batch), batch)


def test_tensors_start_on_multiples_of_the_alignment_and_the_manifest_holds_none():
    manifest, _ = to_bytes({"a": torch.ones(3), "b": [torch.ones(70, dtype=torch.float64)], "c": torch.ones(1)})
    slots = [manifest.tree["a"], manifest.tree["b"][0], manifest.tree["c"]]
    assert all(isinstance(slot, Slot) for slot in slots)
    assert [slot.start for slot in slots] == [0, ALIGNMENT, 6 * ALIGNMENT]
    assert manifest.size == 6 * ALIGNMENT + 4


def test_tensors_that_come_back_are_views_of_the_one_buffer():
    manifest, buffer = to_bytes({"a": torch.ones(3), "b": torch.ones(2)})
    first, second = from_bytes(manifest, buffer).values()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() == buffer.data_ptr()


def test_tensor_that_is_not_on_the_cpu_is_refused_by_its_place_in_the_batch():
    batch = {"modality_inputs": {"images": [torch.ones(1), torch.ones(1, device="meta")]}}
    with pytest.raises(ValueError, match=r"batch\['modality_inputs'\]\['images'\]\[1\] lies on meta"):
        to_bytes(batch)


WHOLE = dict.fromkeys(
    ["input_ids", "position_ids", "attention_mask", "packed_seq_params", "modality_inputs", "modality_targets",
     "placement", "labels", "loss_mask"]
)  # fmt: skip
EVERYWHERE = {"input_ids", "position_ids", "attention_mask", "packed_seq_params"}


@pytest.mark.parametrize(
    ("first", "last", "more"),
    [
        (True, False, {"modality_inputs", "modality_targets", "placement"}),
        (False, False, set()),
        (False, True, {"modality_targets", "placement", "labels", "loss_mask"}),
        (True, True, set(WHOLE) - EVERYWHERE),
    ],
)
def test_each_pipeline_stage_gets_only_what_it_needs(first, last, more):
    assert set(part_for_stage(WHOLE, first=first, last=last)) == EVERYWHERE | more


def test_what_the_host_knows_of_a_placement_stays_out_of_the_buffer():
    placement = build_placement(torch.tensor([[1, -200, -200, 61]]), {"images": -200}, {"images": 61})
    manifest, buffer = to_bytes({"placement": placement})
    found = from_bytes(manifest, torch.zeros_like(buffer))["placement"]
    assert found.host.positions.equal(placement.host.positions)
    assert found.spans("images").tolist() == [[0, 1, 3]]
    assert not found.positions.any()  # these lay in the buffer, which came as zeros
