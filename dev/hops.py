"""Counts the calls that receive the very tensor of a microbatch: ``python dev/hops.py``, with the package to measure on
``PYTHONPATH``.

One training microbatch of a tiny model runs on the CPU: 2 reading tokens, 1 writing. `sys.setprofile` looks at every
Python function of the package as it is called, for ``input_ids``, one encoder's input, one target, and the language
model's states. Two counts: *handed*, where an argument is the tensor or a dict, list or tuple that holds it; *carried*,
where it only comes along inside a dataclass (a plan, a placement). What Megatron and torch do inside is not counted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.decoders import RegressionDecoder

PACKAGE = Path(megatron_mimo.__file__).parent
READ, WRITE, HIDDEN, PIXELS = -200, 61, 32, 6


def linear(inputs: int, outputs: int) -> ModuleSpec:
    return ModuleSpec(module=nn.Linear, params=dict(in_features=inputs, out_features=outputs))


def tiny_model() -> megatron_mimo.MimoModel:
    config = TransformerConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0,
        bias_dropout_fusion=False, calculate_per_token_loss=True,
    )  # fmt: skip
    language = ModuleSpec(
        module=GPTModel,
        params=dict(
            config=config, transformer_layer_spec=specs.language_layer_spec(config, "torch"), vocab_size=64,
            max_sequence_length=16, position_embedding_type="rope",
        ),
    )  # fmt: skip
    images = ModuleSpec(
        module=megatron_mimo.VisionModalitySubmodules,
        submodules=dict(
            encoders={"patches": ModuleSpec(module=Encoder)},
            input_projections=[linear(16, HIDDEN)],
            decoders={"pixels": ModuleSpec(module=RegressionDecoder, params=dict(width=HIDDEN, target_width=PIXELS))},
            output_projections=[linear(HIDDEN, HIDDEN)],
        ),
    )
    return megatron_mimo.MimoModel(
        megatron_mimo.MimoModelConfig(
            language_model=language,
            modality_submodules={"images": images},
            special_token_ids={"images": READ},
            generation_token_ids={"images": WRITE},
            loss_where_counted=False,  # else the language loss, which was Megatron's alone before, reads states here
        )
    )


class Encoder(nn.Linear):
    """`[1, n, PIXELS]` -> `[1, n, 16]`."""

    def __init__(self) -> None:
        super().__init__(PIXELS, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def microbatch() -> dict:
    ids = torch.tensor([[1, READ, READ, 2, 3, WRITE, 4, 5]])
    return dict(
        input_ids=ids,
        labels=torch.tensor([[2, 1, 2, 3, 4, 4, 5, 1]]),
        loss_mask=torch.ones(1, 8),
        modality_inputs={"images": {"patches": {"x": torch.randn(1, 2, PIXELS)}}},
        modality_targets={"images": {"pixels": {"target": torch.randn(1, PIXELS)}}},
    )


def parts(value: object, carried: bool, depth: int = 4) -> Iterator[object]:
    """`value` and what dicts, lists and tuples hold; with `carried` dataclasses too."""
    yield value
    if depth == 0:
        return
    inner: list[object] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif carried and dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [vars(value)[field.name] for field in dataclasses.fields(value) if field.name in vars(value)]
    for part in inner:
        yield from parts(part, carried, depth - 1)


class Hops:
    """Functions of the package that receive a tensor, by the tensor's name, in order.

    Args:
        tensors: name -> tensor to follow; more are added with `follow`.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._kept = list(tensors.values())  # an id is a tensor's as long as it lives
        self.found: dict[str, list[str]] = {name: [] for name in tensors}

    def follow(self, name: str, tensor: Tensor) -> None:
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        self.found.setdefault(name, [])

    def run(self, function: Callable[[], object]) -> None:
        sys.setprofile(self._called)
        try:
            function()
        finally:
            sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)) or code.co_name.startswith("<"):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)]
        names += code.co_varnames[len(names) :][: bool(code.co_flags & 0x08)]
        arguments = [frame.f_locals[name] for name in names if name in frame.f_locals]
        call = f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}"
        handed = self._among(arguments, carried=False)
        for name in handed:
            self.found[name].append(call)
        for name in self._among(arguments, carried=True) - handed:
            self.found[name].append(f"{call} (carried)")

    def _among(self, arguments: list[object], carried: bool) -> set[str]:
        reached = (id(part) for value in arguments for part in parts(value, carried))
        return {self._names[number] for number in reached if number in self._names}


def hops() -> dict[str, list[str]]:
    """Tensor's name -> the calls of one microbatch that receive it, in order."""
    torch.manual_seed(0)
    model, batch = tiny_model(), microbatch()
    found = Hops(
        {
            "input_ids": batch["input_ids"],
            "input": batch["modality_inputs"]["images"]["patches"]["x"],
            "target": batch["modality_targets"]["images"]["pixels"]["target"],
        }
    )
    model.language_model.decoder.register_forward_hook(lambda *given: found.follow("states", given[-1]))

    def train() -> None:
        outputs, loss_mask = model(**batch)
        terms = megatron_mimo.loss_terms(outputs, loss_mask)
        megatron_mimo.total_loss(terms, model.loss_weights).backward()

    found.run(train)
    return found.found


if __name__ == "__main__":
    from megatron_mimo.launch import initialize, shutdown

    initialize(seed=1)
    print(f"{'tensor':<10} handed carried")
    for name, calls in hops().items():
        carried = sum(call.endswith("(carried)") for call in calls)
        print(f"{name:<10} {len(calls) - carried:6} {carried:7}")
        if "--calls" in sys.argv:
            print("".join(f"    {call}\n" for call in calls), end="")
    shutdown()
