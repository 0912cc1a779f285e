"""The language model of a layout, with the images that it reads and writes."""

from dataclasses import dataclass, field

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_mimo import specs
from megatron_mimo.launch import Run
from tests import tiny


@dataclass(frozen=True)
class Setting:
    """What a layout asks of model and optimizer, beside its parallel sizes."""

    sequence_parallel: bool = False
    tied: bool = False
    experts: int | None = None
    pattern: str | None = None  # of a HybridModel's four layers; None: GPTModel
    token_local: bool = False
    distributed_optimizer: bool = False
    per_token: bool = True
    stages: dict[str, object] = field(default_factory=dict)  # how layers are dealt out to pipeline stages

    def spec(self, run: Run | None) -> ModuleSpec:
        """The language model's spec; for one rank without `run`."""
        layout = None if run is None else run.layout
        sizes = {} if layout is None else dict(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
            context_parallel_size=layout.context_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            sequence_parallel=self.sequence_parallel,
            **self.stages,
        )  # fmt: skip
        if layout is not None and layout.virtual_pipeline_model_parallel_size:
            sizes |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        experts = {} if self.experts is None else dict(
            num_moe_experts=self.experts,
            moe_router_topk=2,
            moe_token_dispatcher_type="alltoall",
            moe_aux_loss_coeff=0.0,
            moe_router_load_balancing_type="none",
            add_bias_linear=False,
        )  # fmt: skip
        config = tiny.language_config(
            num_layers=4,
            pipeline_dtype=torch.float32,
            calculate_per_token_loss=self.per_token,
            **sizes,
            **experts,
        )
        if self.pattern is not None:
            return tiny.hybrid_spec(config, self.pattern, share_embeddings_and_output_weights=self.tied)
        changes = {"share_embeddings_and_output_weights": self.tied}
        if self.token_local:
            changes |= {"transformer_layer_spec": token_local_stage, "position_embedding_type": "none"}
        return tiny.language_spec(config, **changes)

    def images(self, run: Run | None) -> ModuleSpec:
        """Two encoders, each with a tensor-parallel projector, and a decoder."""
        size = 1 if run is None else run.layout.tensor_model_parallel_size
        config = tiny.language_config(num_layers=1, tensor_model_parallel_size=size)
        projector = ModuleSpec(
            module=MultimodalProjector,
            params=dict(
                config=config,
                submodules=specs.projection_spec(config).submodules,
                projector_type="mlp",
                input_size=16,
            ),
        )
        encoder = ModuleSpec(module=tiny.PatchEncoder)
        return tiny.image_spec(
            encoders={"patches": encoder, "strokes": encoder}, input_projections=[projector, projector]
        )

    def mimo_config(self, run: Run | None):
        """The whole model's configuration; for one rank without `run`."""
        return tiny.mimo_config(
            self.spec(run), modality_submodules={"images": self.images(run), "audio": tiny.audio_spec()}
        )


def token_local_layers(count: int, experts: TransformerConfig | None = None) -> ModuleSpec:
    """Layers without attention: what context parallelism can run without TransformerEngine.

    Args:
        count: how many.
        experts: a configuration with experts, which these layers then have.
    """
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    if experts is not None:
        mlp = specs.language_layer_spec(experts).submodules.layer_specs[0].submodules.mlp
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=specs.norm("torch"), mlp=mlp, mlp_bda=get_bias_dropout_add
        ),
    )
    block = TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=specs.norm("torch"))
    return ModuleSpec(module=TransformerBlock, submodules=block)


def token_local_stage(config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None) -> ModuleSpec:
    """`token_local_layers` of one chunk of a model, all of whose chunks have as many."""
    del vp_stage, pp_rank
    chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    return token_local_layers(config.num_layers // chunks, config if config.num_moe_experts else None)
