"""Pretrained models on several ranks are those of one: read part by part, gathered again, the same logits."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import save_file

import megatron_mimo
from megatron_mimo.data.positions import GridPositions, Span
from megatron_mimo.data.positions import positions as positions_of
from megatron_mimo.decoders import FlowDecoder
from megatron_mimo.hf import own
from megatron_mimo.hf.files import read_header
from megatron_mimo.hf.filling import parameters_of, place_of
from megatron_mimo.hf.reading import fill, unfilled
from megatron_mimo.hf.table import Table, columns, grouped, stacked, table, vocabulary, whole
from megatron_mimo.hf.writing import outgoing
from megatron_mimo.language import HiddenStates
from megatron_mimo.launch import Run
from tests import checkpoints, tiny
from tests.checkpoints import LANGUAGE_MODELS, TOLERANCE, difference
from tests.distributed.harness import case, relayout, shared_directory
from tests.parity import test_hf_encoder, test_hf_llava, test_hf_qwen_vl
from tests.parity.test_hf_language import same_bytes, stored
from tests.parity.test_hf_llava import text_directory

TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
EXPERTS = {"expert_model_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def written_once(name: str, theirs) -> str:
    directory = shared_directory() / name
    if dist.get_rank() == 0:
        checkpoints.written(theirs, directory)
    dist.barrier()
    return str(directory)


def logits_of(models, batch: dict) -> torch.Tensor | None:
    """Logits `[B, S, V]` of all ranks' model, on every last stage; None on the others."""
    return computed(models, batch)[0]


def computed(models, batch: dict) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Logits `[B, S, V]` and last hidden states `[B, S, H]` of all ranks' model, on every last stage."""
    chunks = models if isinstance(models, list) else [models]

    def step(iterator, model):
        output, _ = model(**next(iterator))
        output = output.language if isinstance(output, megatron_mimo.MimoOutput) else output
        return output, lambda output, non_loss_data: {"logits": output}

    count = len(chunks)  # as many as an interleaved schedule wants
    batches = [iter([batch] * count) for _ in chunks]
    with torch.no_grad(), HiddenStates(chunks[-1].language_model.decoder) as states:
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=count,
            seq_length=batch["input_ids"].shape[1],
            micro_batch_size=batch["input_ids"].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not found:
        return None, None
    logits, group = found[0]["logits"], chunks[-1].pg_collection.tp
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1), states.last.transpose(0, 1)


def agrees_and_goes_out_as_it_came(name: str, theirs, batch: dict, layouts, **given) -> None:
    """`given` are keywords that transformers' model takes alone."""
    with torch.no_grad():
        images = batch.get("modality_inputs", {}).get("images", {"tower": {}})
        output = theirs(input_ids=batch["input_ids"], output_hidden_states=True, **images["tower"], **given)
    expected, hidden = output.logits, output.hidden_states[-1]
    source = written_once(name, theirs)
    for index, layout in enumerate(layouts):
        relayout(**layout)
        models = megatron_mimo.from_pretrained(source)
        logits, states = computed(models, batch)
        if logits is not None and states is not None:
            assert difference(states, hidden) < TOLERANCE, (name, layout)
            vocabulary = expected.shape[-1]
            assert difference(logits[..., :vocabulary], expected) < TOLERANCE, (name, layout)
            assert (logits[..., vocabulary:] == torch.finfo(logits.dtype).min).all()  # padding, which nothing samples
        exported = shared_directory() / f"{name}-out-{index}"
        megatron_mimo.save_pretrained(models, exported)
        if dist.get_rank() == 0:
            before, after = stored(shared_directory() / name), stored(exported)
            assert before.keys() == after.keys()
            assert [one for one in before if not same_bytes(before[one], after[one])] == []


@case(ranks=2, timeout_s=120)
def language_models_of_every_family_are_transformers_at_tp_2_and_pp_2(run: Run) -> None:
    for name in LANGUAGE_MODELS:
        theirs = checkpoints.language_model(name)
        agrees_and_goes_out_as_it_came(name, theirs, {"input_ids": checkpoints.ids()}, (TENSOR, PIPELINE))


@case(ranks=2, timeout_s=120)
def llava_is_transformers_from_pixels_to_logits_at_tp_2_and_pp_2(run: Run) -> None:
    pixels, ids = checkpoints.images_and_ids()
    for tower, language in test_hf_llava.KINDS:
        theirs = checkpoints.llava(tower, language)
        batch = {"input_ids": ids, "modality_inputs": {"images": {"tower": {"pixel_values": pixels}}}}
        agrees_and_goes_out_as_it_came(f"llava-{tower}-{language}", theirs, batch, (TENSOR, PIPELINE))


@case(ranks=2, timeout_s=120)
def qwen_vl_is_transformers_from_patches_to_logits_at_tp_2_and_pp_2(run: Run) -> None:
    for kind in test_hf_qwen_vl.KINDS:
        theirs = test_hf_qwen_vl.model_of(kind)
        image = theirs.config.image_token_id
        ids = checkpoints.ids(40)[:1].masked_fill(checkpoints.ids(40)[:1] == image, image + 1)
        ids[0, 5:11] = image
        grid = torch.tensor([[1, 4, 6]])
        rule = GridPositions()
        positions, _ = positions_of(40, [Span(5, 6, rule, (1, 2, 3))], 3)
        patches = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
        tower = {"pixel_values": patches, "image_grid_thw": grid}
        batch = {
            "input_ids": ids,
            "position_ids": positions[:, None],
            "modality_inputs": {"images": {"tower": tower}},
        }
        kinds = (ids == image).int()
        agrees_and_goes_out_as_it_came(kind, theirs, batch, (TENSOR, PIPELINE), mm_token_type_ids=kinds)


@case(ranks=2)
def an_interleaved_pipeline_s_chunks_are_filled_by_layer_and_dense_layers_need_no_expert_ranks(run: Run) -> None:
    theirs = checkpoints.randomized(_four_layers())
    agrees_and_goes_out_as_it_came("interleaved", theirs, {"input_ids": checkpoints.ids()}, (INTERLEAVED, EXPERTS))


def _four_layers():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        checkpoints.language_config("qwen2", num_hidden_layers=4, tie_word_embeddings=True)
    )


@case(ranks=4, timeout_s=120, **TENSOR)
def under_sequence_and_data_parallelism_loss_and_logits_are_one_rank_s(run: Run) -> None:
    theirs = checkpoints.language_model("llama-2")
    ids = checkpoints.ids()
    with torch.no_grad():
        expected = theirs(input_ids=ids, labels=ids).loss
    source = written_once("sequence-parallel", theirs)
    model = megatron_mimo.from_pretrained(source, sequence_parallel=True)
    counts = torch.ones(ids.shape)
    counts[:, -1] = 0
    with torch.no_grad():
        losses, mask = model(ids, labels=ids.roll(-1, 1), loss_mask=counts)
    # The vocabulary of 101 is padded to 102: padding that took part in the softmax would be seen here.
    torch.testing.assert_close((losses * mask).sum() / mask.sum(), expected, atol=1e-5, rtol=1e-5)


def in_parts(directory: Path) -> dict:
    """A language model that sees with DINOv2 and writes with a decoder whose layers are cut."""
    config = TransformerConfig(num_layers=1, hidden_size=checkpoints.HIDDEN, num_attention_heads=4)
    decoder = {"width": checkpoints.HIDDEN, "target_width": 4, "hidden_width": 16, "depth": 1, "config": config}
    tower = {"name_or_path": str(directory / "dinov2"), "select": "patch"}
    return dict(
        language_model=directory / "text",
        encoders={"images": {"tower": ModuleSpec(megatron_mimo.HFEncoder, params=tower)}},
        special_tokens={"images": "<image>"},
        decoders={"images": {"flow": ModuleSpec(FlowDecoder, params=decoder)}},
        generation_tokens={"images": "<draw>"},
    )


@case(ranks=2, timeout_s=120)
def a_model_in_parts_is_the_same_at_tp_2_and_pp_2_and_goes_out_and_in_again(run: Run) -> None:
    """With an encoder of transformers as it is, and a decoder whose layers are cut: no class of transformers has it."""
    directory = shared_directory() / "in-parts"
    if dist.get_rank() == 0:
        text_directory(directory / "text", "llama-2")
        test_hf_encoder.written("dinov2", directory / "dinov2")
    dist.barrier()
    given = in_parts(directory)
    ids = checkpoints.ids(40).clamp(max=89)
    ids[:, 2:18] = 90  # the first row that the tokenizer does not use
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "modality_inputs": {"images": {"tower": {"pixel_values": pixels}}}}
    found: dict[int, torch.Tensor]
    saved: Path | None
    found, saved = {}, None
    for index, layout in enumerate(({}, TENSOR, PIPELINE, TENSOR)):
        relayout(**layout)
        model = megatron_mimo.from_pretrained(**given) if saved is None else megatron_mimo.from_pretrained(saved)
        assert model.mimo_config.special_token_ids == {"images": 90}
        logits = logits_of(model, batch)
        if logits is not None:
            found[index] = logits[..., : checkpoints.VOCABULARY]
        saved = shared_directory() / f"in-parts-{index}"
        megatron_mimo.save_pretrained(model, saved)
    if dist.get_rank() == 1:  # the last stage
        for index, logits in found.items():
            assert difference(logits, found[0]) < TOLERANCE, index
        first, last = (stored(shared_directory() / f"in-parts-{index}") for index in (0, 3))
        assert first.keys() == last.keys() and any("decoders" in name for name in first)
        assert [name for name in first if not same_bytes(first[name], last[name])] == []


def experts_table(config: TransformerConfig) -> Table:
    """Of a language model with experts, which no family has yet; experts are named as Qwen 3's are."""
    hidden, ffn, groups = config.hidden_size, config.moe_ffn_hidden_size, config.num_query_groups
    ours, theirs = "decoder.layers.{i}", "model.layers.{i}"
    expert = "mlp.experts.local_experts.{e}"
    attention = [f"{theirs}.self_attn.{one}_proj.weight" for one in "qkv"]
    gated = [f"{theirs}.mlp.experts.{{e}}.{one}_proj.weight" for one in ("gate", "up")]
    rules = [
        vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", (tiny.VOCABULARY, hidden)),
        vocabulary("output_layer.weight", "lm_head.weight", (tiny.VOCABULARY, hidden)),
        whole("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)),
        whole(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight", (hidden,)),
        whole(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight", (hidden,)),
        grouped(f"{ours}.self_attention.linear_qkv.weight", attention, [(hidden, hidden)] * 3, groups),
        columns(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", (hidden, hidden)),
        whole(f"{ours}.mlp.router.weight", f"{theirs}.mlp.gate.weight", (config.num_moe_experts, hidden)),
        stacked(f"{ours}.{expert}.linear_fc1.weight", gated, (ffn, hidden), expert=True),
        columns(
            f"{ours}.{expert}.linear_fc2.weight",
            f"{theirs}.mlp.experts.{{e}}.down_proj.weight",
            (hidden, ffn),
            expert=True,
        ),
    ]
    return table(rules, config.num_layers, experts=config.num_moe_experts)


@case(ranks=2, timeout_s=120)
def experts_are_read_and_written_by_their_number_in_the_whole_layer_at_ep_2_and_tp_2(run: Run) -> None:
    directory = shared_directory() / "experts"
    for layout in ({"expert_model_parallel_size": 2}, TENSOR):
        relayout(**layout)
        config = tiny.language_config(
            num_moe_experts=4, moe_ffn_hidden_size=24, add_bias_linear=False, normalization="RMSNorm",
            gated_linear_unit=True, activation_func=torch.nn.functional.silu, bias_activation_fusion=False,
            moe_token_dispatcher_type="alltoall", **layout,
        )  # fmt: skip
        expected = {}
        draw = torch.Generator().manual_seed(3)
        for name, shape in experts_table(config).expected.items():
            expected[name] = torch.randn(shape, generator=draw)
        if dist.get_rank() == 0:
            directory.mkdir(exist_ok=True)
            save_file(expected, directory / "model.safetensors")
        dist.barrier()
        model = megatron_mimo.MimoModel(
            tiny.mimo_config(tiny.language_spec(config, share_embeddings_and_output_weights=False))
        )
        place = place_of(model.pg_collection)
        parameters = parameters_of(model.language_model, place)
        assert unfilled(parameters, experts_table(config), place) == []
        fill(parameters, read_header(directory / "model.safetensors"), experts_table(config), place)
        if "expert_model_parallel_size" in layout:
            first = 2 * dist.get_rank()
            mine = {name: one for name, one in model.language_model.named_parameters() if "local_experts" in name}
            assert mine
            for local in (0, 1):
                down = mine[f"decoder.layers.1.mlp.experts.local_experts.{local}.linear_fc2.weight"]
                assert torch.equal(down, expected[f"model.layers.1.mlp.experts.{first + local}.down_proj.weight"])
        for one in outgoing(parameters, experts_table(config), place):
            tensor = one.tensor()
            assert tensor is None or torch.equal(tensor, expected[one.name]), one.name
        if "expert_model_parallel_size" in layout:
            tensors = {name: one for name, one in model.named_parameters() if "local_experts" in name}
            try:
                own.table_of([model], tensors, place)
            except ValueError as error:
                assert "expected no experts in parts that no table covers" in str(error)
            else:
                raise AssertionError("experts of two ranks got one name")
