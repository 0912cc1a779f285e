"""Names of version 0.1 at the places where they stood then; they give a DeprecationWarning, and go with version 0.3.

A module that is gone has a file of its name in this folder, which `megatron_mimo.__path__` and
`megatron_mimo.training.__path__` end with. A module that is still there and has lost names ends with
``__getattr__ = names_of(__name__)``. Both look into the tables below.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

#: Old module -> the module that has its names now; all below `megatron_mimo`.
MODULES = {
    "batch": "check.batch",
    "checkpoint": "sharded_state",
    "cpu": "compat.cuda_on_cpu",
    "sampling": "generation.in_the_loop",
    "submodules": "modality.submodules",
    "training.arguments": "training.pretraining.arguments",
    "training.batches": "data.step",
    "training.checkpoints": "training.checkpoints.saving",
    "training.compiled": "training.parts.compiled",
    "training.control": "training.parts.control",
    "training.counts": "training.speed.counts",
    "training.flops": "training.speed.flops",
    "training.graphed": "training.parts.graphed",
    "training.layouts": "layout",
    "training.loss": "training.scale",
    "training.pretraining": "training.pretraining.loop",
    "training.sampling": "data.order",
    "training.script": "training.pretraining.provider",
    "training.throughput": "training.speed.throughput",
    "training.transfer": "data.transfer",
    "widths": "modality.fit",
}

#: Names that went elsewhere than their module's others: old module and name -> new module.
NAMES = {
    ("submodules", "AudioModalitySubmodules"): "modality.kinds",
    ("submodules", "VisionModalitySubmodules"): "modality.kinds",
    ("batch", "check_token_tensors"): "check.tokens",
    ("batch", "default_loss_mask"): "labels",
    ("batch", "default_positions"): "plan",
    ("batch", "packed_padding"): "packed",
    ("training.pretraining", "DATA_ARGUMENTS"): "training.pretraining.checks",
    ("training.pretraining", "ModelConfig"): "training.pretraining.arguments",
    ("training.pretraining", "PartOverrides"): "training.pretraining.arguments",
    ("training.pretraining", "Recipe"): "training.pretraining.dataset",
    ("training.pretraining", "build_stage"): "training.chunks",
    ("training.pretraining", "check_recipe"): "training.pretraining.dataset",
    ("training.pretraining", "check_resumed"): "training.pretraining.checks",
    ("training.pretraining", "check_supported"): "training.pretraining.checks",
    ("training.pretraining", "dataset_provider"): "training.pretraining.dataset",
    ("training.pretraining", "seed_draws_once"): "training.pretraining.provider",
    ("training.pretraining", "with_loss_weights"): "training.pretraining.arguments",
    ("training.pretraining", "with_printable_help"): "compat.megatron_training",
    ("training.script", "check_in_effect"): "training.pretraining.checks",
    ("training.trainer", "DECAYS"): "training.settings",
}

#: Names that are others now: old module and name -> name in the new module.
RENAMED = {
    ("training.transfer", "Layout"): "Manifest",
    ("training.transfer", "pack"): "to_bytes",
    ("training.transfer", "unpack"): "from_bytes",
}

#: Names without a successor: old module and name -> what to do instead.
REMOVED = {
    (
        "decoders.base",
        "check_shapes",
    ): "a description of megatron_mimo.decoders.targets checks its targets",
    ("decoders.base", "check_tensors"): "a description of megatron_mimo.decoders.targets checks its targets",
    ("batch", "check_labels"): "MimoModel.forward checks its labels, by functions of megatron_mimo.check",
    ("deferred", "check"): "megatron_mimo.deferred.Checks holds the checks of one owner",
    ("deferred", "report"): "megatron_mimo.deferred.Checks.report() reports those of one owner",
    ("training.pretraining", "Replacement"): "megatron_mimo.compat.megatron_training replaces functions one by one",
    ("training.pretraining", "ModelProvider"): "megatron_mimo.training.model_provider builds every stage",
    ("training.pretraining", "check_no_config"): "megatron_mimo.training.model_provider refuses a configuration",
    ("training.pretraining", "check_used"): "check_supported and check_data_arguments of training.pretraining.checks",
}


def names_of(module: str) -> Callable[[str], object]:
    """`__getattr__` of an old module, which gives its names where they are now.

    Args:
        module: its ``__name__``.

    Example:
        >>> get = names_of("megatron_mimo.widths")
        >>> with warnings.catch_warnings(record=True):
        ...     get("input_width").__module__
        'megatron_mimo.modality.fit'
    """
    old = module.removeprefix("megatron_mimo.").removeprefix("moved.")

    def __getattr__(name: str) -> object:
        instead = REMOVED.get((old, name))
        home = NAMES.get((old, name), MODULES.get(old))
        if name.startswith("_") or instead is not None or home is None:
            raise AttributeError(
                f"module {module!r} has no attribute {name!r}" + (f" any more: {instead}" if instead else "")
            )
        new = RENAMED.get((old, name), name)
        try:
            found = getattr(import_module(f"megatron_mimo.{home}"), new)
        except AttributeError:
            raise AttributeError(f"module {module!r} has no attribute {name!r}") from None
        if isinstance(found, ModuleType):  # which the new module imports: `from package import module` asks here first
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"megatron_mimo.{old}.{name} has moved to megatron_mimo.{home}.{new}; import it from there. "
            "The old place goes with version 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return __getattr__
