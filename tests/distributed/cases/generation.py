"""Generation on several ranks says what one rank says, on training layouts, and leaves the model as it was."""

from argparse import Namespace
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from examples.recipes import any_to_any_small
from megatron_mimo.generation import Writing
from megatron_mimo.launch import Run, shutdown
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny, writing
from tests.distributed.cases import pretrain
from tests.distributed.harness import case, relayout, shared_directory
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


@case(ranks=2, timeout_s=120, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
def interleaved_stages_are_refused_by_a_trainer_before_any_work(run: Run) -> None:
    config = tiny.mimo_config(
        language(
            "groups",
            num_layers=4,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_dtype=torch.float32,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        )
    )
    trainer = Trainer(config, run, TrainerSettings(steps=1), optimizer=OptimizerConfig(lr=1e-3))
    asked = prompts()
    for model in trainer.models:
        model.embed = None
    with pytest.raises(ValueError, match="found virtual_pipeline_model_parallel_size=2"):
        trainer.generate(asked, NEW)


class Recipe:
    """The recipe, which keeps the arguments that its model was made of."""

    datasets, collate = staticmethod(any_to_any_small.datasets), staticmethod(any_to_any_small.collate)

    def __init__(self) -> None:
        self.args: Namespace | None = None

    def model_config(self, args: Namespace) -> megatron_mimo.MimoModelConfig:
        self.args = args
        return any_to_any_small.model_config(args)


@case(ranks=2, timeout_s=120)
def a_model_answers_from_a_checkpoint_of_pretrain(run: Run) -> None:
    saved, recipe = shared_directory() / "generation-pretrain", Recipe()
    shutdown()
    pretrain.run_recipe(saved, "--save", str(saved), "--save-interval", "2", steps=2, recipe=recipe)
    assert recipe.args is not None
    run = relayout()
    trainer = Trainer(any_to_any_small.model_config(recipe.args), run, TrainerSettings(steps=1))
    model, token = trainer.models[0], any_to_any_small.TOKEN
    first = model.language_model.embedding.word_embeddings.weight.detach().clone()
    trainer.load(saved / "iter_0000002", weights_only=True)
    table = model.language_model.embedding.word_embeddings.weight
    assert torch.equal(table, pretrain.embedding(saved, 2)) and not torch.equal(table, first)

    seen = torch.randn(1, 3, any_to_any_small.SIDE, any_to_any_small.SIDE)
    looked = [token["look"], *[token["<image>"]] * any_to_any_small.IMAGE_ROWS]
    asked = [
        {"input_ids": looked, "modality_inputs": {"images": {"vit": {"images": seen}}}},
        {"input_ids": [token[word] for word in ("sing", "high", "soft", "<sing>")]},
    ]
    _, sung = trainer.generate(asked, [4, any_to_any_small.FRAMES])
    placeholders = [token[word] for word in ("<image>", "<tone>", "<draw>", "<sing>")]
    (told,) = trainer.generate(asked[:1], 4, modalities=())
    ids = torch.tensor(looked)
    model.eval()
    with torch.no_grad():
        for said in told.ids:
            logits = model(ids[None], modality_inputs=asked[0]["modality_inputs"])[0].language[0, -1]
            logits[placeholders] = -torch.inf
            assert said == int(logits.argmax())
            ids = torch.cat([ids, torch.tensor([said])])
        whole = torch.tensor([*asked[1]["input_ids"], *[token["<sing>"]] * (any_to_any_small.FRAMES - 1)])
        waves = model.decode(model(whole[None])[0])["tones"]["waves"]
    assert [part.kind for part in sung.parts] == ["audio"]
    torch.testing.assert_close(sung.parts[0].samples, waves.view_as(sung.parts[0].samples), atol=1e-5, rtol=0)


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
