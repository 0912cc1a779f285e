"""Moving rows: one signature, torch on the CPU, Triton on the GPU; `reference` says what each function does.

Tensors without memory (`torch.device("meta")`) have `shapes`.
"""

from importlib.util import find_spec
from types import ModuleType

import torch

from megatron_mimo.kernels import reference, shapes

_on_gpu: ModuleType = reference
if find_spec("triton") is not None:
    from megatron_mimo.kernels import triton

    _on_gpu = triton


def kernels_for(device: torch.device) -> ModuleType:
    """The kernels for tensors on `device`. A collator's tensors are on the CPU also where there is a GPU."""
    return {"cuda": _on_gpu, "meta": shapes}.get(device.type, reference)
