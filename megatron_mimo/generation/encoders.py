"""Encoders of prompts' media recorded as CUDA graphs: their layers wait for launches as those of a decode step do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.compat.torch import flatten, run_watched, unflatten
from megatron_mimo.generation.graphs import Recorder

logger = logging.getLogger(__name__)

#: Forms of an encoder's inputs that are recorded; others that come again later run as they are.
MOST_FORMS = 8
#: As many forms that came once are remembered, those that came last.
_REMEMBERED = 256
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def recorded_encoders(model: Any, recorder: Recorder) -> Iterator[None]:
    """Within it, encoders replay their forward pass from the second call on with inputs of one form.

    Args:
        model: a `MimoModel`, borrowed. Encoders whose `forward` is replaced already are left as they are.
        recorder: captures and replays.
    """
    with ExitStack() as stack:
        for modality, submodule in model.modality_submodules.items():
            for name, encoder in submodule.encoders.items():
                device = next((parameter.device for parameter in encoder.parameters()), None)
                if device is not None and "forward" not in vars(encoder):
                    encoder.forward = RecordedForward(f"{modality}/{name}", encoder, recorder, device)
                    stack.callback(vars(encoder).pop, "forward")
        yield


class RecordedForward:
    """In place of an encoder's `forward`, without gradients.

    What it returns lies in memory of the graph, and is overwritten by the next call with inputs of this form.
    An encoder that needs the host (it reads sizes off a tensor, or moves one) is found out when it is watched before
    the capture, and runs as it is from then on.

    Args:
        name: of the encoder, in messages and keys.
        encoder: in evaluation mode.
        recorder: captures and replays.
        device: of the encoder's parameters and inputs.
    """

    def __init__(self, name: str, encoder: nn.Module, recorder: Recorder, device: torch.device) -> None:
        self._name, self._recorder = name, recorder
        self._forward: Callable[..., Any] = encoder.forward
        self._device = device
        self._held: dict[Hashable, tuple[list[Any], Callable[[], Any], list[Any]]] = {}
        self._seen: dict[Hashable, None] = {}
        self._plain = False

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        leaves, form = flatten((args, keywords))
        key = None if self._plain or torch.is_grad_enabled() else self._key(leaves, form)
        if key is None:
            return self._forward(*args, **keywords)
        held = self._held.get(key)
        if held is None:
            if len(self._held) == MOST_FORMS or not self._came(key):
                return self._forward(*args, **keywords)
            output, reason = run_watched(partial(self._forward, *args, **keywords), self._device)
            if reason is not None:
                self._plain = True
                logger.info("generation: encoder %s is not recorded, because of %s, which the host waits for",
                            self._name, reason)  # fmt: skip
                return output
            held = self._held[key] = self._buffers(leaves, form)
        kept, run, outputs = held
        for own, given in zip(kept, leaves):
            if isinstance(given, Tensor):
                own.copy_(given)

        def step() -> None:
            outputs[:] = [run()]

        self._recorder.run(("encoder", self._name, key), step, [])
        return outputs[0]

    def _came(self, key: Hashable) -> bool:
        """Whether inputs of this form came before; they have, from now on."""
        before = key in self._seen
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return before

    def _buffers(self, leaves: list[Any], form: Any) -> tuple[list[Any], Callable[[], Any], list[Any]]:
        """Inputs in memory of their own, the call that reads them, and where its output is put."""
        kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, keywords = unflatten(kept, form)
        return kept, partial(self._forward, *args, **keywords), []

    def _key(self, leaves: list[Any], form: Any) -> Hashable | None:
        """All but the tensors' content; None for inputs that a recording cannot stand for."""
        found: list[Hashable] = [form]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device != self._device:
                    return None
                found.append((leaf.shape, leaf.stride(), leaf.dtype))
            elif isinstance(leaf, _PLAIN):
                found.append((type(leaf), leaf))  # 1, 1.0 and True are equal, and no encoder need take them alike
            else:
                return None
        return tuple(found)
