"""Packs in a step's CUDA graph on a GPU: one graph wherever their samples begin, by every attention that there is."""

import functools

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention

from megatron_mimo import specs
from megatron_mimo.data.transfer import from_bytes, to_bytes
from megatron_mimo.rotary import GridGPT
from megatron_mimo.segments import segmented
from megatron_mimo.training import StepGraphs, Trainer
from megatron_mimo.training.reading import placed_batches
from tests import tiny
from tests.unit.test_whole_step import ROWS, assert_same_steps, config_of, trainer_of
from tests.unit.test_whole_step_packs import LENGTHS, pack_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def run(graph_safe_run):
    return graph_safe_run


def pair_of(run, backend: str, dtype: torch.dtype, sections: bool = False, **changes) -> tuple[Trainer, Trainer]:
    """A trainer without graphs and one with, of equal weights."""
    language = tiny.language_config(
        kv_channels=64, bf16=dtype is torch.bfloat16, params_dtype=dtype, **changes,
        **({"mrope_section": [16, 8, 8]} if sections else {}),
    )  # fmt: skip
    layers = functools.partial(specs.language_layer_spec, backend=backend)
    kind = dict(position_embedding_type="mrope", mrope_interleaved=True) if sections else {}
    spec = tiny.language_spec(
        language,
        transformer_layer_spec=lambda config, vp_stage=None: layers(config),
        **{"position_embedding_type": "rope"} | kind,
    )
    if sections:
        spec.module = GridGPT
    eager, graphed = (trainer_of(run, graphs, config=config_of(spec)) for graphs in (None, StepGraphs()))
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    return eager, graphed


def packs(step: int) -> list[dict]:
    return [pack_of(2 * step + index, LENGTHS[(step + 3 * index) % 6]) for index in range(2)]


def assert_close_steps(eager: Trainer, graphed: Trainer, data, steps: int) -> None:
    """To the rounding of half precision: the kernels are other ones where sequences are rounded up."""
    for step in range(steps):
        expected, found = (each.train_step(lambda *_: data(step)) for each in (eager, graphed))
        assert dict(found.losses) == pytest.approx(dict(expected.losses), rel=2e-2), step
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-1), step
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, steps - 2, 2)


def test_packs_of_plain_torch_are_replayed_bit_by_bit_wherever_samples_begin(run):
    eager, graphed = pair_of(run, "torch", torch.bfloat16)
    assert_same_steps(eager, graphed, packs, 20)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 18, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_packs_of_transformer_engine_are_replayed_wherever_samples_begin(run, fused):
    pytest.importorskip("transformer_engine")
    assert_close_steps(*pair_of(run, "transformer_engine", torch.bfloat16, apply_rope_fusion=fused), packs, 20)


@pytest.mark.parametrize("fused", [True, False])
def test_positions_of_sections_are_replayed_by_the_fused_rotary_kernel_too(run, fused):
    """Which Megatron cannot give packs of them."""
    pytest.importorskip("transformer_engine")

    def data(step: int) -> list[dict]:
        draw = torch.Generator().manual_seed(step)
        return [{**pack, "position_ids": torch.randint(0, 48, (3, 1, 48), generator=draw)} for pack in packs(step)]

    changes = dict(sections=True, apply_rope_fusion=fused)
    eager, graphed = pair_of(run, "transformer_engine", torch.bfloat16, **changes)
    assert_close_steps(eager, graphed, data, 12)


@pytest.mark.parametrize("sections", [False, True])
def test_the_fused_kernel_turns_packs_as_megatrons_attention_turns_them_without(run, sections):
    """With queries and keys so large that attention looks at few positions: angles of others give other logits."""
    pytest.importorskip("transformer_engine")
    (ours, _), (theirs, _) = (
        pair_of(run, "transformer_engine", torch.bfloat16, sections, apply_rope_fusion=fused) for fused in (True, False)
    )
    model, reference = ours.models[0], theirs.models[0]
    for layer in reference.language_model.decoder.layers:
        layer.self_attention.__class__ = SelfAttention
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "linear_qkv.weight" in name:
                weight *= 8
    reference.load_state_dict(model.state_dict())
    batch = pack_of(0, LENGTHS[0])
    batch = {name: batch[name] for name in ("input_ids", "modality_inputs", "packed_seq_params")}
    if sections:
        batch["position_ids"] = torch.randint(0, 48, (3, 1, 48), generator=torch.Generator().manual_seed(1))
    manifest, buffer = to_bytes(batch)
    with torch.no_grad():
        found, expected = (each.eval()(**from_bytes(manifest, buffer.cuda()))[0] for each in (model, reference))
        wrong = from_bytes(manifest, buffer.cuda())
        wrong["packed_seq_params"] = on_gpu_again(segmented(torch.tensor([0, 5, 24, 48], dtype=torch.int32)))
        other = model(**wrong)[0]
    off = (found - expected).float().norm() / expected.float().norm()
    assert off < 0.03 and (other - expected).float().norm() / expected.float().norm() > 3 * off


def on_gpu_again(params):
    """As a batch that was moved has them."""
    manifest, buffer = to_bytes({"params": params})
    return from_bytes(manifest, buffer.cuda())["params"]


def test_spans_that_see_the_whole_of_themselves_are_replayed(run):
    def data(step: int) -> list[dict]:
        batches = []
        for batch in packs(step):
            told, spans = batch["packed_seq_params"], torch.full((48,), -1, dtype=torch.int32)
            for number, start in enumerate(told.cu_seqlens_q_padded[:2].tolist()):
                spans[start + 1 : start + 1 + ROWS] = number
            seen = segmented(told.cu_seqlens_q, told.cu_seqlens_q_padded, spans)
            batches.append({**batch, "packed_seq_params": seen})
        return batches

    assert_close_steps(*pair_of(run, "torch", torch.bfloat16), data, 12)


def test_packs_that_the_host_cuts_are_replayed_where_their_samples_begin_again(run):
    """In float32, which no kernel for packs takes."""
    eager, graphed = pair_of(run, "torch", torch.float32)
    assert_same_steps(eager, graphed, lambda step: [pack_of(step, LENGTHS[step % 2])], 10)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (2, 6, 4)


@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
def test_a_step_of_packs_with_rotary_positions_never_waits_for_the_device(run, backend):
    pytest.importorskip("transformer_engine")
    eager, _ = pair_of(run, backend, torch.bfloat16)
    model = eager.models[0]
    (batch,) = placed_batches(iter([pack_of(0, LENGTHS[0])]), model)
    manifest, buffer = to_bytes(batch)
    there = buffer.cuda()
    model(**from_bytes(manifest, there))[0].sum().backward()  # loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**from_bytes(manifest, there))[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
