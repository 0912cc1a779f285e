"""Packed sequences on N ranks: the loss terms and gradients of the same sequences apart on one rank.

With attention under tensor and sequence parallelism. Context parallelism has no attention without
TransformerEngine; its layers are token-local, with learned positions, so that a row with the position of
another shows.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo import MimoModel, MimoModelConfig
from megatron_mimo.launch import Run
from megatron_mimo.rotary import GridGPT
from megatron_mimo.route import route
from megatron_mimo.segments import segmented
from megatron_mimo.sharding import sequence_shard
from tests import packed
from tests.distributed.cases.align import LargestResult
from tests.distributed.cases.decoders import build, copy_part, kinds, spread
from tests.distributed.cases.layouts import close, own_part
from tests.distributed.harness import case, relayout
from tests.distributed.setting import Setting


def language(setting: Setting, run: Run | None) -> ModuleSpec:
    spec = setting.spec(run)
    changes = {"position_embedding_type": "learned_absolute"} if setting.token_local else {}
    return replace(spec, params={**spec.params, **changes})


def equals_sequences_apart(name: str, setting: Setting, sizes: dict[str, int]) -> None:
    kind = kinds()[name]
    targets = kind.targets(sum(packed.spans()))
    alone = packed.alone(opens=name != "discrete")  # which reads the predecessor
    torch.manual_seed(5)
    whole = build(kind, language(setting, None), reads=True)
    spread(whole)
    counts = packed.step_counts(whole, alone, targets)
    expected, gradients = packed.step(whole, list(zip(alone, packed.shares(whole, targets))), counts)

    run = relayout(**sizes)
    model = build(kind, language(setting, run), reads=True)
    copy_part(model, run, {key: p.detach() for key, p in whole.named_parameters()})
    found, mine = packed.step(model, [(packed.packed(alone), targets)], counts)
    for term in expected:
        for part in ("sum", "count"):
            value = getattr(found[term], part)
            dist.all_reduce(value, group=run.groups.dp_cp)
            close(value, getattr(expected[term], part), f"{part} of {term}")
    for parameter, part, key in own_part(model, run, setting, gradients):
        gradient = mine[key]
        dist.all_reduce(gradient, group=run.groups.dp_cp)
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=run.groups.tp)
        close(gradient, part, f"gradient of {key}")


TENSOR, CONTEXT = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}
MROPE = {"position_embedding_type": "mrope"}
#: name -> ranks, parallel sizes, setting
LAYOUTS = {
    "tp2": (2, TENSOR, Setting()),
    "tp2_sp": (2, TENSOR, Setting(sequence_parallel=True)),
    "cp2": (2, CONTEXT, Setting(token_local=True)),
    "tp2_cp2": (4, {**TENSOR, **CONTEXT}, Setting(sequence_parallel=True, token_local=True)),
}


def register(kind: str, layout: str) -> None:
    ranks, sizes, setting = LAYOUTS[layout]

    def claim(run: Run) -> None:
        equals_sequences_apart(kind, setting, sizes)

    claim.__name__ = f"packed_{kind}_on_{layout}_equals_sequences_apart"
    case(ranks=ranks, timeout_s=120)(claim)


for kind in ("discrete", "flow", "flow_transformer"):
    for layout in LAYOUTS:
        register(kind, layout)


@case(ranks=2, **TENSOR)
@case(ranks=2, **CONTEXT)
def routing_packed_rows_holds_no_more_than_this_ranks_part_of_the_sequence(run: Run) -> None:
    lengths = [length for _, length, _, _ in packed.SEQUENCES]
    splits = run.layout.tensor_model_parallel_size > 1
    shard = sequence_shard(
        sum(lengths),
        tp_rank=run.tensor_rank if splits else 0,
        tp_size=2 if splits else 1,
        cp_rank=run.context_rank,
        cp_size=run.layout.context_parallel_size,
        cu_seqlens=packed.boundaries(lengths),
    )
    whole = torch.randn(sum(lengths), 1, 8, generator=torch.Generator().manual_seed(1))
    hidden = whole[shard.positions].requires_grad_()
    positions = torch.tensor([2, 3, 15, 16, 30])
    group = run.groups.tp if splits else run.groups.cp
    largest = LargestResult()
    with largest:
        rows = route(hidden, positions, shard, (group,), None if splits else group)
        (rows * torch.arange(1.0, 6)[:, None]).sum().backward()
    assert largest.numel <= hidden.numel()
    assert torch.equal(rows, whole[positions, 0])
    # Tensor-parallel ranks decode the same rows; the gradients of context-parallel ranks' shares are added up.
    expected = torch.zeros(sum(lengths)).index_put((positions,), torch.arange(1.0, 6) * (1 if splits else 2))
    assert torch.equal(hidden.grad[:, 0, 0], expected[shard.positions])


@case(ranks=2, **CONTEXT)
def packed_sequences_with_mrope_are_refused_before_any_angle_is_wrong(run: Run) -> None:
    """Megatron 0.19.2 would begin each sequence at the first of angles that are cut already."""
    spec = Setting(token_local=True).spec(run)
    spec.params["config"].mrope_section = [1, 1, 2]
    model = MimoModel(MimoModelConfig(replace(spec, params={**spec.params, **MROPE})))
    ids, sections = torch.arange(1, 9)[None], torch.arange(8).expand(3, 1, 8)
    assert model(ids, position_ids=sections)[0].shape[1] == 4  # one sequence is cut as Megatron's angles are
    with pytest.raises(ValueError, match="packed_seq_params with mrope under context parallelism"):
        model(ids, position_ids=sections, packed_seq_params=packed.packed_params([4, 4]))
    ours = MimoModel(MimoModelConfig(replace(spec, module=GridGPT, params={**spec.params, **MROPE})))
    assert ours(ids, position_ids=sections, packed_seq_params=packed.packed_params([4, 4]))[0].shape[1] == 4


@case(ranks=2, **CONTEXT)
def media_spans_that_see_the_whole_of_themselves_are_refused_under_context_parallelism(run: Run) -> None:
    model = MimoModel(MimoModelConfig(Setting(token_local=True).spec(run)))
    ids, spans = torch.arange(1, 9)[None], torch.tensor([-1, 0, 0, -1, -1, 1, 1, -1], dtype=torch.int32)
    assert model(ids, packed_seq_params=segmented(packed.boundaries([4, 4])))[0].shape[1] == 4
    with pytest.raises(ValueError, match="media spans .*expected none under context parallelism"):
        model(ids, packed_seq_params=segmented(packed.boundaries([4, 4]), spans=spans))
