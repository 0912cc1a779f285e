"""Two cuDNN in one process are seen."""

import pytest

from megatron_mimo import cudnn

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


def test_a_library_that_is_loaded_now_is_found():
    """Torch loads its own at import, where it is a build for GPUs."""
    import torch

    assert len(cudnn.cudnn_folders()) == (torch.version.cuda is not None)
