"""Two cuDNN in one process are seen."""

import pytest
import torch

from megatron_mimo import cudnn
from megatron_mimo.training.parts.graphed import GraphedForward

OWN = "/opt/lib/site-packages/nvidia/cudnn/lib"
SYSTEM = "/usr/lib/x86_64-linux-gnu"


def line(path: str) -> str:
    return f"7f1a80000000-7f1a80002000 r-xp 00000000 fe:00 1234   {path}\n"


def two_cudnn() -> str:
    return line(f"{OWN}/libcudnn.so.9") + line(f"{SYSTEM}/libcudnn_cnn.so.9") + line(f"{OWN}/libcudnn_graph.so.9.19.0")


@pytest.mark.parametrize(
    "maps, folders",
    [
        (two_cudnn(), (OWN, SYSTEM)),
        (line(f"{OWN}/libcudnn.so.9") + line(f"{OWN}/libcudnn_ops.so.9"), (OWN,)),
        (line("/lib/libcublas.so.13") + line("/srv/libcudnn/libother.so") + "7f00-7f01 rw-p 0 00:00 0\n", ()),
        (None, ()),
    ],
)
def test_folders_of_what_is_loaded(maps, folders, monkeypatch, tmp_path):
    if maps is not None:
        (tmp_path / "maps").write_text(maps)
    monkeypatch.setattr(cudnn, "MAPS", tmp_path / "maps")
    assert cudnn.cudnn_folders() == folders
    if len(folders) < 2:
        cudnn.check_one_cudnn("graphs")
        return
    with pytest.raises(
        ValueError, match=f"graphs: expected one cuDNN in the process, found .*CUDNN_HOME={OWN} LD_LIBRARY_PATH={OWN}"
    ):
        cudnn.check_one_cudnn("graphs")


def test_an_encoder_is_not_replayed_in_a_process_with_two(monkeypatch, tmp_path):
    (tmp_path / "maps").write_text(two_cudnn())
    monkeypatch.setattr(cudnn, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="Linear: CUDA graphs: expected one cuDNN in the process"):
        GraphedForward(torch.nn.Linear(2, 2))


def test_a_library_that_is_loaded_now_is_found():
    """Torch loads its own at import, where it is a build for GPUs."""
    assert len(cudnn.cudnn_folders()) == (torch.version.cuda is not None)
