"""Gradients of a modality's modules on two tensor-parallel ranks, whatever their parameters are called and marked."""

from itertools import product

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

import megatron_mimo
from megatron_mimo import MimoModel, specs
from megatron_mimo.launch import Run
from tests import tiny
from tests.distributed.harness import case, relayout
from tests.distributed.shards import load_whole_weights, whole_weights

#: What Megatron looks for in names: in `finalize_model_grads`, in its optimizers, in its checkpoints.
NAMES = (
    "q_layernorm", "k_layernorm", "layernorm", "final_layernorm", "router", "experts", "shared_experts",
    "embedding", "word_embeddings", "position_embeddings", "output_layer", "linear_qkv", "mtp",
)  # fmt: skip
# fp32 sums taken in another order, over three layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class Named(nn.Module):
    """`[n, s, PIXELS]` -> `[n, s, 16]` through one replicated linear layer for each of `NAMES`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(tiny.PIXELS, 16)
        self.layers = nn.ModuleDict({name: nn.Linear(16, 16) for name in NAMES})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers.values():
            x = x + layer(x)
        return x


class Block(nn.Module):
    """The same through a layer of Megatron's, which may see its own part of the sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.first = nn.Linear(tiny.PIXELS, config.hidden_size)
        self.block = TransformerBlock(config, specs.language_layer_spec(config))
        self._splits = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(0, 1).contiguous()
        x = self.block(scatter_to_sequence_parallel_region(x) if self._splits else x, None)
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False) if self._splits else x
        return x.transpose(0, 1)


class Marked(nn.Module):
    """Sees whole rows, and has a norm that says otherwise."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.first = nn.Linear(tiny.PIXELS, 16)
        self.norm = specs.norm()(config, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))


def config_of(run: Run, **changes) -> TransformerConfig:
    return tiny.language_config(tensor_model_parallel_size=run.layout.tensor_model_parallel_size, **changes)


def model_of(language: TransformerConfig, encoder: ModuleSpec) -> MimoModel:
    images = tiny.image_spec(encoders={"patches": encoder})
    layers = tiny.language_spec(language)
    audio = tiny.audio_spec()
    return MimoModel(tiny.mimo_config(layers, modality_submodules={"images": images, "audio": audio}))


def gradients_of(model: MimoModel) -> dict[str, Tensor]:
    """Gradients of a batch by name; those in the model are cleared."""
    tiny.total(model, tiny.batch()).backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def gradients_of_a_step(model: MimoModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each rank's backward pass gave, and what is there after Megatron's own `finalize_model_grads`."""
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    outputs, loss_mask = wrapped(**tiny.batch())
    megatron_mimo.total_loss(megatron_mimo.loss_terms(outputs, loss_mask), model.loss_weights).backward()
    alone = {name: one.main_grad.clone() for name, one in model.named_parameters()}
    finalize_model_grads([wrapped])
    return alone, {name: one.main_grad.clone() for name, one in model.named_parameters()}


@case(ranks=2, tensor_model_parallel_size=2)
def replicated_encoders_keep_their_gradients_whatever_their_parameters_are_called(run: Run) -> None:
    for normed, splits in product((False, True), (False, True)):
        language = config_of(run, qk_layernorm=normed, sequence_parallel=splits)
        alone, after = gradients_of_a_step(model_of(language, ModuleSpec(module=Named)))
        names = [name for name in alone if ".encoders.patches." in name]
        assert len(names) == 2 * (len(NAMES) + 1)
        for name in names:
            assert alone[name].abs().max() > 0, name
            torch.testing.assert_close(after[name], alone[name], msg=lambda told, name=name: f"{name}: {told}")


@case(ranks=2)
def norms_of_an_encoder_s_cut_heads_equal_one_rank_whatever_the_language_model_has(run: Run) -> None:
    """Its own query and key norms, and its own split of the sequence, beside a language model with and without."""
    for normed, splits, cut in product((False, True), (False, True), (False, True)):
        run = relayout()
        encoder = {"num_layers": 1, "hidden_size": 16, "qk_layernorm": True, "ffn_hidden_size": 16}
        spec = ModuleSpec(module=Block, params={"config": config_of(run, **encoder)})
        model = model_of(config_of(run, qk_layernorm=normed), spec)
        weights, expected = whole_weights(model), gradients_of(model)

        run = relayout(tensor_model_parallel_size=2)
        spec = ModuleSpec(module=Block, params={"config": config_of(run, **encoder, sequence_parallel=cut)})
        model = model_of(config_of(run, qk_layernorm=normed, sequence_parallel=splits), spec)
        load_whole_weights(model, weights, run.groups.tp)
        _, found = gradients_of_a_step(model)
        whole = [
            name for name, one in model.named_parameters()
            if ".encoders." in name and not getattr(one, "tensor_model_parallel", False)
        ]  # fmt: skip
        assert len([name for name in whole if "q_layernorm" in name or "k_layernorm" in name]) == 4
        for name in whole:
            torch.testing.assert_close(
                found[name], expected[name], **CLOSE,
                msg=lambda told, name=name, of=(normed, splits, cut): f"{name} {of}: {told}",
            )  # fmt: skip


@case(ranks=2, tensor_model_parallel_size=2)
def marks_that_say_something_else_than_the_module_does_are_refused(run: Run) -> None:
    split = config_of(run, sequence_parallel=True, hidden_size=16)
    marked = ModuleSpec(module=Marked, params={"config": split})
    with pytest.raises(ValueError, match=r"images\.encoders\.patches: .*'norm\.weight'.* marked as sequence-parallel"):
        model_of(config_of(run, sequence_parallel=True), marked)

    alone = ProcessGroupCollection.use_mpu_process_groups()
    alone.tp = torch.distributed.new_subgroups(group_size=1)[0]
    layer = ModuleSpec(
        module=ColumnParallelLinear,
        params={
            "input_size": tiny.PIXELS, "output_size": 16, "config": config_of(run), "tp_group": alone.tp,
            "init_method": nn.init.xavier_normal_, "gather_output": True,
        },
    )  # fmt: skip
    with pytest.raises(ValueError, match="ColumnParallelLinear. is cut over 1 tensor-parallel ranks, the .* over 2"):
        model_of(config_of(run), layer)


@case(ranks=2, expert_model_parallel_size=2)
def experts_of_a_modality_that_are_not_those_of_the_run_are_refused(run: Run) -> None:
    experts = {"num_moe_experts": 2, "moe_router_topk": 2, "add_bias_linear": False, "hidden_size": 16}
    config = tiny.language_config(num_layers=1, moe_token_dispatcher_type="alltoall", **experts)
    with pytest.raises(ValueError, match=r"router: .*expert_model_parallel_size=1, the run 2"):
        model_of(tiny.language_config(), ModuleSpec(module=Block, params={"config": config}))
