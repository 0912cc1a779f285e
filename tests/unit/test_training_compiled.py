"""A compiled encoder of Megatron's layers is one graph that computes what the encoder computes."""

import torch

from megatron_mimo.training.parts.compiled import CompiledForward
from tests import tiny
from tests.compiling import compiling, results, vision_transformer


def test_it_is_compiled_in_one_piece_whatever_ddp_hangs_on_its_parts(single_process):
    gathered = []

    def gather(module, *inputs) -> None:
        gathered.append(module)

    gather.__module__ = "megatron.core.distributed.distributed_data_parallel"  # as DDP's own hooks are known
    encoder, images = vision_transformer(tiny.language_config()), torch.randn(3, 3, 8, 8)
    plain = results(encoder, images)
    parts = list(encoder.modules())
    for part in parts:
        part.register_forward_pre_hook(gather)

    with compiling() as graphs:
        encoder.forward = CompiledForward(encoder)
        for _ in range(2):
            gathered.clear()
            torch.testing.assert_close(results(encoder, images), plain)
            assert gathered == [encoder, *parts], "the encoder itself runs its hook too"
    assert len(graphs) == 2, "one forward, one backward"
    assert all(len(part._forward_pre_hooks) == 1 for part in parts)
