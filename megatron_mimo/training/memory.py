"""What Megatron shards or moves to the host to save memory, and neither loop follows: refused by name."""

from __future__ import annotations

from collections.abc import Mapping

_SHARDED = (
    "parameters that FSDP shards are not the model's own, by which checkpoints, exports, freezing and generation here "
    "go. Shard the optimizer's state alone: use_distributed_optimizer"
)
_OFFLOADED = (
    "the optimizer's float32 copies on the host are not seen by checkpoints and by the check of weights that other "
    "code changed. Shard the optimizer's state: use_distributed_optimizer; or keep it in fewer bytes: "
    "use_precision_aware_optimizer"
)
#: Option -> why it is not followed and what to take in its place.
REFUSED = {
    "use_megatron_fsdp": _SHARDED,
    "use_custom_fsdp": _SHARDED,
    "use_torch_fsdp2": _SHARDED,
    "optimizer_cpu_offload": _OFFLOADED,
}


def check_memory(options: Mapping[str, object], spelt: str = "{}") -> None:
    """Refuses options that would be followed by Megatron and by nothing here. Rank-local, before anything is built.

    Args:
        options: by Megatron's names.
        spelt: how the caller spells one, such as "--{}".

    Raises:
        ValueError: naming the option, the reason and what to do instead.

    Example:
        >>> check_memory({"use_megatron_fsdp": False})
    """
    for name, reason in REFUSED.items():
        if options.get(name):
            option = spelt.format(name.replace("_", "-") if spelt.startswith("--") else name)
            raise ValueError(f"{option} is not supported: {reason}.")
