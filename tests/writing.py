"""Models that write, and what they answer without a cache, one whole forward pass a step."""

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

import megatron_mimo
from megatron_mimo.decoders import (
    CodeInput,
    CodeTargets,
    DiscreteDecoder,
    FlowDecoder,
    NoisedTargetInput,
    QueryInput,
    RegressionDecoder,
    TargetInput,
)
from tests import tiny
from tests.distributed.cases.decoders import feed
from tests.generating import language, spread

ROWS, WIDTH, BEGIN, END = 3, 12, 62, 63

CODES = dict(width=WIDTH, codebook_sizes=(10, 6), condition_dropout=0.1)
VECTORS = dict(width=WIDTH, target_width=4, position_rule="predecessor")
FLOW = dict(width=WIDTH, target_width=4, hidden_width=8, depth=1, rows_per_item=ROWS, condition_dropout=0.1)
KINDS: dict[str, tuple[type, dict[str, Any], ModuleSpec | None]] = {
    "codes": (DiscreteDecoder, CODES, feed(CodeInput, embedding_width=5)),
    "vectors": (RegressionDecoder, VECTORS, feed(TargetInput)),
    "flow": (FlowDecoder, FLOW, feed(NoisedTargetInput)),
    "flow-before": (FlowDecoder, FLOW | {"position_rule": "predecessor"}, feed(NoisedTargetInput)),
    "queries": (RegressionDecoder, dict(width=WIDTH, target_width=4), feed(QueryInput, rows_per_item=ROWS)),
    "flow-queries": (FlowDecoder, FLOW, feed(QueryInput, rows_per_item=ROWS)),
    "token": (RegressionDecoder, dict(width=WIDTH, target_width=4), None),
    "speech": (
        DiscreteDecoder,
        dict(width=WIDTH, targets=CodeTargets((10, 6), variable=True)),
        feed(CodeInput, embedding_width=5),
    ),
}


def config_of(kind: str, *, begin: int | None = BEGIN, end: int | None = END, write: int = tiny.WRITE, **settings):
    decoder, params, fed = KINDS[kind]
    of_language = settings.pop("language", "groups")
    spec = language(of_language, **settings)
    if decoder in (DiscreteDecoder, FlowDecoder):
        params = params | {"config": spec.params["config"]}
    parts: dict[str, Any] = dict(
        encoders={"patches": ModuleSpec(module=tiny.PatchEncoder)},
        input_projections=[tiny.linear(16, tiny.HIDDEN)],
        decoders={"out": ModuleSpec(module=decoder, params=params)},
        output_projections=[tiny.linear(tiny.HIDDEN, WIDTH)],
    )
    if fed is not None:
        parts["generation_input"] = fed
    return tiny.mimo_config(
        spec,
        modality_submodules={"images": ModuleSpec(module=megatron_mimo.VisionModalitySubmodules, submodules=parts)},
        special_token_ids={"images": tiny.READ},
        generation_token_ids={"images": write},
        begin_token_ids={} if begin is None else {"images": begin},
        end_token_ids={} if end is None else {"images": end},
    )


def model_of(kind: str, seed: int = 5, **options) -> megatron_mimo.MimoModel:
    model = megatron_mimo.MimoModel(config_of(kind, **options)).eval()
    spread(model)
    return model


def prompts(*lengths: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, 60, (n,), generator=draw).tolist()} for n in lengths or (4, 9, 6)]


def logits_of(model: megatron_mimo.MimoModel, ids: list[int], shown: dict[str, Tensor] | None) -> Tensor:
    """Logits `[V]` of what follows, when written spans show what was drawn."""
    given = {} if shown is None else {"generation_inputs": {"images": shown}}
    with torch.no_grad():
        return model(torch.tensor([ids]), **given)[0].language[0, -1].float()
