"""Half precision and activation recomputation: the same training, in fewer bits or less memory."""

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.decoders import FlowDecoder
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny

FLOW = dict(width=tiny.HIDDEN, target_width=tiny.PIXELS, hidden_width=32, depth=1)
RECOMPUTE = {
    "none": {},
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
}


def model_config(language: dict, encoder: dict | None = None) -> megatron_mimo.MimoModelConfig:
    """A vision transformer reads, a flow decoder, which draws times and noise, writes."""
    precision = {name: value for name, value in language.items() if name in ("bf16", "fp16", "params_dtype")}
    vit = tiny.language_config(num_layers=2, **precision, **(encoder or {}))
    spec = specs.clip_vit_spec(vit, "torch", patch_dim=4, img_h=8, img_w=8, add_class_token=False)
    images = ModuleSpec(
        module=megatron_mimo.VisionModalitySubmodules,
        submodules=dict(
            encoders={"vit": spec},
            decoders={"flow": ModuleSpec(module=FlowDecoder, params=FLOW)},
        ),
    )
    return megatron_mimo.MimoModelConfig(
        language_model=tiny.language_spec(tiny.language_config(**language)),
        modality_submodules={"images": images},
        special_token_ids={"images": tiny.READ},
        generation_token_ids={"images": tiny.WRITE},
    )


def batches(step: int, rank: int, size: int) -> list[dict]:
    batch = tiny.batch(step)
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] != tiny.HEAR, 1)
    draw = torch.Generator().manual_seed(step)
    batch["modality_inputs"] = {"images": {"vit": {"images": torch.randn(1, 3, 8, 8, generator=draw)}}}
    target = batch["modality_targets"]["images"]["pixels"]["pixels"]
    batch["modality_targets"] = {"images": {"flow": {"target": target}}}
    return [batch]


def one_batch(step: int, rank: int, size: int) -> list[dict]:
    return batches(0, rank, size)


def trainer(run, config, **optimizer) -> Trainer:
    settings = TrainerSettings(steps=20, decay="constant", progress=False)
    return Trainer(config, run, settings, optimizer=OptimizerConfig(**{"lr": 1e-2, **optimizer}))


def weights(ours: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in ours.models[0].named_parameters()}


BF16 = dict(bf16=True, params_dtype=torch.bfloat16)
FP16 = dict(fp16=True, params_dtype=torch.float16)


@pytest.mark.parametrize("precision", [BF16, FP16], ids=["bf16", "fp16"])
def test_half_precision_trains_in_it_close_to_float32(precision, single_process):
    half = trainer(single_process, model_config(precision), initial_loss_scale=2.0**8)
    whole = trainer(single_process, model_config({}))
    whole.models[0].load_state_dict(weights(half))
    assert {p.dtype for p in half.models[0].parameters()} == {precision["params_dtype"]}
    reports = [(half.train_step(one_batch), whole.train_step(one_batch)) for _ in range(20)]
    assert not any(report.skipped for report, _ in reports)
    for ours, theirs in reports[:3]:
        # Two or three digits; the flow's squared error of few elements is the farthest off.
        assert ours.losses == pytest.approx(theirs.losses, rel=3e-2)
    assert reports[-1][0].losses["loss"] < 0.9 * reports[0][0].losses["loss"]


def test_step_that_overflows_is_skipped_and_reported_and_the_scale_comes_down(single_process):
    ours = trainer(single_process, model_config(FP16), initial_loss_scale=2.0**24, hysteresis=1)
    before = weights(ours)
    report = ours.train_step(batches)
    assert report.skipped and ours.steps_done == 1
    assert all(after.equal(before[name]) for name, after in weights(ours).items())
    assert ours.optimizer.get_loss_scale().item() == 2.0**23
    assert ours.schedule.num_steps == 0
    assert report.losses["loss"] == pytest.approx(4.16 + 2, rel=0.5)  # not scaled
    reports = [ours.train_step(batches) for _ in range(18)]
    assert not reports[-1].skipped
    assert any(not after.equal(before[name]) for name, after in weights(ours).items())


def same_numbers() -> None:
    """Dropout and the draws that follow are the same each time."""
    torch.manual_seed(7)
    start = torch.get_rng_state()
    get_cuda_rng_tracker().set_states({name: start.clone() for name in get_cuda_rng_tracker().get_states()})


def one_step(run, initial: dict | None, language: str, encoder: str) -> tuple[dict, dict, dict[str, int]]:
    """Weights before, gradients of, and calls of some modules in one step, with dropout."""
    dropout = dict(hidden_dropout=0.1, attention_dropout=0.1)
    config = model_config({**dropout, **RECOMPUTE[language]}, {**dropout, **RECOMPUTE[encoder]})
    ours = trainer(run, config)
    if initial is not None:
        ours.models[0].load_state_dict(initial)
    before, calls = weights(ours), {}
    stacks = {
        "language": ours.models[0].language_model.decoder,
        "encoder": ours.models[0].modality_submodules["images"].encoders["vit"].decoder,
    }
    for name, stack in stacks.items():
        for part, module in (("mlp", stack.layers[0].mlp), ("core", stack.layers[0].self_attention.core_attention)):
            key = f"{name} {part}"
            calls[key] = 0
            module.register_forward_hook(lambda *_, key=key: calls.__setitem__(key, calls[key] + 1))
    same_numbers()
    losses = ours.train_step(batches).losses
    gradients = {name: p.main_grad.clone() for name, p in ours.models[0].named_parameters()}
    return before, {**gradients, "losses": torch.tensor([losses["text"], losses["images/flow"]])}, calls


@pytest.mark.parametrize(
    ("language", "encoder"),
    [("full", "none"), ("selective", "none"), ("none", "full"), ("none", "selective"), ("full", "full")],
)
def test_recomputation_gives_the_same_gradients_dropout_and_draws_included(language, encoder, single_process):
    initial, expected, once = one_step(single_process, None, "none", "none")
    _, found, calls = one_step(single_process, initial, language, encoder)
    assert set(once.values()) == {1}
    again = {"none": (1, 1), "full": (2, 2), "selective": (1, 2)}
    assert (calls["language mlp"], calls["language core"]) == again[language]
    assert (calls["encoder mlp"], calls["encoder core"]) == again[encoder]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=lambda m: f"{name}: {m}")
    assert any(gradient.any() for name, gradient in expected.items() if "encoders" in name)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [BF16, FP16], ids=["bf16", "fp16"])
def test_half_precision_trains_on_a_gpu(precision, no_run):
    run = megatron_mimo.initialize(seed=1)
    ours = trainer(run, model_config(precision), initial_loss_scale=2.0**8)
    reports = [ours.train_step(one_batch) for _ in range(20)]
    assert {p.device.type for p in ours.models[0].parameters()} == {"cuda"}
    assert not any(report.skipped for report in reports)
    assert reports[-1].losses["loss"] < 0.9 * reports[0].losses["loss"]
