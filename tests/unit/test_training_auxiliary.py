"""Losses that Megatron's layers add by themselves weigh what their coefficients say, and are reported by name."""

import gc
import weakref

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo import specs
from megatron_mimo.training import Trainer, TrainerSettings
from megatron_mimo.training.auxiliary import names_of
from tests import tiny

LENGTH = 20
AUX = dict(moe_aux_loss_coeff=1.0)
Z = dict(moe_z_loss_coeff=1.0)
EXPERTS = dict(num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="allgather", add_bias_linear=False)


def text_config(per_token: bool, **changes):
    config = tiny.language_config(calculate_per_token_loss=per_token, **changes)
    language = tiny.language_spec(config)
    if config.mtp_num_layers:
        layers = specs.language_layer_spec(config)
        language.params["mtp_block_spec"] = get_gpt_mtp_block_spec(
            config,
            layers.submodules.layer_specs[-1] if hasattr(layers.submodules, "layer_specs") else layers,
            use_transformer_engine=False,
        )
    return tiny.mimo_config(
        language, modality_submodules={}, special_token_ids={}, generation_token_ids={}, modality_loss_weights={}
    )


def step(run, per_token: bool, batches: list[dict], **changes) -> tuple[Trainer, dict]:
    """A trainer after one step that moved nothing, and what it reported."""
    precision = dict(initial_loss_scale=8.0) if changes.get("fp16") else {}
    ours = Trainer(
        text_config(per_token, **changes),
        run,
        TrainerSettings(steps=1, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=0.0, weight_decay=0.0, clip_grad=0.0, **precision),
    )
    draw = torch.Generator().manual_seed(3)
    weights = {
        name: 0.2 * torch.randn(p.shape, generator=draw).to(p.dtype) for name, p in ours.models[0].named_parameters()
    }
    ours.models[0].load_state_dict(weights, strict=False)
    return ours, ours.train_step(lambda *_: batches)


def batches(count: int, learned: int, rows: int = 1, padded: int = 0) -> list[dict]:
    draw = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(0, tiny.VOCABULARY, (rows, LENGTH), generator=draw)
        mask = torch.zeros(rows * LENGTH)
        mask[:learned] = 1.0
        found.append(dict(input_ids=ids, labels=ids.roll(-1, 1), loss_mask=mask.view(rows, LENGTH)))
        if padded:
            found[-1]["padding_mask"] = (torch.arange(LENGTH) >= LENGTH - padded).expand(rows, -1).contiguous()
    return found


def gradients(ours: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.main_grad.clone() for name, p in ours.models[0].named_parameters()}


CASES = {
    "some learned": dict(count=1, learned=10, rows=3),
    "18 of 20 masked": dict(count=1, learned=2),
    "nothing learned": dict(count=1, learned=0),
    "several microbatches": dict(count=3, learned=4, rows=2),
    "padding": dict(count=2, learned=5, rows=2, padded=4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("losses", [AUX, Z, {**AUX, **Z}], ids=["aux", "z", "both"])
def test_losses_of_experts_weigh_alike_with_and_without_loss_per_token(losses, case, single_process):
    found, expected = (
        gradients(step(single_process, per_token, batches(**CASES[case]), **EXPERTS, **losses)[0])
        for per_token in (True, False)
    )
    routers = [name for name in found if "router" in name]
    assert routers and all(expected[name].abs().max() > 1e-4 for name in routers)
    for name in found:
        # The same sums, divided before or after they are added up.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_losses_of_experts_have_fp16_s_loss_scale(single_process):
    half = dict(fp16=True, params_dtype=torch.float16)
    found, single = (
        gradients(step(single_process, True, batches(1, 2), **EXPERTS, **AUX, **precision)[0])
        for precision in (half, {})
    )
    for name in (name for name in found if "router" in name):
        ratio = (found[name] * single[name]).sum() / single[name].square().sum()
        assert ratio.item() == pytest.approx(8.0, rel=2e-2), name  # fp16 keeps 11 bits, over two layers


@pytest.mark.parametrize("weight", [1.0, 0.5], ids=["masks", "weights"])
@pytest.mark.parametrize("case", ["some learned", "18 of 20 masked", "several microbatches"])
def test_multi_token_prediction_weighs_alike_with_and_without_loss_per_token(case, weight, single_process):
    given = batches(**CASES[case])
    for batch in given:
        batch["loss_mask"] *= weight
    found, expected = (
        gradients(step(single_process, per_token, given, mtp_num_layers=1)[0]) for per_token in (True, False)
    )
    predicts = [name for name in found if ".mtp." in name]
    assert predicts and any(expected[name].abs().max() > 1e-4 for name in predicts)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_function_of_the_user_s_own_scales_multi_token_prediction(single_process):
    ours, _ = step(single_process, True, batches(1, 2), mtp_num_layers=1, mtp_grad_scale_func=lambda: 0.0)
    found = gradients(ours)
    assert all(not found[name].any() for name in found if ".mtp." in name)


def test_losses_of_experts_are_reported_by_name_afresh_each_step(single_process):
    given = batches(2, 4)
    ours, first = step(single_process, True, given, **EXPERTS, **AUX, **Z)
    assert set(first.losses) == {"text", "loss", "load_balancing_loss", "z_loss"}
    # One is the least that balancing can be: experts used as evenly as they are chosen.
    assert first.losses["load_balancing_loss"] == pytest.approx(1.0, abs=0.2) and first.losses["z_loss"] > 0
    again = ours.train_step(lambda *_: given)
    assert dict(again.losses) == pytest.approx(dict(first.losses))


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_a_trained_model_with_experts_is_freed(dispatcher, single_process):
    ours, _ = step(single_process, True, batches(1, 4), **{**EXPERTS, **AUX, "moe_token_dispatcher_type": dispatcher})
    model = weakref.ref(ours.models[0])
    del ours
    gc.collect()
    assert model() is None


def test_losses_of_experts_are_each_model_s_own_whatever_layers_another_in_the_process_has(single_process):
    given = batches(1, 4)
    small, large = ({**EXPERTS, **AUX, **Z, "num_layers": layers} for layers in (1, 3))
    ours, alone = step(single_process, True, given, **large)
    _, other = step(single_process, True, given, **small)
    again = ours.train_step(lambda *_: given)
    assert dict(again.losses) == pytest.approx(dict(alone.losses))
    assert other.losses["z_loss"] != pytest.approx(alone.losses["z_loss"])


def test_models_of_other_numbers_of_predicted_tokens_train_and_evaluate_beside_each_other(single_process):
    given = batches(1, 4)
    one, first = step(single_process, True, given, mtp_num_layers=1)
    two, _ = step(single_process, True, given, mtp_num_layers=2)
    three = Trainer(text_config(True, mtp_num_layers=3), single_process, TrainerSettings(steps=1, progress=False))
    assert three.evaluate(lambda *_: given)["text"] > 0
    assert one.evaluate(lambda *_: given)["text"] == pytest.approx(first.losses["text"], rel=1e-5)
    again = one.train_step(lambda *_: given)
    assert dict(again.losses) == pytest.approx(dict(first.losses))
    assert two.train_step(lambda *_: given).losses["text"] > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({**EXPERTS}, []),
        ({**EXPERTS, **Z}, ["z_loss"]),
        (
            dict(
                **EXPERTS,
                moe_router_load_balancing_type=["seq_aux_loss", "global_aux_loss"],
                moe_aux_loss_coeff=[0.1, 0.1],
            ),
            ["seq_load_balancing_loss", "global_load_balancing_loss"],
        ),
    ],
    ids=["no experts", "no coefficients", "z", "two kinds"],
)
def test_names_are_those_of_the_losses_that_have_coefficients(changes, expected):
    assert names_of(tiny.language_config(**changes)) == expected
