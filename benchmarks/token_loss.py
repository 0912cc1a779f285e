"""The language loss where labels count beside the loss everywhere: step time and peak memory of one language model.

    python -m benchmarks.token_loss                     # 0.5 B, V 151,936, S 4096, B 4, a fifth of the labels counts
    python -m benchmarks.token_loss --small             # toy sizes; on the CPU if there is no GPU

Forward, loss and backward of the same weights and the same batch: the loss everywhere and where labels count, each with
Megatron's plain and fused cross-entropy and with TransformerEngine's. No optimizer. The losses are compared before
anything is timed. On a GPU a step is launched kernel by kernel and replayed as one CUDA graph, which takes as long on
any host. Where Liger-Kernel is installed, its fused output layer and cross-entropy are timed beside ours, alone: from
the same hidden states to the gradients of states and weight, on every row and on the rows whose labels count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import megatron_mimo
from benchmarks.kinds import device_times, launches_a_second
from benchmarks.step import placed_on
from megatron_mimo import MimoModel, MimoModelConfig, specs
from megatron_mimo.sharding import sequence_shard
from megatron_mimo.token_loss import TokenLoss, counted_labels, rows_of_labels
from megatron_mimo.training.parts.captured import Captures

FULL = dict(layers=24, hidden=896, heads=14, groups=2, ffn=4864, vocabulary=151_936, length=4096, batch=4)
SMALL = dict(layers=2, hidden=32, heads=4, groups=2, ffn=64, vocabulary=1000, length=64, batch=2)
NONE = float("nan")  # a figure that a GPU has


#: The language model's settings for a kernel of the cross entropy. TransformerEngine's copies a number from the host
#: unless a graph is asked for.
KERNELS: dict[str, dict[str, Any]] = {
    "": {},
    ", fused": {"cross_entropy_loss_fusion": True},
    ", TransformerEngine's": {
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "te",
        "cuda_graph_impl": "full_iteration",
    },
}
#: What recipes switch on where TransformerEngine computes (docs/training.md).
SWITCHED = {"apply_rope_fusion": True, "bias_activation_fusion": True}


def config_of(size: dict[str, int], backend: str, dtype: torch.dtype, settings: dict[str, Any]) -> MimoModelConfig:
    config = TransformerConfig(
        num_layers=size["layers"],
        hidden_size=size["hidden"],
        num_attention_heads=size["heads"],
        num_query_groups=size["groups"],
        ffn_hidden_size=size["ffn"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        masked_softmax_fusion=False,
        **settings,
    )
    language = ModuleSpec(
        module=GPTModel,
        params=dict(
            config=config,
            transformer_layer_spec=specs.language_layer_spec(config, backend),
            vocab_size=size["vocabulary"],
            max_sequence_length=size["length"],
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
        ),
    )
    return MimoModelConfig(language_model=language)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--share", type=float, default=0.2, help="labels that count, of all")
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "transformer_engine"])
    parser.add_argument("--switched", action="store_true", help="with the other fused kernels that recipes switch on")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()

    run = megatron_mimo.initialize(seed=1, graph_safe_rng=True)
    on_gpu = run.device.type == "cuda"
    quiet = launches_a_second() if on_gpu else NONE
    size, dtype = SMALL if options.small else FULL, torch.bfloat16 if on_gpu else torch.float32
    draw = torch.Generator().manual_seed(0)
    shape = (size["batch"], size["length"])
    ids = torch.randint(0, size["vocabulary"], shape, generator=draw)
    mask = (torch.rand(shape, generator=draw) < options.share).float()
    backend = specs.choose_backend(options.backend)
    if options.switched and backend != "transformer_engine":
        parser.error(f"--switched: kernels of TransformerEngine, found layers by {backend}")
    models: dict[str, MimoModel] = {}
    kernels = {
        name: one for name, one in KERNELS.items() if backend == "transformer_engine" or "te" not in one.values()
    }
    for where, counted in (("everywhere", False), ("where labels count", True)):
        for kernel, settings in kernels.items():
            settings = settings | (SWITCHED if options.switched else {})
            model = MimoModel(replace(config_of(size, backend, dtype, settings), loss_where_counted=counted))
            model.to(run.device, dtype)
            if models:
                share_weights(model, next(iter(models.values())))
            models[f"{where}{kernel}"] = model
    first = next(iter(models.values()))
    on_host = dict(input_ids=ids, labels=ids.roll(-1, 1), loss_mask=mask)
    batch = placed_on(first, on_host, {name: tensor.to(run.device) for name, tensor in on_host.items()}, run.device)

    losses = {name: float(loss_of(model, batch).detach()) for name, model in models.items()}
    expected = losses["everywhere"]
    for name, loss in losses.items():
        if abs(loss - expected) > 2e-3 * abs(expected):
            raise RuntimeError(f"{name}: expected a loss of {expected}, found {loss}")
    calls = {name: partial(loss_of, model, batch) for name, model in models.items()}
    weights = list(first.parameters())  # all models have these
    figures = measure_calls(calls, weights, options.rounds, on_gpu)
    replayed = replays_ms(calls, weights, options.rounds, run.device, losses) if on_gpu else {}
    busy = {name: device_ms(call, weights) for name, call in calls.items()} if on_gpu else {}
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}, torch {torch.__version__}, layers by {backend}, {dtype}, {size}, {int(mask.sum())} labels count")
    if on_gpu:
        print(f"the host launches {quiet / 1e3:.0f} k small kernels a second")
    print("| loss | launched ms | x everywhere | one graph ms | x everywhere | device ms | peak GiB | loss |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (launched, peak, _) in figures.items():
        graph, ratio = replayed.get(name, NONE), figures["everywhere"][0] / launched
        print(
            f"| {name} | {launched:.2f} | {ratio:.3f} | {graph:.2f} | {replayed.get('everywhere', NONE) / graph:.3f} | "
            f"{busy.get(name, NONE):.2f} | {peak:.2f} | {losses[name]:.5f} |",
            flush=True,
        )

    heads(first, batch, ids, mask, size, dtype, options.rounds, on_gpu)


def heads(
    model: MimoModel,
    batch: dict,
    ids: Tensor,
    mask: Tensor,
    size: dict[str, int],
    dtype: torch.dtype,
    rounds: int,
    on_gpu: bool,
) -> None:
    """Prints output layer and loss alone, forward and backward: ours, and Liger-Kernel's where it is installed."""
    language = model.language_model
    device, weight = batch["labels"].device, language.shared_embedding_or_output_weight()
    states = torch.randn(size["length"], size["batch"], size["hidden"], device=device, dtype=dtype, requires_grad=True)
    labels, counts = batch["labels"], batch["loss_mask"] > 0
    total = int(mask.sum())
    shard = sequence_shard(size["length"], device=device)
    picked = counts.nonzero()  # [K, 2], of (b, s)

    def ours() -> Tensor:
        loss = TokenLoss(counted_labels(counts, shard, rows_of_labels(total, mask.numel(), device)), shard, None)
        losses = loss(
            hidden_states=states,
            labels=labels,
            output_layer=language.output_layer,
            output_weight=weight,
            scale_logits=lambda logits: logits,
            compute_language_model_loss=language.compute_language_model_loss,
        )
        return (losses.float() * batch["loss_mask"]).sum() / total

    calls = {"ours, where labels count": ours}
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=-100)
        hidden = labels.masked_fill(~counts, -100)
        calls["Liger-Kernel's, every row"] = lambda: liger(
            weight, states.transpose(0, 1).reshape(-1, size["hidden"]), hidden.flatten()
        )
        calls["Liger-Kernel's, where labels count"] = lambda: liger(
            weight, states[picked[:, 1], picked[:, 0]], labels[picked[:, 0], picked[:, 1]]
        )
    print("| output layer and loss alone | ms | peak GiB | loss |\n|---|---:|---:|---:|")
    for name, (milliseconds, peak, loss) in measure_calls(calls, [states, weight], rounds, on_gpu).items():
        print(f"| {name} | {milliseconds:.2f} | {peak:.2f} | {loss:.5f} |", flush=True)


def share_weights(model: MimoModel, source: MimoModel) -> None:
    """Lets `model` compute with the very parameters of `source`."""
    for name, module in model.named_modules():
        of_source = source.get_submodule(name)
        for parameter in dict(module.named_parameters(recurse=False)):
            setattr(module, parameter, getattr(of_source, parameter))


def loss_of(model: MimoModel, batch: dict) -> Tensor:
    losses, mask = model(**batch)
    assert isinstance(losses, Tensor) and mask is not None
    return (losses.float() * mask).sum() / mask.sum()


def measure_calls(
    calls: Mapping[str, Callable[[], Tensor]], leaves: Sequence[Tensor], rounds: int, on_gpu: bool
) -> dict[str, tuple[float, float, float]]:
    """Of each call: median milliseconds with its backward pass, the peak of GiB beyond what lay there before, its loss.

    They take turns, forwards and backwards, so that none has the device as another warmed it.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    peaks, losses = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 0.0)
    for index in range(rounds + 2):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            took, peak, losses[name] = _once(calls[name], leaves, on_gpu)
            if index >= 2:
                taken[name].append(took)
                peaks[name] = max(peaks[name], peak)
    return {name: (statistics.median(taken[name]) * 1e3, peaks[name], losses[name]) for name in calls}


def replays_ms(
    calls: Mapping[str, Callable[[], Tensor]],
    leaves: Sequence[Tensor],
    rounds: int,
    device: torch.device,
    expected: Mapping[str, float],
) -> dict[str, float]:
    """Median milliseconds of each call and its backward pass, replayed as one CUDA graph; in turns as well.

    Raises:
        RuntimeError: a replay gives another loss than `expected`.
    """
    captures: Captures[Tensor] = Captures(len(calls), 2, device)
    taken: dict[str, list[float]] = {name: [] for name in calls}

    def passes(call: Callable[[], Tensor], _: Sequence[Tensor]) -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = call()
        loss.backward()
        return loss.detach()

    for index in range(rounds + 4):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            torch.cuda.synchronize()
            began = time.perf_counter()
            loss = captures(name, (), partial(passes, calls[name]), captures.ready(name))
            torch.cuda.synchronize()
            if index >= 4:  # two that are launched, one that is captured, one more
                taken[name].append(time.perf_counter() - began)
                if abs(float(loss) - expected[name]) > 1e-5 * abs(expected[name]):
                    raise RuntimeError(f"{name}, replayed: expected a loss of {expected[name]}, found {float(loss)}")
    for leaf in leaves:
        leaf.grad = None
    return {name: statistics.median(times) * 1e3 for name, times in taken.items()}


def device_ms(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> float:
    """Milliseconds in which the device does anything, of a call and its backward pass, whatever the host takes."""

    def step() -> None:
        call().backward()
        for leaf in leaves:
            leaf.grad = None

    return device_times(step, 3)[1]


def _once(call: Callable[[], Tensor], leaves: Sequence[Tensor], on_gpu: bool) -> tuple[float, float, float]:
    """Seconds, GiB and loss of one call and its backward pass."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    loss = call()
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else float("nan")
    for leaf in leaves:
        leaf.grad = None
    return took, peak, float(loss.detach())


if __name__ == "__main__":
    main()
