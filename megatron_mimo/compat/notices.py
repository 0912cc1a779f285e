"""Megatron's notices that a user of this library can do nothing about, answered in one place.

Each is answered by its exact text and the module that says it, and only while `Answered` is entered: where this
package imports Megatron (`megatron_mimo.X`, `from megatron_mimo import X`), and from `initialize` to `shutdown`. Code
that imports Megatron before this package hears what Megatron says of the extensions that are absent.

Last read in Megatron-Core 0.19.2 and torch 2.11. When a notice goes, remove its line;
`tests/unit/test_compat.py` looks for the texts in the installed version.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass
from typing import Any, cast

__all__ = ["LOGGED", "WARNED", "Answered", "Notice"]


@dataclass(frozen=True)
class Notice:
    """A warning or a line of a log.

    Args:
        text: how it begins.
        said_by: the module that warns, or the logger that logs.
        answer: why a user need not hear it.
    """

    text: str
    said_by: str
    answer: str


_NORMS = "`specs` puts a norm of its own, which has sequence parallelism, in place of that one"
_SUMS = "torch's foreach functions add up and scale gradients; README says how to install TransformerEngine or Apex"

#: UserWarnings.
WARNED = (
    Notice("Transformer Engine and Apex are not installed. Falling back to", "megatron.core.optimizer", _SUMS),
    Notice(
        "Transformer Engine and Apex are not installed. Falling back to", "megatron.core.optimizer.optimizer", _SUMS
    ),
    Notice(
        "Transformer Engine and Apex are not installed. Falling back to", "megatron.core.optimizer.clip_grads", _SUMS
    ),
    Notice(
        "Transformer Engine and Apex are not installed. Falling back to",
        "megatron.core.distributed.fsdp.src.megatron_fsdp.mixed_precision",
        _SUMS,
    ),
    Notice("Apex is not installed. Falling back to Torch Norm", "megatron.core.models.backends", _NORMS),
    Notice("Apex is not installed. Falling back to Torch Norm", "megatron.core.models.gpt.gpt_layer_specs", _NORMS),
    Notice("Apex is not installed. Falling back to Torch Norm", "megatron.core.models.vision.vit_layer_specs", _NORMS),
    Notice(
        "absl.logging is not installed. Using logging.getLogger",
        "megatron.core.hyper_comm_grid",
        "either logger says the same",
    ),
    Notice(
        "full scope is deprecated. Use empty cuda_graph_modules",
        "megatron.core.transformer.transformer_config",
        "it speaks of the default of an option that nobody gave",
    ),
)

#: Lines of a log, at level WARNING.
LOGGED = (
    Notice(
        "MCore's async save is deprecated",
        "megatron.core.dist_checkpointing.strategies.torch",
        "only its plan is taken; `training/checkpoints` writes the files",
    ),
    Notice(
        "GPTModel IS DEPRECATED.",
        "megatron.core.models.gpt.gpt_model",
        "docs/language_models.md says which of GPTModel and HybridModel to choose",
    ),
    Notice(
        "DistributedDataParallel: full_param_layout not provided",
        "megatron.core.distributed.distributed_data_parallel",
        "the layout that it computes is the one that would be handed in, by the same function",
    ),
    Notice(
        "No CUDA runtime is found, using CUDA_HOME=",
        "torch.utils.cpp_extension",
        "Megatron imports torch's compiler of extensions, which looks for a GPU; nothing is compiled",
    ),
)


class _Unsaid(logging.Filter):
    """Drops the records that begin as a notice does."""

    def __init__(self, notice: Notice) -> None:
        super().__init__()
        self._text = notice.text

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._text)


def _patterns(notice: Notice) -> tuple[str, str]:
    """Patterns of the text and of the module, as filters of warnings hold them."""
    return re.escape(notice.text), re.escape(notice.said_by) + r"\Z"


_filters = {notice: _Unsaid(notice) for notice in LOGGED}
_entered = 0


class Answered:
    """Within it, the notices of `WARNED` and `LOGGED` are not said. Everything else is.

    It may be entered within itself; the last to leave takes the filters away.

    Example:
        >>> with Answered():
        ...     logging.getLogger("megatron.core.models.gpt.gpt_model").warning("GPTModel IS DEPRECATED. Please ...")
    """

    def __enter__(self) -> Answered:
        global _entered
        _entered += 1
        for notice in WARNED:
            # An equal filter that is there moves to the front.
            text, said_by = _patterns(notice)
            warnings.filterwarnings("ignore", text, UserWarning, said_by)
        for notice, unsaid in _filters.items():
            logging.getLogger(notice.said_by).addFilter(unsaid)
        return self

    def __exit__(self, *exception: object) -> None:
        global _entered
        _entered -= 1
        if _entered:
            return
        # Not warnings.catch_warnings, which would take away with ours what the program has set meanwhile.
        ours = {_patterns(notice) for notice in WARNED}
        filters = cast("list[tuple[Any, ...]]", warnings.filters)
        filters[:] = [
            entry for entry in filters if tuple(getattr(entry[at], "pattern", None) for at in (1, 3)) not in ours
        ]
        for notice, unsaid in _filters.items():
            logging.getLogger(notice.said_by).removeFilter(unsaid)
