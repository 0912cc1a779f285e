"""The examples in the decoders' docstrings."""

import doctest
import importlib

import pytest
import torch

ROOMS = [
    "draws",
    "decoders.base",
    "decoders.diffusers",
    "decoders.discrete",
    "decoders.flow",
    "decoders.flow_transformer",
    "decoders.guidance",
    "decoders.inputs",
    "decoders.layers",
    "decoders.rectified_flow",
    "decoders.regression",
    "decoders.tokenizers",
]


@pytest.mark.parametrize("room", ROOMS)
def test_the_examples_of_a_room_run(room, single_process):
    module = importlib.import_module(f"megatron_mimo.{room}")
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch, "nn": torch.nn})
    assert attempted and not failed
