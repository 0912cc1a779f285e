"""fp8 of the language model: when weights are made anew, what is refused before any work (GPU: test_fp8_gpu.py)."""

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo import MimoModel, specs
from megatron_mimo.fp8 import check_fp8_rows, check_fp8_widths
from megatron_mimo.generation import rescore
from megatron_mimo.training import StepGraphs, Trainer, TrainerSettings
from megatron_mimo.training.parts import whole_step
from tests import tiny
from tests.generating import prompts
from tests.unit.test_marks import Encoder, layer_of


class Kept(ColumnParallelLinear):
    """What TransformerEngine's layers have of it: weights kept from microbatch to microbatch, told by a flag."""

    def __init__(self, *args, **keywords) -> None:
        super().__init__(*args, **keywords)
        self.is_first_microbatch = True
        self.seen: list[bool] = []
        self.kept = self.weight.detach().clone()

    def forward(self, *args, **keywords):
        if self.is_first_microbatch:
            self.kept = self.weight.detach().clone()
        self.seen.append(self.is_first_microbatch)
        self.is_first_microbatch = False
        return super().forward(*args, **keywords)


def layers(config, vp_stage=None):
    spec = specs.language_layer_spec(config, "torch")
    for layer in spec.submodules.layer_specs:
        layer.submodules.self_attention.submodules.linear_qkv = Kept
    return spec


def config_of(layers=layers, **changes):
    language = tiny.language_config(**{"fp8": "hybrid", "fp8_recipe": "tensorwise", **changes})
    spec = tiny.language_spec(language, transformer_layer_spec=layers)
    images = tiny.image_spec(encoders={"patches": ModuleSpec(module=Encoder)})
    return tiny.mimo_config(spec, modality_submodules={"images": images, "audio": tiny.audio_spec()})


def kept_of(model: MimoModel) -> list:
    return [*(module for module in model.modules() if isinstance(module, Kept)), layer_of(model)]


def currents(model: MimoModel) -> list[list[bool]]:
    """Whether each pass of each layer from now on has the weights of now."""
    found: list[list[bool]] = []
    for layer in kept_of(model):
        passes: list[bool] = []
        layer.register_forward_hook(
            lambda layer, *_, passes=passes: passes.append(torch.equal(layer.kept, layer.weight))
        )
        found.append(passes)
    return found


# Weights made anew


def test_each_step_makes_weights_anew_once_in_the_language_model_and_in_encoders(single_process):
    trainer = Trainer(config_of(), single_process, TrainerSettings(steps=2))
    layers = kept_of(trainer.models[0])
    assert len(layers) == 3
    trainer.train(lambda step, rank, size: [tiny.batch(seed) for seed in range(3)])
    assert [layer.seen for layer in layers] == [[True, False, False] * 2] * 3
    trainer.evaluate(lambda step, rank, size: [tiny.batch()])
    assert all(layer.seen[-1] for layer in layers)


def test_an_encoder_without_inputs_in_the_first_microbatch_makes_them_anew_in_its_own_first(single_process):
    """What stands in for an absent modality runs no encoder: the flag waits for the first that does."""
    trainer = Trainer(config_of(), single_process, TrainerSettings(steps=1))
    words = tiny.batch(1)
    words["input_ids"] = words["input_ids"].masked_fill(words["input_ids"] == tiny.READ, 1)
    del words["modality_inputs"]["images"]
    trainer.train(lambda step, rank, size: [words, tiny.batch(2), tiny.batch(3)])
    language, _, encoder = kept_of(trainer.models[0])
    assert language.seen == [True, False, False]
    assert encoder.seen == [True, False]


def test_generation_between_steps_and_what_is_scored_after_it_have_the_weights_of_now(single_process):
    trainer = Trainer(config_of(), single_process, TrainerSettings(steps=2))
    model = trainer.models[0]
    current = currents(model)
    data = lambda step, rank, size: [tiny.batch(seed) for seed in range(2)]  # noqa: E731
    trainer.train_step(data)
    model.generate(prompts(), 2, modalities=(), rescore=True)
    with torch.no_grad():
        model(**tiny.batch())
    assert all(all(found) for found in current)
    trainer.train_step(data)
    with torch.no_grad():
        model(**tiny.batch())  # a pass of one's own has to ask: the check sees what it shall see
    assert [found[-1] for found in current] == [False] * 3
    model.set_is_first_microbatch()
    with torch.no_grad():
        model(**tiny.batch())
    assert [found[-1] for found in current] == [True] * 3


def test_what_is_scored_after_generation_is_padded_to_what_fp8_multiplies(single_process, monkeypatch):
    model = MimoModel(config_of())
    shapes = []
    monkeypatch.setattr(
        rescore, "_losses", lambda *args, **_: shapes.append(args[2].ids.shape) or torch.zeros(args[2].ids.shape)
    )
    model.generate(prompts(), 2, modalities=(), rescore=True)
    assert shapes and all(length % 16 == 0 for _, length in shapes)


# Refused before any work


def test_a_batch_whose_rows_fp8_cannot_multiply_is_refused_before_an_encoder_runs(single_process):
    trainer = Trainer(config_of(), single_process, TrainerSettings(steps=1))
    layers = kept_of(trainer.models[0])
    short = {name: value[:, :15] for name, value in tiny.batch().items() if isinstance(value, torch.Tensor)}
    short["input_ids"] = short["input_ids"].clamp(0, 59)
    with pytest.raises(ValueError, match=r"fp8='hybrid': expected B \* S that is a multiple of 16 .* found 45"):
        trainer.train(lambda step, rank, size: [short])
    with pytest.raises(ValueError, match="found 45"):
        trainer.models[0](**short)
    assert not any(layer.seen for layer in layers)


@pytest.mark.parametrize(
    ("changes", "context", "multiple"),
    [
        ({}, 1, 16),
        ({}, 2, 32),
        ({"fp8_recipe": "blockwise"}, 1, 16),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 1, 16),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "fp8_recipe": "blockwise"}, 2, 512),
    ],
)
def test_the_multiple_is_of_what_a_rank_multiplies(changes, context, multiple):
    config = tiny.language_config(**{"fp8": "hybrid", "fp8_recipe": "delayed", **changes})
    check_fp8_rows(3 * multiple, config, context)
    with pytest.raises(ValueError, match=f"a multiple of {multiple} .* found {3 * multiple + multiple // 2}"):
        check_fp8_rows(3 * multiple + multiple // 2, config, context)
    check_fp8_rows(7, tiny.language_config(), context)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 40, "kv_channels": 16}, "hidden_size = 40$"),
        ({"ffn_hidden_size": 72}, "ffn_hidden_size / .* = 72$"),
        ({"ffn_hidden_size": 48, "tensor_model_parallel_size": 2}, "ffn_hidden_size / .* = 24$"),
        ({"kv_channels": 6, "num_attention_heads": 4}, "num_attention_heads .* = 24, num_query_groups .* = 24$"),
    ],
)
def test_widths_that_fp8_cannot_multiply_are_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=f"multiples of 16, found {said[:-1]}\\. Change"):
        check_fp8_widths(tiny.language_config(fp8="e4m3", **changes))
    check_fp8_widths(tiny.language_config(**changes))


def test_layers_in_plain_torch_are_refused_where_fp8_is_asked_for(single_process):
    plain = lambda config, vp_stage=None: specs.language_layer_spec(config, "torch")  # noqa: E731
    with pytest.raises(ValueError, match="fp8='hybrid' needs layers of TransformerEngine"):
        MimoModel(config_of(plain))
    MimoModel(config_of(plain, fp8=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fp8_recipe": "delayed"}, r"fp8_recipe in \('tensorwise', 'blockwise'\)"),
        ({"fp8_param": True}, "fp8_param=False"),
    ],
)
def test_what_no_replay_is_right_with_is_refused_by_name(single_process, monkeypatch, changes, said):
    monkeypatch.setattr(whole_step, "_check_gpu", lambda run: None)
    with pytest.raises(ValueError, match=f"one CUDA graph .*{said}"):
        Trainer(config_of(**changes), single_process, TrainerSettings(steps=1), graphs=StepGraphs())


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_recipes_whose_replays_are_right_are_not_refused(single_process, monkeypatch, recipe):
    monkeypatch.setattr(whole_step, "_check_gpu", lambda run: None)
    with pytest.raises(ValueError, match="graph_safe_rng") as raised:
        Trainer(config_of(fp8_recipe=recipe), single_process, TrainerSettings(steps=1), graphs=StepGraphs())
    assert "fp8" not in str(raised.value)
