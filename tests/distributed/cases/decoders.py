"""Decoders through a whole MimoModel: N ranks give one rank's loss and gradients.

How rows come to a decoder and its gradients back does not depend on the decoder, so each layout takes the decoders
that tell something of it: under TP those that are cut, under CP those whose items have different numbers of rows.

The reference is the whole batch on one rank. The draws are in the targets, so that every layout sees
the same; that unequal ranks draw what they should is a case of its own. Gradients are summed over
data- and context-parallel ranks by hand, and under sequence parallelism over tensor-parallel ranks
where Megatron would.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_mimo import (
    MimoModel,
    VisionModalitySubmodules,
    loss_terms,
    sample_flow,
    sample_one_by_one,
    total_loss,
)
from megatron_mimo.decoders import (
    CodeInput,
    Decoder,
    DiffusersDecoder,
    DiscreteDecoder,
    FlowDecoder,
    FlowTransformerDecoder,
    NoisedTargetInput,
    QueryInput,
    RegressionDecoder,
)
from megatron_mimo.launch import Run
from megatron_mimo.sharded_state import sharded_state_dict
from tests import tiny
from tests.distributed.cases.layouts import close, own_part
from tests.distributed.harness import case, relayout
from tests.distributed.setting import Setting

WIDTH, SPAN, LENGTH = 12, 3, 16
#: Sample -> first positions of its spans. Four chunks of 4 positions under CP 2: spans at a chunk's
#: start have their predecessor on the other rank.
SPANS = {"two": (4, 9), "edge": (8,), "last": (12,), "none": ()}


@dataclass(frozen=True)
class Kind:
    """A decoder under test: how to build it and its input rule, and targets of `items` spans."""

    decoder: type[Decoder]
    params: dict
    feed: ModuleSpec | None
    targets: Callable[[int], dict[str, Tensor]]
    sharded: bool = True


def flow_targets(items: int, per_item: int, draw: torch.Generator) -> dict[str, Tensor]:
    target, weight = uncounted(torch.randn(items * per_item, 4, generator=draw), torch.nan)
    return {
        "target": target,
        "weight": weight * torch.rand(items * per_item, generator=draw),
        "noise": torch.randn(items * per_item, 4, generator=draw),
        "time": torch.rand(items, generator=draw),
        "drop": torch.arange(items) % 3 == 1,
    }


def regression_targets(items: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    target, weight = uncounted(torch.randn(items * SPAN, 4, generator=draw), torch.nan)
    return {"target": target, "weight": weight}


def code_targets(items: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    books = [torch.randint(size, (items * SPAN,), generator=draw) for size in (10, 6)]
    codes, weight = uncounted(torch.stack(books, dim=1), 99)
    return {"codes": codes, "weight": weight, "drop": torch.arange(items * SPAN) % 4 == 1}


def image_targets(items: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    target, weight = uncounted(torch.randn(items, 1, 4, 4, generator=draw), torch.nan)
    return {
        "target": target,
        "weight": weight,
        "noise": torch.randn(items, 1, 4, 4, generator=draw),
        "step": torch.randint(1000, (items,), generator=draw),
        "drop": torch.arange(items) % 3 == 1,
    }


def uncounted(values: Tensor, padding: float) -> tuple[Tensor, Tensor]:
    """Every third element made padding, and weights `[N]` that leave it out."""
    weight = (torch.arange(len(values)) % 3 != 2).float()
    values[weight == 0] = padding
    return values, weight


def feed(module: type, **params) -> ModuleSpec:
    return ModuleSpec(module=module, params=dict(hidden_size=tiny.HIDDEN, **params))


def kinds() -> dict[str, Kind]:
    flow = dict(width=WIDTH, target_width=4, condition_dropout=0.3, rows_per_item=SPAN)
    return {
        "regression": Kind(
            RegressionDecoder,
            dict(width=WIDTH, target_width=4, hidden_width=8),
            feed(QueryInput, rows_per_item=SPAN),
            regression_targets,
            sharded=False,
        ),
        "discrete": Kind(
            DiscreteDecoder,
            dict(width=WIDTH, codebook_sizes=(10, 6), hidden_width=8, condition_dropout=0.3),
            feed(CodeInput, embedding_width=5),
            code_targets,
        ),
        "flow": Kind(
            FlowDecoder,
            dict(**flow, hidden_width=8, depth=2),
            feed(NoisedTargetInput),
            lambda items: flow_targets(items, SPAN, torch.Generator().manual_seed(3)),
        ),
        "flow_transformer": Kind(
            FlowTransformerDecoder,
            dict(**flow, hidden_width=8, depth=2, heads=2, targets_per_item=5),
            None,
            lambda items: flow_targets(items, 5, torch.Generator().manual_seed(3)),
        ),
        "flow_transformer_own": Kind(
            FlowTransformerDecoder,
            dict(**flow, hidden_width=8, depth=1, heads=2, targets_per_item=SPAN, condition="own"),
            None,
            lambda items: flow_targets(items, SPAN, torch.Generator().manual_seed(3)),
        ),
        "diffusers": Kind(
            DiffusersDecoder,
            dict(width=WIDTH, rows_per_item=SPAN, sample_shape=(1, 4, 4), condition_dropout=0.3),
            feed(QueryInput, rows_per_item=SPAN),
            image_targets,
            sharded=False,
        ),
    }


def build(kind: Kind, language: ModuleSpec, reads: bool = False, **stage: bool) -> MimoModel:
    """A model that writes through `kind`'s decoder, and with `reads` is shown images too."""
    params = dict(kind.params)
    if kind.sharded:
        params["config"] = language.params["config"]
    if kind.decoder is DiffusersDecoder:
        from diffusers import DDPMScheduler, UNet2DConditionModel  # 10 s that other cases do not wait

        params["scheduler"] = DDPMScheduler()
        params["model"] = UNet2DConditionModel(
            sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
            cross_attention_dim=WIDTH, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",), norm_num_groups=2, attention_head_dim=4,
        )  # fmt: skip
    parts = dict(
        decoders={"out": ModuleSpec(module=kind.decoder, params=params)},
        output_projections=[tiny.linear(tiny.HIDDEN, WIDTH)],
    )
    if kind.feed is not None:
        parts["generation_input"] = kind.feed
    if reads:
        parts["encoders"] = {"patches": ModuleSpec(module=tiny.PatchEncoder)}
        parts["input_projections"] = [tiny.linear(16, tiny.HIDDEN)]
    config = tiny.mimo_config(
        language,
        modality_submodules={"images": ModuleSpec(module=VisionModalitySubmodules, submodules=parts)},
        special_token_ids={"images": tiny.READ} if reads else {},
    )
    return MimoModel(config, **stage)


def spread(model: torch.nn.Module) -> None:
    """Weights of a size at which every part changes what comes out; zeros would hide those before them."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)


def batch(samples: tuple[str, ...]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(11)
    ids = torch.randint(0, 60, (len(samples), LENGTH), generator=draw)
    for row, sample in zip(ids, samples):
        for start in SPANS[sample]:
            row[start : start + SPAN] = tiny.WRITE
    labels = ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1)
    mask = (torch.rand(ids.shape, generator=draw) > 0.3).float()
    return {"input_ids": ids, "labels": labels, "loss_mask": mask}


def step(model: MimoModel, tokens: dict[str, Tensor], targets: dict[str, Tensor] | None, counts: dict) -> Tensor:
    """This rank's part of the loss, whose gradients it leaves in the parameters."""
    given = {} if targets is None else {"modality_targets": {"images": {"out": targets}}}
    outputs, loss_mask = model(**tokens, **given)
    loss = total_loss(loss_terms(outputs, loss_mask), model.loss_weights, counts)
    loss.backward()
    return loss.detach()


def equals_one_rank(run: Run, kind: Kind, setting: Setting, sizes: dict, samples: tuple[str, ...]) -> None:
    tokens = batch(samples)
    items = sum(len(SPANS[sample]) for sample in samples)
    targets = kind.targets(items)
    torch.manual_seed(5)
    whole = build(kind, setting.spec(None))
    spread(whole)
    counts = {
        "text": tokens["loss_mask"].sum(),
        "images/out": torch.tensor(whole.modality_submodules["images"].decoders["out"].count(targets)),
    }
    expected_loss = step(whole, tokens, targets, counts)
    initial = {name: p.detach().clone() for name, p in whole.named_parameters()}
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}

    run = relayout(**sizes)
    model = build(kind, setting.spec(run))
    copy_part(model, run, initial)
    mine, own_targets = own_data(run, model, tokens, targets, samples)
    loss = step(model, mine, own_targets, counts)
    dist.all_reduce(loss, group=run.groups.dp_cp)
    close(loss, expected_loss, "loss")
    for parameter, part, name in own_part(model, run, setting, gradients):
        gradient = parameter.grad
        dist.all_reduce(gradient, group=run.groups.dp_cp)
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=run.groups.tp)
        close(gradient, part, f"gradient of {name}")


def own_data(
    run: Run, model: MimoModel, tokens: dict, targets: dict, samples: tuple[str, ...]
) -> tuple[dict, dict | None]:
    """The samples of this data-parallel rank and the targets of their spans."""
    size = len(samples) // run.layout.data_parallel_size
    first = run.data_rank * size
    before, here = (
        sum(len(SPANS[sample]) for sample in part) for part in (samples[:first], samples[first : first + size])
    )
    mine = {name: value[first : first + size] for name, value in tokens.items()}
    if not here:
        return mine, None
    decoder = model.modality_submodules["images"].decoders["out"]
    rows = SPAN // decoder.rows_per_item  # items of the decoder in a span
    return mine, decoder.share(targets, before * rows, (before + here) * rows)


UNEVEN, EMPTY = ("two", "edge", "last", "none"), ("two", "edge", "none", "none")
#: name -> parallel sizes, setting, samples. Three spans shared out over CP 2 are uneven, too.
LAYOUTS = {
    "tp2": (dict(tensor_model_parallel_size=2), Setting(), UNEVEN),
    "tp2_sp": (dict(tensor_model_parallel_size=2), Setting(sequence_parallel=True), UNEVEN),
    "cp2": (dict(context_parallel_size=2), Setting(token_local=True), EMPTY),
    "cp2_one_item": (dict(context_parallel_size=2), Setting(token_local=True), ("edge", "none")),
    "dp2_uneven": ({}, Setting(), UNEVEN),
    "dp2_one_without": ({}, Setting(), EMPTY),
}


def register(kind: str, layout: str) -> None:
    sizes, setting, samples = LAYOUTS[layout]

    def claim(run: Run) -> None:
        equals_one_rank(run, kinds()[kind], setting, sizes, samples)

    claim.__name__ = f"{kind}_on_{layout}_equals_one_rank"
    case(ranks=2, timeout_s=120)(claim)


#: layout -> the decoders that it is tried with.
TRIED = {
    "tp2": ("discrete", "flow", "flow_transformer", "flow_transformer_own"),  # cut, each in its own way
    "tp2_sp": ("discrete", "regression"),  # reads the predecessor, which another rank may hold; and is not cut
    "cp2": ("discrete", "flow_transformer"),  # an item of one row, an item of three that writes five
    "cp2_one_item": ("flow",),
    "dp2_uneven": ("regression",),
    "dp2_one_without": ("diffusers",),
}
for layout, names in TRIED.items():
    for kind in names:
        register(kind, layout)


SAMPLED = {
    "regression": {},
    "discrete": dict(temperature=0.8, top_k=5, guidance=2.0),
    "flow": dict(steps=3, solver="heun", guidance=2.0),
    "flow_transformer": dict(steps=3, guidance=2.0),
    "flow_transformer_own": dict(steps=3, guidance=2.0),
    "diffusers": dict(steps=3, guidance=2.0),
}


@case(ranks=2, timeout_s=120)
def sharded_decoders_sample_what_one_rank_does(run: Run) -> None:
    """From the same rows, weights and generator; with torch's default generator equal on both ranks."""
    rows = torch.randn(2 * SPAN, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    expected, weights = {}, {}
    for name in SAMPLED:
        torch.manual_seed(5)
        whole = build(kinds()[name], Setting().spec(None))
        spread(whole)
        expected[name] = samples(whole, name, rows, seed=2)
        assert name == "regression" or not torch.equal(samples(whole, name, rows, seed=3), expected[name])
        weights[name] = {key: p.detach() for key, p in whole.named_parameters()}
    run = relayout(tensor_model_parallel_size=2)
    for name in SAMPLED:
        model = build(kinds()[name], Setting().spec(run))
        copy_part(model, run, weights[name])
        close(samples(model, name, rows, seed=2), expected[name], f"samples of {name}")
        assert torch.equal(*gathered(samples(model, name, rows, seed=None)))


def samples(model: MimoModel, name: str, rows: Tensor, seed: int | None) -> Tensor:
    options = dict(SAMPLED[name])
    if name != "regression" and seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    return model.eval().modality_submodules["images"].decode(rows, options=options)


def copy_part(model: MimoModel, run: Run, whole: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for parameter, part, _ in own_part(model, run, Setting(), whole):
            parameter.copy_(part)


IN_THE_LOOP = {"discrete": sample_one_by_one, "flow": sample_flow}
LOOP_OPTIONS = {
    "discrete": dict(options=dict(temperature=0, guidance=2.0)),
    "flow": dict(steps=2, solver="heun", guidance=2.0),
}


@case(ranks=2, timeout_s=120)
def sampling_with_the_model_in_the_loop_equals_one_rank(run: Run) -> None:
    ids = batch(UNEVEN)["input_ids"]
    noise = torch.randn(4 * SPAN, 4, generator=torch.Generator().manual_seed(1))
    for sizes, setting in (
        (dict(tensor_model_parallel_size=2), Setting(sequence_parallel=True)),
        (dict(context_parallel_size=2), Setting(token_local=True)),
    ):
        for name, sample in IN_THE_LOOP.items():
            others = {"noise": noise} if name == "flow" else {"unconditional_ids": ids.where(ids == tiny.WRITE, 0)}
            options = LOOP_OPTIONS[name] | others
            run = relayout()
            torch.manual_seed(5)
            whole = build(kinds()[name], setting.spec(None)).eval()
            spread(whole)
            expected = sample(whole, ids, "images", **options)
            run = relayout(**sizes)
            model = build(kinds()[name], setting.spec(run)).eval()
            copy_part(model, run, {key: p.detach() for key, p in whole.named_parameters()})
            close(sample(model, ids, "images", **options), expected, f"{name} on {sizes}")


@case(ranks=2)
def data_parallel_ranks_draw_differently(run: Run) -> None:
    assert not torch.equal(*every_ranks_noise())


@case(ranks=2, tensor_model_parallel_size=2)
@case(ranks=2, context_parallel_size=2)
@case(ranks=2, pipeline_model_parallel_size=2)
def model_parallel_ranks_draw_alike(run: Run) -> None:
    torch.manual_seed(run.rank)  # what else the ranks draw from may differ
    assert torch.equal(*every_ranks_noise())


@case(ranks=2, pipeline_model_parallel_size=2)
def the_first_stage_noises_what_the_last_stage_denoises(run: Run) -> None:
    """The input rule draws on one stage, the decoder on the other, which drops conditions as well."""
    first = run.pipeline_rank == 0
    model = build(kinds()["flow"], Setting().spec(run), pre_process=first, post_process=not first)
    assert bool(model.modality_submodules["images"].decoders) is not first
    for _ in range(2):
        given = {"target": torch.zeros(2 * SPAN, 4)}
        drawn = model.prepare({"images": {"out": given}})["images"]["out"]
        assert torch.equal(*gathered(torch.cat([drawn["noise"].flatten(), drawn["time"]])))


def every_ranks_noise() -> list[Tensor]:
    decoder = FlowDecoder(width=4, target_width=3, hidden_width=4, condition_dropout=0.5)
    prepared = decoder.prepare({"target": torch.zeros(6, 3)}, "images/out")
    return gathered(torch.cat([prepared["noise"].flatten(), prepared["time"], prepared["drop"].float()]))


def gathered(mine: Tensor) -> list[Tensor]:
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    return everyones


@case(ranks=2, tensor_model_parallel_size=2)
def sharded_heads_sample_the_codes_that_whole_heads_would(run: Run) -> None:
    config = Setting().spec(run).params["config"]
    decoder = DiscreteDecoder(width=6, codebook_sizes=8, config=config, pg_collection=run.groups)
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    (logits,) = decoder.logits(rows)
    head = decoder.heads[0]
    assert head.weight.shape == (4, 6)
    torch.testing.assert_close(logits, rows @ torch.cat(gathered(head.weight.detach())).T)
    saved = sharded_state_dict(decoder)["heads.0.weight"]
    assert (saved.global_shape, saved.global_offset) == ((8, 6), (4 * run.tensor_rank, 0))
    drawn = decoder.sample(rows, top_k=4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(*gathered(drawn))


@case(ranks=2, tensor_model_parallel_size=2)
def what_cannot_be_cut_evenly_is_refused(run: Run) -> None:
    config = Setting().spec(run).params["config"]
    refusals = {
        "a codebook of 9 entries cannot be shared out over 2": lambda: DiscreteDecoder(
            width=6, codebook_sizes=9, config=config
        ),
        "be a multiple of the tensor-parallel size 2": lambda: FlowTransformerDecoder(
            width=6, target_width=4, targets_per_item=2, rows_per_item=1, hidden_width=12, depth=1,
            heads=3, config=config,
        ),
    }  # fmt: skip
    for text, make in refusals.items():
        try:
            make()
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"not refused: {text}")
