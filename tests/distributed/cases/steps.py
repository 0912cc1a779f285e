"""What a training step promises on several ranks: its auxiliary losses, its refusals."""

import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo import specs
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.launch import Run
from megatron_mimo.training import Trainer, TrainerSettings
from megatron_mimo.training.chunks import parameters_gathered
from tests.distributed.cases import training
from tests.distributed.cases.training import PIPELINE, TENSOR, four_samples, model_config
from tests.distributed.harness import case, relayout, shared_directory
from tests.distributed.setting import token_local_layers

CONTEXT = {"context_parallel_size": 2}
EXPERTS = dict(
    num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="alltoall", add_bias_linear=False,
    moe_aux_loss_coeff=1.0, moe_z_loss_coeff=0.5,
)  # fmt: skip
LENGTH = 16


def trainer(run: Run, per_token: bool = True, **changes) -> Trainer:
    config = model_config(run, calculate_per_token_loss=per_token, **changes)
    if run.layout.context_parallel_size > 1:
        language = config.language_model.params
        experts = language["config"] if "num_moe_experts" in changes else None
        language |= {"transformer_layer_spec": token_local_layers(4, experts), "position_embedding_type": "none"}
    ours = Trainer(
        config,
        run,
        TrainerSettings(steps=1, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=0.0, weight_decay=0.0, clip_grad=0.0),
    )
    draw = torch.Generator().manual_seed(3)
    model = ours.models[0]
    weights = {name: 0.2 * torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}
    model.load_state_dict(weights, strict=False)
    return ours


def few_labels(step: int, rank: int, size: int) -> list[dict]:
    """Two microbatches of two samples, of which each rank learns another number of labels."""
    draw = torch.Generator().manual_seed(10 * step + rank)
    found = []
    for index in range(2):
        ids = torch.randint(0, 60, (2, LENGTH), generator=draw)
        mask = torch.zeros(2 * LENGTH)
        mask[: 3 + 4 * rank + index] = 1.0
        found.append(dict(input_ids=ids, labels=ids.roll(-1, 1), loss_mask=mask.view(2, LENGTH)))
    return found


@case(ranks=2)
@case(ranks=2, **PIPELINE)
@case(ranks=2, **TENSOR)
@case(ranks=2, **CONTEXT)
def losses_of_experts_weigh_alike_with_and_without_loss_per_token(run: Run) -> None:
    found, reports = [], []
    for per_token in (True, False):
        ours = trainer(run, per_token, **EXPERTS)
        reports.append(ours.train_step(few_labels))
        found.append({name: p.main_grad.clone() for name, p in ours.models[0].named_parameters()})
    assert any("router" in name and grad.abs().max() > 1e-4 for name, grad in found[1].items())
    for name, gradient in found[0].items():
        # The same sums, divided before or after they are added up.
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)
    assert set(reports[0].losses) == {"text", "loss", "load_balancing_loss", "z_loss"}
    assert dict(reports[0].losses) == pytest.approx(dict(reports[1].losses), rel=1e-5)


def spoiled(run: Run, at: int, rank: int, value: float = float("nan")):
    """What every rank reads, but for one number of a target in one step of one data-parallel rank."""

    def data(step: int, data_rank: int, size: int) -> list[dict]:
        batches = four_samples(step, data_rank, size)
        if step == at and data_rank == rank:
            given = next(each for each in batches if "modality_targets" in each)
            given["modality_targets"]["images"]["pixels"]["pixels"][0, 0] = value
        return batches

    return data


def on_every_rank(error: Exception) -> str:
    """The text of an error, which all ranks have: said of rank r elsewhere, by the rank itself without."""
    texts: list = [None] * dist.get_world_size()
    dist.all_gather_object(texts, (type(error).__name__, str(error).removeprefix("rank 1: ")))
    assert len(set(texts)) == 1, texts
    return str(error)


@case(ranks=2, timeout_s=120)
def a_loss_that_is_not_finite_stops_every_rank_names_its_own_and_moves_nothing_on_any_layout(run: Run) -> None:
    for layout, reader, blamed in (
        ({}, 0, [0]),  # the one data-parallel rank that writes images
        (TENSOR, 0, [0, 1]),  # both compute the same loss
        (PIPELINE, 0, [1]),  # the last stage has the losses
    ):
        run = relayout(**layout)
        directory = shared_directory() / f"not-finite-{len(blamed)}-{blamed[0]}"
        ours = training.trainer(run, directory, save_every=1, distributed=not layout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_mimo.exits._exit_now", _raise)  # which would end this process
            with pytest.raises(FloatingPointError, match="step 2 is not finite") as stopped:
                ours.train(spoiled(run, 2, reader))
        said = on_every_rank(stopped.value)
        for rank in range(2):
            named = f"rank {rank}: loss 'images/pixels' sums to nan in microbatch 0 of"
            assert (named in said) == (rank in blamed), said
        assert "step_00000002" in said
        other = training.trainer(run, directory, distributed=not layout)
        assert other.load() == 2
        with parameters_gathered(ours.chunks, ours.optimizer):
            for mine, theirs in zip(ours.models[0].parameters(), other.models[0].parameters()):
                assert torch.equal(mine, theirs)
        assert not ours.train_step(four_samples).skipped


def _raise(error: BaseException) -> None:
    raise error


class Exploding(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


@case(ranks=2, timeout_s=120)
def a_nan_that_first_shows_in_one_rank_s_gradient_is_named_on_all_before_it_spreads(run: Run) -> None:
    for layout, distributed in (({}, False), ({}, True), (PIPELINE, False)):
        run = relayout(**layout)
        ours = training.trainer(run, None, distributed=distributed)
        before = [p.detach().clone() for p in ours.models[0].parameters()]
        # The first rank alone: it is the one with an image to read, or the stage that reads.
        if run.rank == 0:
            encoder = ours.models[0].modality_submodules["images"].encoders["patches"]
            hook = encoder.register_forward_hook(lambda module, given, output: Exploding.apply(output))
        with pytest.raises(FloatingPointError, match="step 0 is not finite") as stopped:
            ours.train_step(four_samples)
        said = on_every_rank(stopped.value)
        assert re.search(r"rank 0: the gradient of \S*images\.encoders\.patches\.linear\.\S+ and of 1 more", said), said
        # Overlapped reductions spread it before it is looked at, and the error says so.
        assert ("rank 1" in said) == distributed and ("after their reduction" in said) == distributed, said
        assert all(torch.equal(p, b) for p, b in zip(ours.models[0].parameters(), before))
        if run.rank == 0:
            hook.remove()
        assert not ours.train_step(four_samples).skipped


@case(ranks=2, timeout_s=120)
def a_step_in_which_nothing_is_learned_moves_nothing_on_any_layout(run: Run) -> None:
    def nothing(step: int, rank: int, size: int) -> list[dict]:
        ids = torch.randint(0, 60, (1, LENGTH), generator=torch.Generator().manual_seed(step))
        return [dict(input_ids=ids, labels=ids, loss_mask=torch.zeros(1, LENGTH))] * 2

    def one_rank_learns(step: int, rank: int, size: int) -> list[dict]:
        return four_samples(step, rank, size) if rank == 0 else nothing(step, rank, size)

    for layout, distributed in (({}, False), ({}, True), (TENSOR, False), (PIPELINE, False), (CONTEXT, False)):
        run = relayout(**layout)
        ours = training.trainer(
            run, None, distributed=distributed, token_local=bool(run.layout.context_parallel_size > 1)
        )
        ours.train_step(four_samples)
        with parameters_gathered(ours.chunks, ours.optimizer):
            before = [p.detach().clone() for p in ours.models[0].parameters()]
        report = ours.train_step(nothing)
        assert report.skipped and report.gradient_norm is None
        with parameters_gathered(ours.chunks, ours.optimizer):
            assert all(torch.equal(p, b) for p, b in zip(ours.models[0].parameters(), before))
        assert ours.schedule.num_steps == 1
        assert not ours.train_step(one_rank_learns).skipped


def fewer_on_one_rank(run: Run, number: int):
    def data(step: int, rank: int, size: int) -> list[dict]:
        batches = four_samples(step, 0, 1)
        return batches[:number] if run.rank == 1 else batches

    return data


@case(ranks=2, timeout_s=120)
def ranks_that_disagree_on_the_microbatches_are_told_numbers_and_ranks_before_the_schedule(run: Run) -> None:
    experts = {name: EXPERTS[name] for name in EXPERTS if "coeff" not in name}

    def longer(step: int, rank: int, size: int) -> list[dict]:
        batches = four_samples(step, 0, 1)
        ids = torch.ones(1, LENGTH + 4 * run.rank, dtype=torch.long)
        return [*batches[:1], dict(input_ids=ids, labels=ids)] if context else [dict(input_ids=ids, labels=ids)]

    for layout in (PIPELINE, CONTEXT, {"expert_model_parallel_size": 2}):
        run = relayout(**layout)
        context = layout is CONTEXT
        changes = experts if "expert_model_parallel_size" in layout else {}
        ours = training.trainer(run, None, token_local=context, **changes)
        began = time.perf_counter()
        with pytest.raises(ValueError, match="found other numbers: rank 0 has 4, rank 1 has 3") as refused:
            ours.train_step(fewer_on_one_rank(run, 3))
        on_every_rank(refused.value)
        with pytest.raises(ValueError, match="rank 0 has 4, rank 1 has 3"):
            ours.evaluate(fewer_on_one_rank(run, 3))
        if not changes:
            shape = rf"microbatch {int(context)} of shape \[B, S\] = \[1, 16\] on rank 0 and \[1, 20\] on rank 1"
            with pytest.raises(ValueError, match=shape):
                ours.train_step(longer)
        # Long before any timeout; nothing is left over from the refused steps.
        assert time.perf_counter() - began < 30
        assert not ours.train_step(lambda *_: four_samples(0, 0, 1)).skipped
    run = relayout()  # data-parallel ranks wait for each other once a step
    assert not training.trainer(run, None).train_step(fewer_on_one_rank(run, 3)).skipped


@case(ranks=2)
@case(ranks=2, **PIPELINE)
@case(ranks=2, **TENSOR)
def what_one_rank_refuses_ends_the_step_on_all(run: Run) -> None:
    config = model_config(run, bf16=True, params_dtype=torch.bfloat16)
    config.language_model.params["config"].pipeline_dtype = torch.bfloat16
    settings = TrainerSettings(steps=9, progress=False, directory=shared_directory() / "never written")
    ours = Trainer(config, run, settings)
    ours.train_step(four_samples)
    weight = next(p for name, p in ours.models[0].named_parameters() if "decoder" in name and p.dim() > 1)
    before = [p.detach().clone() for p in ours.models[0].parameters()]
    if run.rank == 1:
        with torch.no_grad():
            weight.mul_(2)
    for act in (lambda: ours.train_step(four_samples), ours.save):
        with pytest.raises(ValueError, match=r"changed since the last step .* trainer\.sync_weights") as refused:
            act()
        said = on_every_rank(refused.value)
        assert said.startswith("rank 1: ") == (run.rank == 0)
    ours.sync_weights()
    if run.rank == 0:
        assert all(torch.equal(p, b) for p, b in zip(ours.models[0].parameters(), before))
    if run.layout.tensor_model_parallel_size == 1:  # else there is one reader
        with pytest.raises(TypeError, match="gave a dict, expected a list of microbatches") as refused:
            ours.train_step(lambda *_: four_samples(0, 0, 2) if run.rank == 0 else four_samples(0, 0, 2)[0])
        on_every_rank(refused.value)


def mtp_config(
    run: Run, per_token: bool, token_local: bool, of_stage: Callable[..., ModuleSpec] | None = None, **changes
) -> MimoModelConfig:
    """A model that also predicts the token after the next, with other layers where `of_stage` gives them."""
    config = model_config(run, token_local, calculate_per_token_loss=per_token, mtp_num_layers=1, **changes)
    language = config.language_model.params
    if of_stage is not None:
        language["transformer_layer_spec"] = of_stage
    layers = language["transformer_layer_spec"]
    layer = layers if isinstance(layers, ModuleSpec) else layers(language["config"])
    layer = layer.submodules.layer_specs[-1] if hasattr(layer.submodules, "layer_specs") else layer
    if token_local:  # Megatron asks the attention for its mask, which a bare class does not have
        causal = {"attn_mask_type": AttnMaskType.causal}
        attention = ModuleSpec(module=layer.submodules.self_attention, params=causal)
        layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention))
    block = get_gpt_mtp_block_spec(language["config"], layer, use_transformer_engine=False)
    # Megatron's norm of plain torch refuses sequence parallelism.
    norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), specs.norm("torch"))
    if block is not None:  # as on stages before the last
        each = [replace(one, submodules=replace(one.submodules, **norms)) for one in block.layer_specs]
        block = replace(block, layer_specs=each)
    language["mtp_block_spec"] = block
    return config


def mtp_trainer(run: Run, per_token: bool, token_local: bool) -> Trainer:
    """A trainer of it, of weights that every layout cuts from the same."""
    return Trainer(
        mtp_config(run, per_token, token_local),
        run,
        TrainerSettings(steps=3, decay="constant", progress=False, directory=shared_directory() / f"mtp-{token_local}"),
        # Adam's epsilon far above rounding: with 1e-8 its first step is the gradient's sign.
        optimizer=OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=1.0),
    )


@case(ranks=2, timeout_s=180)
def multi_token_prediction_trains_on_every_layout_as_on_one_rank(run: Run) -> None:
    def begins_of_shards_unlearned(step: int, rank: int, size: int) -> list[dict]:
        batches = four_samples(step, rank, size)
        for batch in batches:
            batch["loss_mask"][:, :: LENGTH // 4] = 0.0
        return batches

    # Megatron weighs multi-token prediction by the labels of a context-parallel rank's own positions, and of those one
    # further: as many where the labels that leave a rank's parts of the sequence are not learned. Without loss per
    # token it takes the mean over each rank's labels alone.
    for token_local, layout, data, flags in (
        (False, TENSOR, four_samples, (True, False)),
        (True, CONTEXT, begins_of_shards_unlearned, (True,)),
    ):
        for per_token in flags:
            first = mtp_trainer(relayout(), per_token, token_local)
            start = first.save()
            expected = [first.train_step(data) for _ in range(3)]
            ours = mtp_trainer(relayout(**layout), per_token, token_local)
            ours.load(start)
            found = [ours.train_step(data) for _ in range(3)]
            training.assert_close([dict(each.losses) for each in found], [dict(each.losses) for each in expected])
            # The norm has multi-token prediction's gradients, which its loss alone makes.
            norms = [each.gradient_norm for each in expected]
            assert [each.gradient_norm for each in found] == pytest.approx(norms, rel=1e-4), (layout, per_token)
    with pytest.raises(ValueError, match="mtp_num_layers=1 needs the embedded rows on the last pipeline stage"):
        mtp_trainer(relayout(**PIPELINE), True, False)
