"""What a model says of an image, word after word, each the likeliest."""

from pathlib import Path

import torch
from torch import Tensor

import megatron_mimo
from examples.llava.reading import reading
from megatron_mimo import MimoModel
from megatron_mimo.data import conversation_of


def asked(model: MimoModel, image: Path, question: str) -> tuple[Tensor, Tensor]:
    """Ids `[1, S]` of a question about an image, up to where the answer begins, and pixels `[1, 3, height, width]`."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "?"}]
    record = {"image": image.name, "conversations": turns}
    sample = reading(model.mimo_config)(conversation_of(record), image.parent)
    answer = int(sample.learn.int().argmax())
    (item,) = sample.items
    return sample.input_ids[None, :answer], item.tensors["tower"]["pixel_values"]


@torch.no_grad()
def caption(model: MimoModel, image: Path, question: str, *, tokens: int = 64) -> str:
    """The answer to a question about an image, at most `tokens` long. On one rank.

    Each word is a pass over all before it: an example, not a server. `vllm serve` takes what `export` writes.
    """
    tokenizer = megatron_mimo.load_processor(model).tokenizer
    device = next(model.parameters()).device
    ids, pixels = (one.to(device) for one in asked(model, image, question))
    begin = ids.shape[1]
    for _ in range(tokens):
        logits, _ = model(ids, modality_inputs={"images": {"tower": {"pixel_values": pixels}}})
        following = logits[:, -1:].argmax(-1)
        if following.item() == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following], dim=1)
    return tokenizer.decode(ids[0, begin:])
