"""Operations counted by hand, and the rates that are made of them."""

import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.decoders import FlowTransformerDecoder
from megatron_mimo.decoders.inputs import QueryInput
from megatron_mimo.training import TrainingControl
from megatron_mimo.training.speed.counts import count_batch
from megatron_mimo.training.speed.flops import PartSize, part_sizes, stated_peak, step_flops
from megatron_mimo.training.speed.throughput import Throughput, log_to_megatron, peak_of_all
from tests import packed, tiny

H, F, V, LAYERS, B, S = tiny.HIDDEN, 64, tiny.VOCABULARY, 2, 3, 16
READ, HEARD, WRITTEN = 4, 3, 5  # rows of tiny.batch
# Query, key, value and output; the two of the MLP.
LAYER = 4 * H * H + 2 * H * F
COUNTED = int(tiny.batch()["loss_mask"].count_nonzero())  # labels, where alone logits are needed
LOGITS = 2 * V * H * COUNTED
# Scores and mixing, two operations each, half of them masked.
ATTENTION = 4 * LAYERS * H / 2 * (B * S) * S
LANGUAGE = 2 * LAYERS * LAYER * B * S + LOGITS + ATTENTION


def flops(control: TrainingControl = TrainingControl(), training: bool = True, **changes) -> dict[str, float]:
    """Of a step on `tiny.batch()`."""
    model = megatron_mimo.MimoModel(tiny.mimo_config(**changes))
    control.apply(model)
    return step_flops(part_sizes([model]), count_batch(tiny.batch(), model), training=training)


def test_forward_pass_of_every_part_as_counted_by_hand(single_process):
    assert flops(training=False) == {
        "language_model": LANGUAGE,
        "images/encoders/patches": 2 * tiny.PIXELS * 16 * READ,
        "images/input_projections": 2 * 16 * H * READ,
        "images/decoders/pixels": 2 * H * tiny.PIXELS * WRITTEN,
        "images/output_projections": 2 * H * H * WRITTEN,
        "audio/encoders/frames": 2 * tiny.PIXELS * 16 * HEARD,
        "audio/input_projections": 2 * 16 * H * HEARD,
    }


def test_a_loss_at_every_position_is_said_to_need_no_more(single_process):
    assert COUNTED < B * S
    assert flops(loss_where_counted=False) == flops()


def test_training_takes_three_forward_passes(single_process):
    forward = flops(training=False)
    assert flops() == pytest.approx({name: 3 * count for name, count in forward.items()})


def test_packed_sequences_attend_within_themselves(single_process):
    model = megatron_mimo.MimoModel(tiny.mimo_config(packed.language_spec(tiny.language_config())))
    ids = torch.arange(1, 13)[None]
    batch = {"input_ids": ids, "labels": ids, "packed_seq_params": packed.packed_params([4, 4, 2, 0], [4, 4, 4, 0])}
    counts = count_batch(batch, model)
    assert counts[("samples",)] == 3
    flops = step_flops({"language_model": PartSize(attention=1.0)}, counts, training=False)
    assert flops == {"language_model": 4 * 12 * 4}


def test_tied_output_layer_counts_once_and_the_tables_of_positions_never(single_process):
    changes = dict(share_embeddings_and_output_weights=True, position_embedding_type="learned_absolute")
    assert flops(training=False, language=tiny.language_spec(**changes))["language_model"] == LANGUAGE


FROZEN = {
    # frozen parts -> forward passes that each part is worth
    ("encoders",): {"images/encoders/patches": 1, "images/input_projections": 3, "language_model": 3},
    ("language_model",): {"language_model": 2, "images/encoders/patches": 3, "images/decoders/pixels": 3},
    ("language_model", "encoders", "input_projections"): {"language_model": 1, "images/output_projections": 3},
    ("input_projections",): {"images/input_projections": 2, "images/encoders/patches": 3},
    ("images", "audio"): {"images/encoders/patches": 1, "images/decoders/pixels": 2, "language_model": 3},
    ("images", "language_model"): {
        "audio/encoders/frames": 3, "images/input_projections": 1, "language_model": 2, "images/decoders/pixels": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_parts_spare_their_weights_gradient_and_their_inputs_where_nothing_before_trains(frozen, single_process):
    forward, found = flops(training=False), flops(TrainingControl(frozen=frozen))
    passes = {name: found[name] / forward[name] for name in FROZEN[frozen]}
    assert passes == pytest.approx(FROZEN[frozen])


def test_single_embedding_rows_of_a_frozen_model_need_the_gradient_of_its_inputs(single_process):
    frozen = TrainingControl(frozen=["language_model", "images", "audio"], embedding_rows=[3])
    assert flops(frozen)["language_model"] == pytest.approx(2 * LANGUAGE)


def test_a_token_meets_the_experts_that_the_router_chooses(single_process):
    config = tiny.language_config(
        num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, add_bias_linear=False,
    )  # fmt: skip
    found = flops(training=False, language=tiny.language_spec(config))["language_model"]
    layer = 4 * H * H + 2 * (2 * H * F) + 4 * H  # two of four experts, and the router
    assert found == 2 * LAYERS * layer * B * S + LOGITS + ATTENTION


def test_grouped_queries_share_keys_and_values(single_process):
    found = flops(training=False, language=tiny.language_spec(tiny.language_config(num_query_groups=2)))
    saved = LAYERS * 2 * H * H / 2  # half the keys' and values' weights
    assert found["language_model"] == LANGUAGE - 2 * saved * B * S


def test_vision_transformer_counts_its_own_positions_and_whole_attention(single_process):
    config = tiny.language_config(num_layers=1)
    clip = specs.clip_vit_spec(config, "torch", patch_dim=4, img_h=8, img_w=8)
    images = tiny.image_spec(encoders={"vit": clip}, input_projections=[tiny.linear(H, H)])
    model = megatron_mimo.MimoModel(
        tiny.mimo_config(modality_submodules={"images": images, "audio": tiny.audio_spec()})
    )
    counts = {
        ("positions",): 48.0,
        ("samples",): 3.0,
        ("media items", "images", "vit"): 2.0,
        ("media items", "audio", "frames"): 0.0,
    }
    found = step_flops(part_sizes([model]), counts, training=False)["images/encoders/vit"]
    rows = 4 + 1  # patches of 4 x 4 pixels and the class token
    assert found == 2 * (LAYER + 3 * 4 * 4 * H) * 2 * rows + 4 * H * 2 * rows * rows


def test_decoder_of_patches_counts_them_for_each_token(single_process):
    decoder = ModuleSpec(
        module=FlowTransformerDecoder,
        params=dict(
            width=H,
            target_width=4,
            rows_per_item=2,
            targets_per_item=6,
            hidden_width=16,
            depth=1,
            heads=2,
            condition="prefix",
        ),
    )
    model = megatron_mimo.MimoModel(
        tiny.mimo_config(
            modality_submodules={"images": tiny.image_spec(decoders={"flow": decoder}), "audio": tiny.audio_spec()}
        )
    )
    sizes = part_sizes([model])
    counts = {
        ("positions",): 48.0,
        ("samples",): 3.0,
        ("media items", "images", "patches"): 0.0,
        ("media items", "audio", "frames"): 0.0,
        ("rows written", "images"): 4.0,
    }
    weights = sum(
        p.numel()
        for n, p in model.modality_submodules["images"].decoders.named_parameters()
        if p.dim() > 1 and n.endswith("weight")
    )
    assert step_flops(sizes, counts, training=False)["images/decoders/flow"] == 2 * weights * 12


def test_what_is_added_and_not_multiplied_counts_nothing(single_process):
    feed = ModuleSpec(module=QueryInput, params=dict(hidden_size=H, rows_per_item=1))
    spec = tiny.image_spec(generation_input=feed)
    found = flops(modality_submodules={"images": spec, "audio": tiny.audio_spec()})
    assert found["images/generation_input"] == 0


def test_rates_are_sums_over_the_steps_since_the_last_report_divided_by_their_seconds():
    sizes = {"language_model": PartSize(weights=100.0, trained=100.0), "images/encoders/vit": PartSize(weights=10.0)}
    counts = {
        ("positions",): 50.0,
        ("samples",): 5.0,
        ("rows read", "images"): 20.0,
        ("rows written", "tones"): 4.0,
        ("media items", "images", "vit"): 2.0,
    }
    reports = []
    rates = Throughput(sizes, 1e6, lambda *report: reports.append(report), every=2)
    for step in range(1, 5):
        rates.add(step, {name: step * count for name, count in counts.items()}, seconds=0.5 * step)
    (first, _), (second, found) = reports
    assert (first, second) == (2, 4)
    # Steps 3 and 4: seven times the counts in 3.5 seconds.
    language, encoder = 6 * 100 * 350 / 3.5, 2 * 10 * 140 / 3.5
    assert found == pytest.approx({
        "tokens/s": 100.0, "samples/s": 10.0, "images tokens read/s": 40.0, "tones tokens written/s": 8.0,
        "images/vit items/s": 4.0, "language_model TFLOP/s": language / 1e12,
        "images/encoders/vit TFLOP/s": encoder / 1e12,
        "TFLOP/s": (language + encoder) / 1e12, "MFU": (language + encoder) / 1e6,
    })  # fmt: skip


def test_without_a_stated_peak_there_is_no_mfu():
    reports = []
    Throughput({}, None, lambda *report: reports.append(report), every=1).add(
        1, {("positions",): 1.0, ("samples",): 1.0}, 0.5
    )
    ((_, rates),) = reports
    assert rates == {"tokens/s": 2.0, "samples/s": 2.0, "TFLOP/s": 0.0}


def test_peaks_are_those_of_the_data_sheets_times_the_devices(monkeypatch):
    assert stated_peak("NVIDIA H100 80GB HBM3") == stated_peak("NVIDIA H200") == 989.4e12
    assert stated_peak("NVIDIA H100 PCIe") == 756e12
    assert stated_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert stated_peak("cpu") is None
    assert peak_of_all(4, half_precision=False, given_tflops=2.0) == 8e12
    assert peak_of_all(4, half_precision=True) is None  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert peak_of_all(4, half_precision=True) == 4 * 312e12
    assert peak_of_all(4, half_precision=False) is None  # the stated peaks are 16-bit ones


def test_the_last_rank_alone_tells_stdout_tensorboard_and_wandb(monkeypatch, capsys):
    board, wandb = [], []
    # In Megatron's place, which configures logging when it is imported.
    writers = SimpleNamespace(
        get_tensorboard_writer=lambda: SimpleNamespace(add_scalar=lambda *given: board.append(given)),
        get_wandb_writer=lambda: SimpleNamespace(log=lambda values, step: wandb.append((values, step))),
    )
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", writers)
    log_to_megatron(Namespace(rank=0, world_size=2))(7, {"tokens/s": 3.0})
    assert not board and not wandb and capsys.readouterr().out == ""
    log_to_megatron(Namespace(rank=1, world_size=2))(7, {"tokens/s": 3.0})
    assert board == [("throughput/tokens/s", 3.0, 7)] and wandb == [({"throughput/tokens/s": 3.0}, 7)]
    assert "throughput of iterations up to 7 | tokens/s: 3" in capsys.readouterr().out
