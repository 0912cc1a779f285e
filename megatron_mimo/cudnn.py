"""Which cuDNN a process has loaded. Two of them end replays of their attention in illegal memory accesses.

Torch brings a cuDNN of its own. TransformerEngine takes the one that CUDNN_HOME names, and the libraries beside it
from where the loader finds them, often the system's: libraries of one version then call into those of another.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MAPS = Path("/proc/self/maps")


def cudnn_folders() -> tuple[str, ...]:
    """Folders of the cuDNN libraries in this process, in order; none where the system does not list what is loaded."""
    try:
        maps = MAPS.read_text()
    except OSError:
        return ()
    paths = re.findall(r"(/\S*/libcudnn[^/\s]*\.so\S*)$", maps, re.MULTILINE)
    return tuple(sorted({os.path.dirname(os.path.realpath(path)) for path in paths}))


def check_one_cudnn(what: str) -> None:
    """Refuses what replays cuDNN's kernels where the process has two cuDNN.

    Args:
        what: begins the message.

    Raises:
        ValueError: naming the folders.
    """
    found = cudnn_folders()
    if len(found) > 1:
        own = next((folder for folder in found if "site-packages" in folder), found[0])
        raise ValueError(
            f"{what}: expected one cuDNN in the process, found libraries from {' and '.join(found)}: replays of their "
            f"attention end in illegal memory accesses. Start Python with CUDNN_HOME={own} LD_LIBRARY_PATH={own}, "
            "where torch's own are."
        )
