"""N ranks equal one rank: three optimizer steps of a whole MimoModel on every layout.

The reference is the same model on one rank without DDP, stepped by torch's own optimizer on the
whole batch. Then the layout: Megatron's DDP, optimizer and pipeline schedule, and the library's forward
step. Compared are the loss and the gradient norm of three steps, every gradient of the first, and every weight after
the third, which is clipped. Microbatches differ in how many tokens count, and half of them have no image. Before,
the copies of a parameter that ranks initialised for themselves are compared with each other.

How losses are scaled does not depend on the layout, so `calculate_per_token_loss` is turned off on two layouts
alone, which have every axis between them.

Adam's epsilon is 0.1, far above rounding, which enters a weight multiplied by learning rate / epsilon
where a gradient is zero: with 1e-8 the first step is the gradient's sign, and with 1e-3 the rounding of
a loss that is multiplied by the step's tokens and divided by them again comes to 2e-5 of a bias.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mimo import MimoModel, loss_terms, total_loss
from megatron_mimo.launch import Run
from megatron_mimo.training.forward import ForwardStep
from tests import tiny
from tests.distributed.harness import case, relayout
from tests.distributed.setting import Setting

SAMPLES, LENGTH, STEPS, LEARNING_RATE, EPSILON = 4, 16, 3, 1e-2, 0.1
TOLERANCE = 1e-5  # of a tensor's largest element: float32 keeps 1e-7, summed in other orders


def whole_batch() -> list[dict]:
    """Four samples as microbatches of one, which read and write through one encoder or the other.

    The last two are text: with two data-parallel ranks the second has no image at all.
    """
    draw = torch.Generator().manual_seed(7)
    microbatches = []
    for encoder, read, write in (("patches", 2, 3), ("strokes", 3, 2), (None, 0, 0), (None, 0, 0)):
        ids = torch.randint(0, 60, (1, LENGTH), generator=draw)
        ids[0, 1 : 1 + read] = tiny.READ
        ids[0, 9 : 9 + write] = tiny.WRITE
        arguments = dict(
            input_ids=ids,
            labels=ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1),
            loss_mask=(torch.rand(1, LENGTH, generator=draw) > 0.3).float(),
        )
        if read:
            patches = torch.randn(1, read, tiny.PIXELS, generator=draw)
            arguments["modality_inputs"] = {"images": {encoder: {"x": patches}}}
        if write:
            pixels = torch.randn(write, tiny.PIXELS, generator=draw)
            arguments["modality_targets"] = {"images": {"pixels": {"pixels": pixels}}}
        microbatches.append(arguments)
    return microbatches


def step_counts(microbatches: list[dict]) -> dict[str, Tensor]:
    tokens = sum(arguments["loss_mask"].sum() for arguments in microbatches)
    targets = [arguments["modality_targets"] for arguments in microbatches if "modality_targets" in arguments]
    pixels = sum(target["images"]["pixels"]["pixels"].numel() for target in targets)
    return {"text": tokens, "images/pixels": torch.tensor(float(pixels))}


def loss_of(model: MimoModel, outputs, loss_mask, counts) -> Tensor:
    return total_loss(loss_terms(outputs, loss_mask), model.loss_weights, counts)


@dataclass(frozen=True)
class Reference:
    initial: dict[str, Tensor]
    losses: list[Tensor]
    norms: list[Tensor]
    gradients: dict[str, Tensor]
    final: dict[str, Tensor]


def reference(setting: Setting) -> Reference:
    """Three steps of the whole batch on one rank."""
    torch.manual_seed(5)
    model = MimoModel(replace(setting.mimo_config(None), loss_where_counted=False))
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=EPSILON)
    batch = whole_batch()
    counts, losses, norms, gradients = step_counts(batch), [], [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for arguments in batch:
            outputs, loss_mask = model(**arguments)
            part = loss_of(model, outputs, loss_mask, counts)
            part.backward()
            loss += part.detach()
        losses.append(loss)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip(step, norms[-1]))
        optimizer.step()
    final = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Reference(initial, losses, norms, gradients, final)


def clip(step: int, norm: Tensor) -> float:
    """The largest gradient norm that a step keeps: all of it, but for the last step, which keeps half."""
    return norm.item() / 2 if step == STEPS - 1 else 1e9


def chunks(run: Run, setting: Setting) -> list[DistributedDataParallel]:
    """This rank's model chunks in DDP, one for each virtual pipeline stage."""
    layout = run.layout
    stages = layout.virtual_pipeline_model_parallel_size or 1
    first, last = run.pipeline_rank == 0, run.pipeline_rank == layout.pipeline_model_parallel_size - 1
    config, models = setting.mimo_config(run), []
    for stage in range(stages):
        model = MimoModel(
            config,
            pre_process=first and stage == 0,
            post_process=last and stage == stages - 1,
            vp_stage=stage if stages > 1 else None,
        )
        models.append(model)
    wrapping = DistributedDataParallelConfig(
        overlap_grad_reduce=setting.distributed_optimizer,
        overlap_param_gather=setting.distributed_optimizer,
        use_distributed_optimizer=setting.distributed_optimizer,
        bucket_size=2000 if setting.distributed_optimizer else None,
    )
    return [
        DistributedDataParallel(model.config, wrapping, model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]


def own_part(model: MimoModel, run: Run, setting: Setting, whole: dict) -> Iterator[tuple]:
    """(parameter, this rank's part of its entry in `whole`, its name) for every parameter."""
    layers = model.language_model.decoder.layers
    experts_here = (setting.experts or 0) // run.layout.expert_model_parallel_size
    for name, parameter in model.named_parameters():
        entry = re.sub(r"layers\.(\d+)", lambda m: f"layers.{layers[int(m[1])].layer_number - 1}", name)
        entry = re.sub(
            r"local_experts\.(\d+)",
            lambda m: f"local_experts.{int(m[1]) + run.expert_rank * experts_here}",
            entry,
        )
        if setting.tied:
            entry = entry.replace("output_layer.weight", "embedding.word_embeddings.weight")
        part = whole[entry]
        if part.shape != parameter.shape:
            part = part.chunk(run.groups.tp.size(), parameter.partition_dim)[run.tensor_rank]
        yield parameter, part, name


def close(found: Tensor, expected: Tensor, name: str) -> None:
    scale = max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale, msg=lambda m: f"{name}: {m}")


def whole_main_gradients(model: DistributedDataParallel) -> None:
    """Fills in the parts of the gradient buffers that the distributed optimizer left on other ranks."""
    for group in model.bucket_groups + model.expert_parallel_bucket_groups:
        for bucket in group.buckets:
            ranks = group.intra_distributed_optimizer_instance_group
            own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def train(run: Run, setting: Setting, expected: Reference) -> None:
    models = chunks(run, setting)
    for model in models:
        copies_are_equal(model.module, run)
        with torch.no_grad():
            for parameter, part, _ in own_part(model.module, run, setting, expected.initial):
                parameter.copy_(part)
    config = models[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [model.no_sync for model in models] if len(models) > 1 else models[0].no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, adam_eps=EPSILON, weight_decay=0.0,
            use_distributed_optimizer=setting.distributed_optimizer, overlap_param_gather=setting.distributed_optimizer,
        ),
        models,
    )  # fmt: skip
    batch = whole_batch()
    per_rank = len(batch) // run.layout.data_parallel_size
    mine = batch[run.data_rank * per_rank : (run.data_rank + 1) * per_rank]
    forward_step = ForwardStep(microbatches=lambda: per_rank, step=lambda: 0, seed=1)
    for step in range(STEPS):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        iterators = [iter(mine) for _ in models]
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(models) > 1 else iterators[0],
            model=models if len(models) > 1 else models[0],
            num_microbatches=per_rank,
            seq_length=LENGTH,
            micro_batch_size=1,
        )
        if reports:
            loss = sum(report["loss"][0] for report in reports)
            dist.all_reduce(loss, group=run.groups.dp_cp)
            close(loss, expected.losses[step], f"loss of step {step}")
        if step == 0:
            compare_gradients(models, run, setting, expected)
        for part in optimizer.chained_optimizers:
            part.config.clip_grad = clip(step, expected.norms[step])
        _, norm, _ = optimizer.step()
        close(torch.tensor(norm), expected.norms[step], f"gradient norm of step {step}")
    for model in models:
        if setting.distributed_optimizer:
            model.start_param_sync(force_sync=True)
        for parameter, part, name in own_part(model.module, run, setting, expected.final):
            close(parameter.detach(), part, f"{name} after {STEPS} steps")


def copies_are_equal(model: MimoModel, run: Run) -> None:
    """What ranks share they have initialised alike, each for itself."""
    for name, parameter in model.named_parameters():
        of_expert = not getattr(parameter, "allreduce", True)
        groups = [run.groups.expt_dp if of_expert else run.groups.dp_cp]
        if not getattr(parameter, "tensor_model_parallel", False):
            groups.append(run.groups.expt_tp if of_expert else run.groups.tp)
        for group in groups:
            copies = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(copies, parameter.detach().contiguous(), group=group)
            assert all(copy.equal(parameter) for copy in copies), f"{name}: copies differ at the start"


def compare_gradients(models, run: Run, setting: Setting, expected: Reference) -> None:
    for model in models:
        if setting.distributed_optimizer:
            whole_main_gradients(model)
        for parameter, part, name in own_part(model.module, run, setting, expected.gradients):
            close(parameter.main_grad, part, f"gradient of {name}")


EVERY_AXIS = Setting(sequence_parallel=True, experts=4)
#: name -> ranks, parallel sizes, setting. One line a layout; each is a test.
LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2), Setting()),
    "tp2_sp": (2, dict(tensor_model_parallel_size=2), Setting(sequence_parallel=True)),
    "dp2": (2, {}, Setting()),
    "dp2_distributed_optimizer": (2, {}, Setting(distributed_optimizer=True)),
    "pp2": (2, dict(pipeline_model_parallel_size=2), Setting()),
    "pp2_tied": (2, dict(pipeline_model_parallel_size=2), Setting(tied=True)),
    "pp2_vpp2": (
        2,
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        Setting(),
    ),
    "pp2_vpp2_tied": (
        2,
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        Setting(tied=True),
    ),
    "pp2_uneven": (
        2,
        dict(pipeline_model_parallel_size=2),
        Setting(stages=dict(num_layers_in_first_pipeline_stage=1)),
    ),
    "pp2_layers_on_the_last_stage": (
        2,
        dict(pipeline_model_parallel_size=2),
        Setting(stages=dict(pipeline_model_parallel_layout="E|ttttL")),
    ),
    "ep2": (2, dict(expert_model_parallel_size=2), Setting(experts=4)),
    "cp2": (2, dict(context_parallel_size=2), Setting(token_local=True)),
    "tp2_pp2": (
        4,
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        Setting(sequence_parallel=True),
    ),
    "pp4": (4, dict(pipeline_model_parallel_size=4), Setting()),
    "ep2_pp2": (
        4,
        dict(expert_model_parallel_size=2, pipeline_model_parallel_size=2),
        Setting(experts=4),
    ),
    "tp2_ep2": (
        4,
        # Experts cut over TP gather unequal numbers of tokens, which gloo cannot.
        dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
        Setting(sequence_parallel=True, experts=4),
    ),
    "cp2_pp2": (
        4,
        dict(context_parallel_size=2, pipeline_model_parallel_size=2),
        Setting(token_local=True),
    ),
    "dp2_pp2": (4, dict(pipeline_model_parallel_size=2), Setting(distributed_optimizer=True)),
    "tp2_cp2": (
        4,
        dict(tensor_model_parallel_size=2, context_parallel_size=2),
        Setting(sequence_parallel=True, token_local=True),
    ),
    "tp2_pp2_dp2_ep2": (
        8,
        dict(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
        EVERY_AXIS,
    ),
    "tp2_pp2_cp2_ep2": (
        8,
        dict(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            context_parallel_size=2,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
        replace(EVERY_AXIS, token_local=True),
    ),
}


def register(name: str, ranks: int, sizes: dict, setting: Setting) -> None:
    def equals_one_rank(run: Run) -> None:
        expected = reference(setting)
        for per_token in (True, False) if ranks == 8 else (True,):
            train(relayout(**sizes), replace(setting, per_token=per_token), expected)

    equals_one_rank.__name__ = f"{name}_equals_one_rank"
    case(ranks=ranks, timeout_s=120)(equals_one_rank)


for name, (ranks, sizes, setting) in LAYOUTS.items():
    register(name, ranks, sizes, setting)
