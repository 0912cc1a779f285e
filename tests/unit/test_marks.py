"""What Megatron does to a modality's modules by the language model's configuration; gradients: cases/marks.py."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.quantization.quant_config import RecipeConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_mimo import MimoModel, specs
from megatron_mimo.modality.marks import check_orthogonalized
from megatron_mimo.training import Trainer, TrainerSettings
from megatron_mimo.training.pretraining.session import Session
from tests import tiny


class Layer(nn.Linear):
    """What TransformerEngine's layers have of it: weights kept from microbatch to microbatch, told by a flag."""

    def __init__(self) -> None:
        super().__init__(tiny.PIXELS, 16)
        self.is_first_microbatch = True
        self.seen: list[bool] = []
        self.told: list[Any] = ["as built"]
        self.kept = self.weight.detach().clone()

    def finish_init(self, quantization_config) -> None:
        self.told.append(quantization_config)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.is_first_microbatch)
        if self.is_first_microbatch:
            self.kept = self.weight.detach().clone()
        self.is_first_microbatch = False
        return nn.functional.linear(x, self.weight, self.bias)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


class Block(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.block = TransformerBlock(config, specs.language_layer_spec(config))


class Biased(nn.Module):
    """No expert anywhere: a parameter is called so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(tiny.PIXELS, 16)
        self.expert_bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.expert_bias


def config_of(encoder: ModuleSpec, **language):
    images = tiny.image_spec(encoders={"patches": encoder})
    spec = tiny.language_spec(tiny.language_config(**language))
    return tiny.mimo_config(spec, modality_submodules={"images": images, "audio": tiny.audio_spec()})


def layer_of(model: MimoModel) -> Layer:
    return model.modality_submodules["images"].encoders["patches"].layers[0]


# Quantization


def recipe(pattern: str) -> RecipeConfig:
    matcher = {"config": "eight", "type": "glob", "pattern": pattern, "enabled": True}
    return RecipeConfig.from_config_dict({"configs": {"eight": {"bits": 8}}, "matchers": {"one": matcher}})


def test_a_recipe_reaches_modality_modules_by_their_own_names(single_process):
    model = MimoModel(config_of(ModuleSpec(module=Encoder), quant_recipe=recipe("modality_submodules.images.*")))
    _, told = layer_of(model).told
    assert told.config == {"bits": 8}
    assert told.match_input.module_path == "modality_submodules.images.encoders.patches.layers.0"
    assert told.match_input.layer_number == 0


def test_modules_that_a_recipe_does_not_name_keep_what_they_were_built_with(single_process):
    for quant_recipe in (None, recipe("decoder.*"), recipe("language_model.*"), recipe("encoders.*")):
        model = MimoModel(config_of(ModuleSpec(module=Encoder), quant_recipe=quant_recipe))
        assert layer_of(model).told == ["as built"]


def test_the_language_model_is_given_its_recipe_once(single_process, monkeypatch):
    told: list[object] = []
    monkeypatch.setattr(
        "megatron.core.tensor_parallel.VocabParallelEmbedding.finish_init", lambda self, one: told.append(one),
        raising=False,
    )  # fmt: skip
    MimoModel(config_of(ModuleSpec(module=Encoder), quant_recipe=recipe("*")))
    assert len(told) == 1


def test_kept_weights_of_a_modality_are_made_anew_in_the_first_microbatch_of_each_step(single_process):
    """Beside a language model without fp8, whose configuration is all that Megatron's wrappers ask."""
    config = config_of(ModuleSpec(module=Encoder))
    trainer = Trainer(config, single_process, TrainerSettings(steps=2))
    layer = layer_of(trainer.models[0])
    used = []
    layer.register_forward_hook(lambda *_: used.append(torch.equal(layer.kept, layer.weight)))
    trainer.train(lambda step, rank, size: [tiny.batch(seed) for seed in range(3)])
    assert layer.seen == [True, False, False] * 2
    assert all(used)
    trainer.evaluate(lambda step, rank, size: [tiny.batch()])
    assert layer.seen[-1] and used[-1]


# Experts


EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}
BIAS = {
    "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid",
    "moe_router_load_balancing_type": "none", "moe_router_dtype": "fp32",
}  # fmt: skip


def experts_of_a_modality(**changes) -> ModuleSpec:
    return ModuleSpec(module=Block, params={"config": tiny.language_config(num_layers=1, **EXPERTS, **changes)})


@pytest.mark.parametrize("encoder", [ModuleSpec(module=Biased), experts_of_a_modality(), experts_of_a_modality(**BIAS)])
def test_an_expert_bias_beside_the_language_models_is_refused(single_process, encoder):
    with pytest.raises(ValueError, match=r"modality_submodules\.images\.encoders\.patches.* has an expert_bias beside"):
        MimoModel(config_of(encoder, **EXPERTS, **BIAS))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (BIAS, "moe_router_enable_expert_bias=True"),
        ({"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1}, "'global_aux_loss'"),
        ({"moe_router_load_balancing_type": "quantile_balancing"}, "'quantile_balancing'"),
    ],
    ids=["bias", "global", "quantile"],
)
def test_a_balance_that_only_the_language_models_configuration_would_keep_is_refused(single_process, changes, said):
    with pytest.raises(ValueError, match=f"router.*has .*{said}, which Megatron keeps at the end of a step"):
        MimoModel(config_of(experts_of_a_modality(**changes)))


def test_a_parameter_of_that_name_is_fine_beside_a_language_model_without(single_process):
    model = MimoModel(config_of(ModuleSpec(module=Biased)))
    tiny.total(model, tiny.batch()).backward()
    assert model.modality_submodules["images"].encoders["patches"].expert_bias.grad.abs().sum() > 0


# Optimizers


def test_muon_is_refused_beside_trainable_attention_of_other_heads(single_process):
    encoder = nn.ModuleDict({"images": Block(tiny.language_config(num_layers=1, num_attention_heads=2))})
    language = tiny.language_config()
    with pytest.raises(ValueError, match=r"images\.block\.layers\.0\.\w+\.linear_qkv has .*\(1, 16, False\)"):
        check_orthogonalized(encoder, language, "dist_muon")
    check_orthogonalized(encoder, language, "adam")
    check_orthogonalized(nn.ModuleDict({"images": Block(tiny.language_config(num_layers=1))}), language, "muon")
    check_orthogonalized(encoder.requires_grad_(False), language, "muon")


class OtherHeads(Block):
    def __init__(self) -> None:
        super().__init__(tiny.language_config(num_layers=1, num_attention_heads=2))


def test_both_loops_refuse_muon_beside_trainable_attention_of_other_heads(single_process):
    message = r"optimizer 'muon': modality_submodules\.images\.encoders\.patches\.\S+\.linear_qkv has"
    config = config_of(ModuleSpec(module=OtherHeads))
    with pytest.raises(ValueError, match=message):
        Trainer(config, single_process, TrainerSettings(steps=1), optimizer=OptimizerConfig(optimizer="muon", lr=0.1))
    session = Session(Namespace(optimizer="muon", virtual_pipeline_model_parallel_size=None))
    with pytest.raises(ValueError, match=message):
        session.built(MimoModel(config))
