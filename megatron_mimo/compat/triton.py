"""Launching a compiled Triton kernel by itself: version, reason, and what to do when it goes.

Imported where Triton is installed. Checked by `tests/unit/test_compat.py` and, on a GPU, by every test of the kernels
under `tests/gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

#: Versions of Triton on which the kernels' tests ran with direct launches: on an H100, 3.6.0. Others launch by
#: ``kernel[grid](...)``, which is slower and right everywhere.
TESTED = ((3, 6),)


def launches_directly(version: str) -> bool:
    """Whether a compiled kernel of this version of Triton is known to take what `launch` hands it.

    Example:
        >>> launches_directly("3.6.0"), launches_directly("3.5.1"), launches_directly("3.7.0"), launches_directly("4.0")
        (True, False, False, False)
    """
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) in TESTED if major.isdecimal() and minor.isdecimal() else False


#: Of the installed version.
DIRECT = launches_directly(triton.__version__)


def launcher(compiled: Any, device: int) -> Callable[..., None]:
    """What launches what ``kernel[grid](...)`` gave, without looking at the arguments again.

    Undocumented: `CompiledKernel.run(grid_x, grid_y, grid_z, stream, function, packed_metadata, launch_metadata,
    enter_hook, exit_hook, *arguments)`, and `triton.runtime.driver.active.get_current_stream(device)`; known of the
    versions in `TESTED`.
    Reason: at every launch Triton looks at every argument to find the variant to run, which costs the host more than
    the smallest batches cost the device. The names are looked up here, once a variant: some of them are computed.
    When it goes: nothing to do; a version that is not in `TESTED` launches by ``kernel[grid](...)``. To add one, run
    `tests/gpu/test_align_gpu.py` on it with the version put in.

    Args:
        compiled: a `CompiledKernel`, launched once before.
        device: index of the GPU.

    Returns:
        A function of the grid (programs along each axis) and the kernel's arguments, compile-time values included:
        addresses of tensors (None for an absent one), tuples of them, and numbers.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    current_stream = triton.runtime.driver.active.get_current_stream

    def launch(grid: tuple[int, int, int], *arguments: Any) -> None:
        x, y, z = grid
        run(x, y, z, current_stream(device), function, metadata, None, None, None, *arguments)

    return launch
