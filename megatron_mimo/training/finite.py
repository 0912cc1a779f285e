"""Whether a step may move anything: its losses and gradients are finite, and something was learned.

Looked at between the schedule and the optimizer, in the message that brings the losses to the host anyway, so that a
GPU is waited for as often as without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_mimo.compat.megatron import gradient_buffers
from megatron_mimo.launch import Run
from megatron_mimo.training.agreement import all_gathered, gathered

#: What one microbatch reports on the last stage: `"<term> loss"` -> `[sum, count]`.
Logged = Mapping[str, Tensor]


class Gradients:
    """The largest magnitude in this rank's gradients of a step; one pass over them, read by no host.

    It is taken before they are reduced, so that the rank where a NaN arose is known; with `overlap_grad_reduce`
    afterwards, since some are reduced during the backward pass.

    Args:
        chunks: this rank's, as the schedules take them.
        finalize: what finalizes them, called as Megatron's `finalize_model_grads`.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], finalize: Callable[..., Any]) -> None:
        self._chunks = chunks
        self._finalize = finalize
        self.reduced = chunks[0].ddp_config.overlap_grad_reduce
        #: Float32 scalar on the device, NaN where a gradient is; None before the first step.
        self.largest: Tensor | None = None

    def finalize(self, *given: Any, **named: Any) -> Any:
        """Reduces and finalizes the gradients, for the schedule to call, and looks at them."""
        if not self.reduced:
            self.largest = self._largest()
        outcome = self._finalize(*given, **named)
        if self.reduced:
            self.largest = self._largest()
        return outcome

    def _largest(self) -> Tensor:
        found = [
            # A norm of infinite order passes NaN on and cannot overflow, as sums and squares can.
            torch.linalg.vector_norm(buffer, ord=math.inf, dtype=torch.float32)
            for chunk in self._chunks
            for buffer in gradient_buffers(chunk)
            if buffer.numel()
        ]
        device = next(self._chunks[0].parameters()).device
        return torch.stack(found).max() if found else torch.zeros((), device=device)

    def names(self) -> list[str]:
        """Parameters of this rank whose gradient is not finite now; waits for the device."""
        return [
            name
            for chunk in self._chunks
            for name, parameter in chunk.module.named_parameters()
            if parameter.requires_grad and not torch.isfinite(parameter.main_grad).all()
        ]


@dataclass(frozen=True)
class Found:
    """What the ranks know of a step before the optimizer moves anything; equal on all ranks but for `losses`.

    Args:
        losses: term -> mean over the step, on the last stage; empty elsewhere.
        learns: something was learned: a loss counted something, and some gradient is not zero.
        bad_losses: ranks with a loss that is not finite.
        bad_gradients: ranks with a gradient that is not finite.
    """

    losses: Mapping[str, float]
    learns: bool = True
    bad_losses: tuple[int, ...] = ()
    bad_gradients: tuple[int, ...] = ()


def look(logged: Sequence[Logged], run: Run, largest: Tensor | None = None, learned: float = 1.0) -> Found:
    """Brings a step's losses to the host, and whether losses and gradients are finite.

    Collective over all ranks; the host waits once.

    Args:
        logged: what the schedule gave, on the last stage; empty elsewhere.
        run: the layout and its process groups.
        largest: magnitude of this rank's gradients; None in evaluation, where there are none.
        learned: what the step's losses count, where this rank knows it, else 0.
    """
    names = list(logged[0]) if logged else []
    nothing = torch.zeros((), device=run.device)
    sums = torch.stack([torch.stack([each[name] for each in logged]).sum(0) for name in names]) if names else None
    bad = nothing if sums is None else (~torch.isfinite(sums)).any().float()
    own = torch.stack([bad, nothing if largest is None else largest, torch.full_like(nothing, learned)])
    told = all_gathered(own)
    if sums is not None:
        dist.all_reduce(sums, group=run.groups.dp_cp)
    host = torch.cat([told.flatten(), *([] if sums is None else [sums.flatten()])]).tolist()
    of_ranks = [host[3 * rank : 3 * rank + 3] for rank in range(run.world_size)]
    totals = zip(names, host[3 * run.world_size :: 2], host[3 * run.world_size + 1 :: 2])
    means = {name.removesuffix(" loss"): total / count for name, total, count in totals if count}
    magnitudes = [magnitude for _, magnitude, _ in of_ranks]
    bad_gradients = tuple(rank for rank, each in enumerate(magnitudes) if not math.isfinite(each))
    if not bad_gradients and not _sum_fits(magnitudes):
        bad_gradients = (magnitudes.index(max(magnitudes)),)
    return Found(
        losses=means,
        learns=any(count for _, _, count in of_ranks) and any(each != 0 for each in magnitudes),
        bad_losses=tuple(rank for rank, (bad_loss, _, _) in enumerate(of_ranks) if bad_loss),
        bad_gradients=bad_gradients,
    )


def _sum_fits(magnitudes: Sequence[float]) -> bool:
    """Whether no reduction of finite gradients overflows float32: none is above the sum of the ranks' largest."""
    return sum(magnitudes) <= torch.finfo(torch.float32).max


def refuse(found: Found, logged: Sequence[Logged], gradients: Gradients, step: int, newest: object) -> None:
    """Ends a step on every rank: names it, the ranks, and what is not finite on them. Collective over all ranks.

    Args:
        found: of the step.
        logged: what the schedule gave on this rank.
        gradients: of this rank.
        step: index of the step.
        newest: the newest whole checkpoint, None where there is none.

    Raises:
        FloatingPointError: always.
    """
    if found.bad_losses:
        ranks = found.bad_losses
        told = gathered(_bad_losses(logged))
    else:
        ranks = found.bad_gradients
        told = [_bad_gradients(names) for names in gathered(gradients.names())]
    where = "; ".join(f"rank {rank}: {told[rank]}" for rank in ranks)
    reduced = (
        " They were looked at after their reduction, which spreads a NaN over the ranks; without overlap_grad_reduce "
        "the rank where it arose is named."
        if gradients.reduced and not found.bad_losses and len(ranks) > 1
        else ""
    )
    kept = f"the newest checkpoint is {newest}" if newest is not None else "there is no checkpoint"
    raise FloatingPointError(
        f"step {step} is not finite. {where}.{reduced} The optimizer has not run: no weight has changed and nothing "
        f"was saved; {kept}. Look at what that rank read in this step, or go on from the checkpoint with a lower "
        "learning rate or gradient clipping."
    )


def check_weights(models: Sequence[nn.Module]) -> None:
    """Refuses weights that trained to NaN or infinity, which no checkpoint shall hold. The host waits once.

    Raises:
        FloatingPointError: naming the first of them.
    """
    trained = {
        name: parameter.detach()
        for model in models
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.numel()
    }
    if not trained:
        return
    largest = [torch.linalg.vector_norm(each, ord=math.inf, dtype=torch.float32) for each in trained.values()]
    finite = torch.isfinite(torch.stack(largest)).tolist()
    names = [name for name, one in zip(trained, finite) if not one]
    if names:
        raise FloatingPointError(
            f"{names[0]} {f'and {len(names) - 1} more tensors are' if len(names) > 1 else 'is'} not finite: no "
            "checkpoint is written of it, and those before it are kept. Go on from the newest with a lower learning "
            "rate."
        )


def _bad_losses(logged: Sequence[Logged]) -> str:
    found = [
        f"loss {name.removesuffix(' loss')!r} sums to {value[0].item():g} in microbatch {index} of {len(logged)}"
        for index, each in enumerate(logged)
        for name, value in each.items()
        if not torch.isfinite(value).all()
    ]
    # The weighted sum is bad because a term is.
    terms = [line for line in found if not line.startswith("loss 'loss'")] or found
    return " and ".join(terms[:3]) + (f" and {len(terms) - 3} more" if len(terms) > 3 else "")


def _bad_gradients(names: Sequence[str]) -> str:
    if not names:
        return "gradients whose sum over the ranks overflows"
    more = f" and of {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"the gradient of {names[0]}{more} is not finite, all losses are"
