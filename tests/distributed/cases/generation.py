"""Generation on several ranks says what one rank says, on training layouts, and leaves the model as it was."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from megatron_mimo.generation import Writing
from megatron_mimo.launch import Run
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny, writing
from tests.distributed.harness import case, relayout
from tests.distributed.shards import load_whole_weights, whole_weights
from tests.generating import LOGPROBS, check_greedy, language, model_of, one_by_one, prompts

NEW = 6
KINDS = ["groups", "learned", "mrope", "window"]
SAMPLED = dict(temperature=0.9, top_k=30, top_p=0.95, seed=[3, 11, 7, 5])


def on_this_layout(
    config_of: Callable[..., megatron_mimo.MimoModelConfig], run: Run, weights: dict[str, torch.Tensor], **changes
) -> megatron_mimo.MimoModel:
    """This rank's part of the model that has these whole weights, in training mode."""
    stages, rank = run.layout.pipeline_model_parallel_size, run.pipeline_rank
    settings = dict(
        tensor_model_parallel_size=run.layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
    )
    config = config_of(**(settings | changes))
    model = megatron_mimo.MimoModel(config, pre_process=rank == 0, post_process=rank == stages - 1)
    each = model.config.num_layers // stages
    own = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[:3] == ["language_model", "decoder", "layers"]:
            parts[3] = str(int(parts[3]) - rank * each)
        own[".".join(parts)] = tensor
    load_whole_weights(model, own, run.groups.tp)
    return model.train()


def spoken(kind: str, **changes) -> megatron_mimo.MimoModelConfig:
    return tiny.mimo_config(language(kind, **changes))


def answers(kinds: list[str], layout: dict[str, int], **changes) -> None:
    expected, weights = {}, {}
    for kind in kinds:
        model, sections = model_of(kind), 3 if kind == "mrope" else 1
        weights[kind] = whole_weights(model)
        greedy = [one_by_one(model, prompt, NEW, sections) for prompt in prompts(sections)]
        drawn = model.generate(prompts(sections), NEW, modalities=(), **SAMPLED)
        expected[kind] = (greedy, [output.ids for output in drawn])
    run = relayout(**layout)
    for kind in kinds:
        sections = 3 if kind == "mrope" else 1
        model = on_this_layout(spoken, run, weights[kind], kind=kind, **changes)
        outputs = model.generate(prompts(sections), NEW, modalities=(), rescore=True)
        check_greedy(outputs, expected[kind][0])
        for output in outputs:
            torch.testing.assert_close(output.rescored_logprobs, output.logprobs, atol=LOGPROBS, rtol=0)
        drawn = model.generate(prompts(sections), NEW, modalities=(), **SAMPLED)
        assert [output.ids for output in drawn] == expected[kind][1], kind
        assert model.training and model.config.sequence_parallel == bool(changes)
        returned = model.generate(
            [prompts(sections)[0], {"input_ids": [1, tiny.READ], "modality_inputs": WRONG}],
            NEW,
            modalities=(),
            on_error="return",
        )
        assert returned[0].ids == expected[kind][0][0][0] and "sample 1" in str(returned[1].error)
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, [output.ids for output in outputs])
        assert all(ids == told[0] for ids in told)
        with pytest.raises(ValueError, match="the cache of 4 rows of 64 positions takes"):
            model.generate(prompts(sections), NEW, memory=100 if dist.get_rank() else None)


WRONG = {"images": {"patches": {"x": torch.zeros(1, 2, tiny.PIXELS)}}}


@case(ranks=2, timeout_s=240)
def tensor_parallel_ranks_say_what_one_rank_says(run: Run) -> None:
    answers(KINDS, {"tensor_model_parallel_size": 2})


@case(ranks=2, timeout_s=240)
def sequence_parallel_weights_say_what_one_rank_says(run: Run) -> None:
    answers(["groups", "learned"], {"tensor_model_parallel_size": 2}, sequence_parallel=True)


@case(ranks=2, timeout_s=240)
def pipeline_stages_say_what_one_rank_says(run: Run) -> None:
    answers(KINDS, {"pipeline_model_parallel_size": 2})


@case(ranks=2, timeout_s=120)
def data_parallel_ranks_generate_by_themselves_or_not_at_all(run: Run) -> None:
    model = model_of("groups")
    if dist.get_rank() == 0:
        outputs = model.generate(prompts()[:2], NEW, modalities=())
        check_greedy(outputs, [one_by_one(model, prompt, NEW) for prompt in prompts()[:2]])


SPANS = ["codes", "vectors", "flow", "queries", "speech"]


def written(layout: dict[str, int], **changes) -> None:
    """Text, a span and text again, with guidance by a second prompt, from the seeds of each sample."""
    expected, weights = {}, {}

    def asked(kind: str) -> tuple[list[dict], dict]:
        made = [{"input_ids": [*prompt["input_ids"], writing.BEGIN]} for prompt in writing.prompts()]
        options: dict = {"flow": {"steps": 2, "guidance": 2.0}, "codes": {"guidance": 2.0}}.get(kind, {})
        if options:
            made[1]["unconditional"] = {"input_ids": [0, writing.BEGIN]}
        wanted = {"images": Writing(rows=writing.ROWS, options=options)}
        return made, dict(max_new_tokens=8, modalities=wanted, seed=[3, 4, 5], temperature=0.8, rescore=True)

    for kind in SPANS:
        model = writing.model_of(kind)
        weights[kind] = whole_weights(model)
        made, options = asked(kind)
        expected[kind] = model.generate(made, **options)
    run = relayout(**layout)
    for kind in SPANS:
        model = on_this_layout(writing.config_of, run, weights[kind], kind=kind, **changes)
        made, options = asked(kind)
        for mine, theirs in zip(model.generate(made, **options), expected[kind], strict=True):
            assert mine.ids == theirs.ids, kind
            for one, other in zip(mine.parts, theirs.parts, strict=True):
                if one.kind == "text":
                    torch.testing.assert_close(one.rescored_logprobs, one.logprobs, atol=LOGPROBS, rtol=0)
                    torch.testing.assert_close(one.logprobs, other.logprobs, atol=LOGPROBS, rtol=0)
                else:
                    torch.testing.assert_close(one.value, other.value, atol=1e-4, rtol=1e-4)


@case(ranks=2, timeout_s=240)
def tensor_parallel_ranks_write_what_one_rank_writes(run: Run) -> None:
    written({"tensor_model_parallel_size": 2})


@case(ranks=2, timeout_s=240)
def sequence_parallel_weights_write_what_one_rank_writes(run: Run) -> None:
    written({"tensor_model_parallel_size": 2}, sequence_parallel=True)


@case(ranks=2, timeout_s=240)
def pipeline_stages_write_what_one_rank_writes(run: Run) -> None:
    written({"pipeline_model_parallel_size": 2})


@case(ranks=2, timeout_s=120)
def a_trainer_generates_with_weights_whose_gather_is_overlapped_and_trains_on(run: Run) -> None:
    losses = []
    for generates in (False, True):
        run = relayout()
        torch.manual_seed(3)
        trainer = Trainer(
            tiny.mimo_config(),
            run,
            TrainerSettings(steps=3, decay="constant", progress=False),
            optimizer=OptimizerConfig(lr=1e-2, use_distributed_optimizer=True),
            ddp=DistributedDataParallelConfig(
                overlap_grad_reduce=True, use_distributed_optimizer=True, overlap_param_gather=True
            ),
        )
        for _ in range(2):
            losses.append(trainer.train_step(lambda step, rank, size: [tiny.batch(rank)]).losses)
            if generates:
                mine = prompts()[: 1 - dist.get_rank()]  # the other rank has none
                assert len(trainer.generate(mine, 4, modalities=())) == len(mine)
    assert losses[:2] == losses[2:]


def refused(run: Run, message: str) -> None:
    """Of a model whose groups are these; the check reads nothing else, so that it is the same on every rank."""
    config = tiny.mimo_config(language("groups"))
    model = megatron_mimo.MimoModel(config, pg_collection=run.groups)
    with pytest.raises(ValueError, match=message):
        model.generate(prompts(), NEW)


@case(ranks=2, timeout_s=120, context_parallel_size=2)
def context_parallelism_is_refused_before_any_work(run: Run) -> None:
    refused(run, "expected context_parallel_size=1, found context_parallel_size=2")


@case(ranks=2, timeout_s=120, expert_model_parallel_size=2)
def expert_parallelism_is_refused_before_any_work(run: Run) -> None:
    refused(run, "expected expert_model_parallel_size=1, found expert_model_parallel_size=2")


@case(ranks=2, timeout_s=120)
def weights_whose_gather_is_overlapped_are_refused_before_any_work(run: Run) -> None:
    model = model_of("groups")
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            overlap_grad_reduce=True, use_distributed_optimizer=True, overlap_param_gather=True
        ),
        model,
    )
    with pytest.raises(ValueError, match="found overlap_param_gather"):
        model.generate(prompts(), NEW)
    wrapped.disable_forward_pre_hook(param_sync=False)
    model.generate(prompts(), 2, modalities=())
