"""README's example on two tensor-parallel ranks: its own code, and what is decoded there."""

import re
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mimo
from megatron_mimo.draws import restart_draws
from megatron_mimo.launch import Run
from tests.distributed.harness import case, relayout
from tests.distributed.shards import load_whole_weights, whole_weights

README = Path(__file__).parents[3] / "README.md"


def example() -> dict:
    """The names that README's first example defines, run as it is written in the run in progress."""
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", README.read_text(), flags=re.DOTALL)
    begun = megatron_mimo.initialize
    megatron_mimo.initialize = lambda: None  # the case's run is the one in progress; its arguments are not README's
    try:
        names: dict = {"__name__": "readme"}
        exec(compile(code, str(README), "exec"), names)
    finally:
        megatron_mimo.initialize = begun
    return names


def decoded(names: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """README's own line of decoding, after the same draws, and the likeliest next tokens `[B, S]`."""
    restart_draws(seed=3, step=0, microbatch=0)
    (line,) = re.findall(r"^drawn = .*$", README.read_text(), flags=re.MULTILINE)
    with torch.no_grad():
        exec(line, names)
        outputs, _ = names["model"](names["ids"][1:], runtime_gather_output=True)
    return names["drawn"], outputs.language.argmax(-1)


@case(ranks=2)
def the_readmes_example_decodes_at_tp_2_what_one_rank_decodes(run: Run) -> None:
    alone = example()
    weights = whole_weights(alone["model"])
    images, tokens = decoded(alone)

    run = relayout(tensor_model_parallel_size=2)
    cut = example()
    model = cut["model"]
    load_whole_weights(model, weights, run.groups.tp)
    found_images, found_tokens = decoded(cut)
    assert found_images.shape == (1, 1, 8, 8)
    torch.testing.assert_close(found_images, images, rtol=1e-4, atol=1e-5)  # sums of fp32 in another order
    assert torch.equal(found_tokens, tokens)
    of_rank_0 = found_images.clone()
    dist.broadcast(of_rank_0, src=0)
    assert torch.equal(of_rank_0, found_images)

    # Without the word a rank has its shard of the vocabulary, whose likeliest entry is no token id.
    with torch.no_grad():
        shard, _ = model(cut["ids"][1:])
        whole, _ = model(cut["ids"][1:], runtime_gather_output=True)
    size = whole.language.shape[-1] // 2
    assert shard.language.shape[-1] == size
    assert torch.equal(shard.language, whole.language[..., run.groups.tp.rank() * size :][..., :size])
