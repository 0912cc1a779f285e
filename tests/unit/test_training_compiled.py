"""Compiled encoders and layers of a language model are one graph each, which computes what they compute."""

from contextlib import nullcontext

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo import loss_terms, specs, total_loss
from megatron_mimo.attention import CUDNN_FIRST, FusedAttention
from megatron_mimo.training import Trainer, TrainerSettings, TrainingControl
from megatron_mimo.training.parts import compiled
from megatron_mimo.training.parts.compiled import CompiledForward
from tests import tiny
from tests.compiling import compiling, results, vision_transformer


def test_it_is_compiled_in_one_piece_whatever_ddp_hangs_on_its_parts(single_process):
    gathered = []

    def gather(module, *inputs) -> None:
        gathered.append(module)

    gather.__module__ = "megatron.core.distributed.distributed_data_parallel"  # as DDP's own hooks are known
    encoder, images = vision_transformer(tiny.language_config()), torch.randn(3, 3, 8, 8)
    plain = results(encoder, images)
    parts = list(encoder.modules())
    for part in parts:
        part.register_forward_pre_hook(gather)

    with compiling() as graphs:
        encoder.forward = CompiledForward(encoder)
        for _ in range(2):
            gathered.clear()
            torch.testing.assert_close(results(encoder, images), plain)
            assert gathered == [encoder, *parts], "the encoder itself runs its hook too"
    assert len(graphs) == 2, "one forward, one backward"
    assert all(len(part._forward_pre_hooks) == 1 for part in parts)


def language_spec(**changes):
    """The tiny language model with torch's fused attention, whose layers compile in one piece."""
    config = tiny.language_config(num_layers=3, **changes)
    layers = specs.with_fused_attention(specs.language_layer_spec(config, "torch"))
    return tiny.language_spec(config, transformer_layer_spec=layers)


def hybrid_spec(**changes):
    """Attention, MLP, attention, MLP: two kinds of layers."""
    config = tiny.language_config(num_layers=4, **changes)
    return tiny.hybrid_spec(config)


def two_steps(run, language, control: TrainingControl | None, start: dict | None = None) -> tuple[list, dict]:
    """Losses of two steps and the weights before them, which are `start` where it is given."""
    torch.manual_seed(3)
    optimizer = OptimizerConfig(lr=0.05, weight_decay=0.1, clip_grad=1.0)
    trainer = Trainer(
        tiny.mimo_config(language), run, TrainerSettings(steps=2, progress=False), optimizer=optimizer, control=control
    )
    weights = {name: value.clone() for name, value in trainer.models[0].state_dict().items() if value is not None}
    if start is not None:
        trainer.models[0].load_state_dict(start, strict=False)
    return [trainer.train_step(lambda step, rank, size: [tiny.batch(step)]).losses for _ in range(2)], start or weights


@pytest.mark.parametrize("make", [language_spec, hybrid_spec])
@pytest.mark.parametrize("changes", [{}, {"recompute_granularity": "full", "recompute_method": "uniform"}])
def test_layers_that_are_alike_are_compiled_once_and_train_as_before(make, changes, single_process):
    changes = changes | ({"recompute_num_layers": 1} if changes else {})
    plain, start = two_steps(single_process, make(**changes), None)
    control = TrainingControl(compiled=["language_model"])
    with compiling() as graphs:
        losses, _ = two_steps(single_process, make(**changes), control, start)
    for step, expected in zip(losses, plain, strict=True):
        torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-6)
    assert graphs, "something was compiled"
    if make is language_spec and not changes:
        assert len(graphs) == 2, "three layers, one forward and one backward of them"


def test_a_compiled_model_is_evaluated_and_answers_as_it_is(single_process):
    """What attention keeps while a model answers lies outside its layers, and would be compiled anew at each length."""
    model = tiny.megatron_mimo.MimoModel(tiny.mimo_config(language_spec()))
    prompt = {"input_ids": torch.arange(3, 9)}
    expected = model.eval().generate([prompt], 12, modalities=())[0].ids
    with compiling() as graphs:
        compiled.compile_layers(model.language_model)
        assert model.generate([prompt], 12, modalities=())[0].ids == expected
        assert model.train().generate([prompt], 12, modalities=())[0].ids == expected
        assert not graphs
        total_loss(loss_terms(*model(**tiny.batch()))).backward()
        assert len(graphs) == 2, "a training pass is compiled"


def test_layers_of_transformer_engine_are_refused_by_name(single_process):
    class Opaque(torch.nn.Linear):
        pass

    Opaque.__module__ = "transformer_engine.pytorch.module.linear"
    language = tiny.megatron_mimo.MimoModel(tiny.mimo_config()).language_model
    language.decoder.layers[1].mlp.linear_fc1 = Opaque(2, 2)
    before = [layer.forward for layer in language.decoder.layers]
    with pytest.raises(ValueError, match="compiled: 'language_model' has layers of TransformerEngine"):
        compiled.compile_layers(language)
    assert [layer.forward for layer in language.decoder.layers] == before


@pytest.mark.parametrize("option", ["graphed", "own_precision", "evaluating"])
def test_the_language_model_can_be_compiled_alone_of_what_encoders_can(option):
    TrainingControl(compiled=["language_model", "images/encoders"]).check(tiny.mimo_config())
    with pytest.raises(ValueError, match=f"{option}: 'language_model' is no encoder"):
        TrainingControl(**{option: ["language_model"]}).check(tiny.mimo_config())


@pytest.mark.parametrize(
    "capability, cudnn, first",
    [((9, 0), 1, True), ((10, 0), 1, True), ((9, 0), 2, False), ((8, 0), 1, False), (None, 0, False)],
)
def test_fused_attention_asks_for_cudnn_first_where_it_is_the_fastest(
    capability, cudnn, first, single_process, monkeypatch
):
    monkeypatch.setattr("megatron_mimo.attention.cudnn_folders", lambda: ("/folder",) * cudnn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    asked = []

    def ask(backends, set_priority=False):
        asked.append((backends, set_priority))
        return nullcontext()

    monkeypatch.setattr("megatron_mimo.attention.sdpa_kernel", ask)
    core = FusedAttention(tiny.language_config(), 1, None, "self")
    query = torch.randn(5, 2, 4, 8)
    assert core(query, query, query, None).shape == (5, 2, 32)
    assert asked == [(CUDNN_FIRST, True)] * first
