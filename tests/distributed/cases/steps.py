"""What a training step promises on several ranks: its auxiliary losses, its refusals."""

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo.launch import Run
from megatron_mimo.training import Trainer, TrainerSettings
from tests.distributed.cases.training import PIPELINE, TENSOR, model_config
from tests.distributed.harness import case
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
