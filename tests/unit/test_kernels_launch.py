"""Kernels are launched by Triton the first time, then directly where that is known; stand-ins for compiled ones."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")

from megatron_mimo.compat import triton as direct  # noqa: E402
from megatron_mimo.kernels import triton as kernels  # noqa: E402

GRID = (2, 3, 1)


class Kernel:
    """Takes note of launches; `kernel[grid](...)` gives a compiled kernel, which takes note of its own."""

    def __init__(self) -> None:
        self.by_triton: list[tuple] = []
        self.directly: list[tuple] = []

    def __getitem__(self, grid):
        def launch(*arguments, num_warps):
            self.by_triton.append((grid, arguments, num_warps))
            run = lambda *given: self.directly.append(given)  # noqa: E731
            return SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return launch


@pytest.fixture
def stand_ins(monkeypatch):
    """No kernel compiled yet, and a driver whose streams are named by their device."""
    monkeypatch.setattr(kernels, "_launchers", {})
    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(
        direct, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    )


def aligned(length: int) -> torch.Tensor:
    tensor = torch.zeros(length)
    assert tensor.data_ptr() % 16 == 0
    return tensor


def test_a_tested_version_launches_directly_from_the_second_time_on(stand_ins, monkeypatch) -> None:
    monkeypatch.setattr(direct, "DIRECT", True)
    kernel, x, y, table = Kernel(), aligned(4), aligned(8), aligned(4)
    for _ in range(3):
        kernels._launch(kernel, GRID, (x, None, y), (5, 6), ("text", 4), (table,))
    assert kernel.by_triton == [(GRID, (x, None, y, (table,), 5, 6, "text"), 4)]
    addresses = (x.data_ptr(), None, y.data_ptr(), (table.data_ptr(),))
    directly = (*GRID, "stream of -1", "function", "metadata", None, None, None, *addresses, 5, 6, "text")
    assert kernel.directly == [directly] * 2


def test_another_version_launches_by_triton_every_time(stand_ins, monkeypatch) -> None:
    monkeypatch.setattr(direct, "DIRECT", False)
    kernel, x = Kernel(), aligned(4)
    for _ in range(3):
        kernels._launch(kernel, GRID, (x,), (5,), ("text", 4))
    assert len(kernel.by_triton) == 3
    assert not kernel.directly
    assert not kernels._launchers


def test_another_dtype_constant_or_unaligned_tensor_is_bound_by_triton_first(stand_ins, monkeypatch) -> None:
    monkeypatch.setattr(direct, "DIRECT", True)
    kernel, x = Kernel(), aligned(5)
    kernels._launch(kernel, GRID, (x,), (5,), ("text", 4))
    for tensor, constants in ((x.bfloat16(), ("text", 4)), (x, ("zero", 4)), (x, ("text", 8)), (x[1:], ("text", 4))):
        kernels._launch(kernel, GRID, (tensor,), (5,), constants)
    assert len(kernel.by_triton) == 5
    assert not kernel.directly


@pytest.mark.parametrize(
    ("version", "known"),
    [("3.6.0", True), ("3.6.1+git1", True), ("3.5.1", False), ("3.7.0", False), ("4.6.0", False), ("3.6rc1", False)],
)
def test_only_tested_versions_are_known_to_launch_directly(version: str, known: bool) -> None:
    assert direct.launches_directly(version) is known
