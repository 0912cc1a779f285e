"""Private and undocumented names of `megatron.core.optimizer`: version, reason, what to do when it goes.

Checked by `tests/unit/test_compat.py` on the installed version; last read in Megatron-Core 0.19.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from megatron_mimo.compat.megatron import single_optimizers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron.core.optimizer import MegatronOptimizer


class Master(NamedTuple):
    """A half-precision weight and the optimizer's float32 copy of it.

    Attributes:
        weight: of the model.
        part: elements of the flat weight that this rank's optimizer holds.
        master: float32, as many elements; None where it cannot be seen (fp8 weights, copies inside a fused optimizer).
    """

    weight: nn.Parameter
    part: slice
    master: Tensor | None

    def of_weight(self) -> Tensor:
        """This rank's part of the weight, flat."""
        return self.weight.detach().view(-1)[self.part]


def masters_of(optimizer: MegatronOptimizer) -> list[Master]:
    """The float32 copies that an optimizer steps, and the half-precision weights that it writes them into.

    Undocumented: `float16_groups`, `fp32_from_float16_groups` of `Float16OptimizerWithFloat16Params`,
    `model_float16_groups`, `shard_fp32_from_float16_groups` and `_get_model_param_range_map` of
    `DistributedOptimizer`, `is_stub_optimizer` of both.
    Reason: `reload_model_params` copies every weight, and what a copy has beyond the weight's bits would be lost; and
    nothing tells whether a weight has changed.
    When it goes: see what `reload_model_params` copies.
    """
    return [found for each in single_optimizers(optimizer) for found in _of_one(each)]


def _of_one(optimizer: MegatronOptimizer) -> Iterator[Master]:
    from megatron.core.fp8_utils import is_float8tensor
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    distributed = isinstance(optimizer, DistributedOptimizer)
    if not isinstance(optimizer, DistributedOptimizer | Float16OptimizerWithFloat16Params):
        return
    if optimizer.is_stub_optimizer:
        return
    weights = optimizer.model_float16_groups if distributed else optimizer.float16_groups
    masters = optimizer.shard_fp32_from_float16_groups if distributed else optimizer.fp32_from_float16_groups
    for some_weights, some_masters in zip(weights, masters):
        for weight, master in zip(some_weights, some_masters):
            part = slice(0, weight.numel())
            if distributed:
                held = optimizer._get_model_param_range_map(weight)["param"]
                part = slice(held.start, held.end)
            visible = master is not None and not is_float8tensor(weight)
            yield Master(weight, part, master.detach().view(-1) if visible else None)


def shards_of(optimizer: MegatronOptimizer) -> dict[nn.Parameter, slice] | None:
    """Parameter -> elements of its flat gradient that this rank's distributed optimizer steps; None if not distributed.

    A parameter of which this rank holds nothing is not there.

    Undocumented: `DistributedOptimizer.model_param_gbuf_map`, whose keys are this rank's parameters, and
    `_get_model_param_range_map`; `is_stub_optimizer`.
    Reason: a gradient that is reduced to shards is whole on no rank, and its norm is that of all of them.
    When it goes: see what `DistributedOptimizer._copy_model_grads_to_main_grads` copies.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    found: dict[nn.Parameter, slice] = {}
    distributed = False
    for each in single_optimizers(optimizer):
        if isinstance(each, DistributedOptimizer):
            distributed = True
            if each.is_stub_optimizer:
                continue
            for parameter in each.model_param_gbuf_map:
                held = each._get_model_param_range_map(parameter)["param"]
                found[parameter] = slice(held.start, held.end)
    return found if distributed else None
