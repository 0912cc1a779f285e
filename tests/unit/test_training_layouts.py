"""Layouts that cannot work are refused before any process group is built, naming the argument to change."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_mimo import specs
from megatron_mimo.launch import Layout, pretended
from megatron_mimo.training import TrainingControl, check_layout
from megatron_mimo.training.chunks import build_chunks
from tests import tiny


@pytest.fixture
def no_process_group(no_run):
    """A process without torch.distributed, which it still is afterwards."""
    assert not dist.is_initialized()
    yield
    assert not dist.is_initialized()


# Modalities without decoders.
READS = dict(
    generation_token_ids={},
    modality_submodules={"images": tiny.image_spec(decoders={}, output_projections=[]), "audio": tiny.audio_spec()},
)


def refused(
    message: str, layout: dict, length: int | None = None, writes: bool = True, language: dict | None = None, **config
):
    """Expects the refusal of a model whose configuration has the layout's sizes and `config`."""
    sizes = {name: size for name, size in layout.items() if not name.startswith("expert_tensor")}
    sizes |= {"pipeline_dtype": torch.float32} if "pipeline_model_parallel_size" in sizes else {}
    model = tiny.mimo_config(
        tiny.language_spec(tiny.language_config(**{**sizes, **config}), **(language or {})),
        **({} if writes else READS),
    )
    world = 1
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        world *= layout.get(name, 1)
    arguments = {"world_size": max(world, layout.get("expert_model_parallel_size", 1)), **layout}
    if not message:
        check_layout(Layout(**arguments), model, length)
        return
    with pytest.raises(ValueError, match=message):
        check_layout(Layout(**arguments), model, length)


TP, PP, CP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
NO_LAYER_LAST = {PP: 2}, dict(num_layers=1, account_for_loss_in_pipeline_split=True)


def test_decoder_without_a_layer_on_the_last_stage_is_refused(no_process_group):
    layout, config = NO_LAYER_LAST
    refused(r"decoders of \['images'\] have no room there.*Lower pipeline_model_parallel_size", layout, **config)


def test_a_custom_layout_without_a_layer_on_the_last_stage_is_refused(no_process_group):
    stages = [["embedding", "decoder", "decoder"], ["loss"]]
    refused(
        "give the last stage a layer .*pipeline_model_parallel_layout", {PP: 2}, pipeline_model_parallel_layout=stages
    )


def test_a_model_that_writes_nothing_needs_no_layer_on_the_last_stage(no_process_group):
    layout, config = NO_LAYER_LAST
    refused("", layout, writes=False, **config)


def test_layers_that_the_stages_do_not_share_out_are_refused(no_process_group):
    refused("pipeline_model_parallel_size 3 .*2 layers.*num_layers_in_first_pipeline_stage", {PP: 3})


@pytest.mark.parametrize(
    ("layout", "config", "length", "parts"),
    [
        ({TP: 2}, dict(sequence_parallel=True), 15, 2),
        ({CP: 2}, {}, 18, 4),
        ({TP: 2, CP: 2}, dict(sequence_parallel=True), 18, 4),
    ],
)
def test_sequence_lengths_that_cannot_be_shared_out_are_refused(layout, config, length, parts, no_process_group):
    from tests.distributed.setting import token_local_layers

    language = dict(transformer_layer_spec=token_local_layers(2), position_embedding_type="none")
    message = f"multiple of {parts} .context_parallel_size.*tensor_model_parallel_size.*found {length}.*seq_length"
    refused(message, layout, length, language=language, **config)
    refused("", layout, 4 * parts, language=language, **config)


def test_an_odd_length_is_fine_without_sequence_parallelism(no_process_group):
    refused("", {TP: 2}, 15)


def test_context_parallelism_with_local_attention_is_refused(no_process_group):
    layers = {"transformer_layer_spec": specs.language_layer_spec(tiny.language_config(), "torch")}
    for language in ({}, layers):  # given as a function and as its result
        refused("context_parallel_size 2.*DotProductAttention.*TransformerEngine", {CP: 2}, language=language)


def test_media_that_see_the_whole_of_themselves_are_refused_on_shards_of_the_sequence(no_process_group):
    model = tiny.mimo_config(tiny.language_spec(tiny.language_config(context_parallel_size=2)), whole_spans={"images"})
    message = r"\['images'\] have media spans that see the whole of themselves, expected none under context parallelism"
    with pytest.raises(ValueError, match=message):
        check_layout(Layout(2, context_parallel_size=2), model)
    check_layout(Layout(1), tiny.mimo_config(whole_spans={"images"}))


def test_expert_parallelism_without_experts_is_refused(no_process_group):
    # Megatron's configuration refuses it too; one that was changed afterwards comes here.
    config = tiny.language_config()
    config.expert_model_parallel_size = 2
    model = tiny.mimo_config(tiny.language_spec(config))
    with pytest.raises(ValueError, match="expert_model_parallel_size 2 .*num_moe_experts is None"):
        check_layout(Layout(2, expert_model_parallel_size=2), model)
    with pytest.raises(ValueError, match="num_moe_experts"):
        tiny.language_config(expert_model_parallel_size=2)


def test_experts_that_the_ranks_do_not_share_out_are_refused(no_process_group):
    refused(
        "expert_model_parallel_size 2 .*num_moe_experts is 3.*a multiple of 2",
        {EP: 2},
        num_moe_experts=3,
        add_bias_linear=False,
    )


@pytest.mark.parametrize("name", [TP, PP, CP])
def test_a_layout_and_a_configuration_that_differ_are_refused(name, no_process_group):
    model = tiny.mimo_config()
    with pytest.raises(ValueError, match=f"{name}: the run has 2, the language model's TransformerConfig 1"):
        check_layout(Layout(2, **{name: 2}), model)


@pytest.mark.parametrize("size", [PP, CP])
def test_an_encoder_that_shares_the_language_models_configuration_is_refused(size, no_process_group):
    changes = {PP: 2, "pipeline_dtype": torch.float32} if size == PP else {CP: 2}
    encoder = specs.clip_vit_spec(tiny.language_config(**changes), "torch", patch_dim=4, img_h=8, img_w=8)
    model = tiny.mimo_config(
        modality_submodules={"images": tiny.image_spec(encoders={"vit": encoder}), "audio": tiny.audio_spec()}
    )
    with pytest.raises(ValueError, match=f"encoder 'vit' of modality 'images': {size} of its transformer_config is 2"):
        check_layout(Layout(1), model)


def test_two_interleaved_stages_without_overlapped_messages_are_refused(no_process_group):
    layout = {PP: 2, "virtual_pipeline_model_parallel_size": 2}
    refused("needs overlap_p2p_comm=True and batch_p2p_comm=False", layout, num_layers=4)
    refused("", layout, num_layers=4, overlap_p2p_comm=True, batch_p2p_comm=False)


def test_a_second_model_of_a_configuration_is_built_where_ranks_outnumber_groups_of_keys(no_run) -> None:
    """As of the second stage of a recipe: Megatron copies the configuration, hooks of the first trainer and all."""
    language = tiny.language_config(num_query_groups=2, tensor_model_parallel_size=4)
    config = tiny.mimo_config(tiny.language_spec(language, vocab_size=tiny.VOCABULARY // 4 * 4))
    with pretended(Layout(4, tensor_model_parallel_size=4)) as run:
        hook = partial(torch.mul, run.groups.tp)  # holds a process group, as an optimizer does
        language.grad_scale_func = hook
        (model,) = build_chunks(config, run, TrainingControl())
    assert language.grad_scale_func is hook
    assert model.language_model.decoder.layers[0].self_attention.num_query_groups_per_partition == 1
