"""Packed sequences on N ranks: the loss terms and gradients of the same sequences apart on one rank.

With attention under tensor and sequence parallelism. Context parallelism has no attention without
TransformerEngine; its layers are token-local, with learned positions, so that a row with the position of
another shows.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.launch import Run
from tests import packed
from tests.distributed.cases.decoders import build, copy_part, kinds, spread
from tests.distributed.cases.layouts import Setting, close, own_part
from tests.distributed.harness import case, relayout


def language(setting: Setting, run: Run | None) -> ModuleSpec:
    spec = setting.spec(run)
    if setting.token_local:
        changes = {"position_embedding_type": "learned_absolute"}
    else:
        changes = {"transformer_layer_spec": packed.packed_layers}
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
#: name -> ranks, parallel sizes, setting
LAYOUTS = {
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
