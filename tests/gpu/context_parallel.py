"""What each of the two ranks of `test_context_parallel.py` runs."""

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

import megatron_mimo
from megatron_mimo import MimoModel, loss_terms, total_loss
from megatron_mimo.segments import segmented
from tests import tiny

# Each sample's length and its tokens' (first position, number).
SAMPLES = (
    (64, {tiny.READ: (13, 4), tiny.WRITE: (30, 20)}),
    (32, {tiny.HEAR: (6, 3), tiny.WRITE: (16, 2)}),
    (96, {}),
)
LENGTHS = [length for length, _ in SAMPLES]
# What counts in no loss at a sample's end may be padding, which causal attention shows to nobody.
PADDING = 2
LONGEST = max(LENGTHS)


def samples() -> list[dict]:
    """Three batches of one: the first reads and writes images, the second hears and writes, the third is text."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    batches = []
    for length, tokens in SAMPLES:
        ids = torch.randint(0, 60, (1, length), generator=draw)
        for token, (start, count) in tokens.items():
            ids[0, start : start + count] = token
        batch = {
            "input_ids": ids,
            "labels": ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1),
            "loss_mask": (torch.rand(1, length, generator=draw) > 0.3).float(),
        }
        batch["loss_mask"][:, -PADDING:] = 0.0
        if tiny.WRITE in tokens:
            pixels = normal(tokens[tiny.WRITE][1], tiny.PIXELS)
            batch["modality_targets"] = {"images": {"pixels": {"pixels": pixels}}}
        if tiny.READ in tokens:
            batch["modality_inputs"] = {"images": {"patches": {"x": normal(2, 2, tiny.PIXELS)}}}
        if tiny.HEAR in tokens:
            batch["modality_inputs"] = {"audio": {"frames": {"x": normal(3, tiny.PIXELS)}}}
        batches.append(batch)
    return batches


def pixels_of(batches: list[dict]) -> list[Tensor]:
    return [batch["modality_targets"]["images"]["pixels"]["pixels"] for batch in batches if "modality_targets" in batch]


def packed(batches: list[dict]) -> dict:
    """The samples as one packed sequence."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    tokens = ("input_ids", "labels", "loss_mask")
    return {key: torch.cat([batch[key] for batch in batches], dim=1) for key in tokens} | {
        "modality_inputs": batches[0]["modality_inputs"] | batches[1]["modality_inputs"],
        "modality_targets": {"images": {"pixels": {"pixels": torch.cat(pixels_of(batches))}}},
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=LONGEST, max_seqlen_kv=LONGEST
        ),
    }


def padded(batches: list[dict]) -> dict:
    """The same as the collator of packs of files makes it: padding behind each sample, boundaries known to the host."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    own = torch.tensor([0, *(length - PADDING for length in LENGTHS)]).cumsum(0).int()
    params = segmented(own, ends)
    for name, value in vars(params).items():
        if isinstance(value, Tensor):
            setattr(params, name, value.cuda())
    return packed(batches) | {"packed_seq_params": params}


def build(dtype: torch.dtype, context_parallel_size: int, weights: dict[str, Tensor] | None) -> MimoModel:
    config = tiny.language_config(
        kv_channels=64,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        context_parallel_size=context_parallel_size,
    )
    model = MimoModel(tiny.mimo_config(tiny.language_spec(config, max_sequence_length=sum(LENGTHS)))).to("cuda", dtype)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def on_gpu(value):
    if isinstance(value, dict):
        return {key: on_gpu(item) for key, item in value.items()}
    return value.cuda() if isinstance(value, Tensor) else value


def loss_and_gradients(model: MimoModel, batches: list[dict], counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss of all batches together, under "loss", and every parameter's gradient; this rank's part of the sums."""
    found = {"loss": torch.zeros((), device="cuda")}
    for batch in batches:
        terms = loss_terms(*model(**on_gpu(batch)))
        loss = total_loss(terms, model.loss_weights, counts)
        loss.backward()
        found["loss"] += loss.detach()
    return found | {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).norm().item()


def main() -> None:
    megatron_mimo.initialize(seed=1)  # two data-parallel ranks: each model is whole, and talks to nobody
    alone = samples()
    pixels = sum(targets.numel() for targets in pixels_of(alone))
    tokens = sum(batch["loss_mask"].sum() for batch in alone)
    counts = {"text": tokens.cuda(), "images/pixels": torch.tensor(float(pixels), device="cuda")}
    model = build(torch.float32, 1, None)
    weights = model.state_dict()
    for tensor in weights.values():
        if isinstance(tensor, Tensor) and tensor.is_cuda:  # TransformerEngine keeps states of its own on the host
            dist.broadcast(tensor, src=0)
    exact = loss_and_gradients(model, alone, counts)
    rounded = loss_and_gradients(build(torch.bfloat16, 1, weights), alone, counts)
    megatron_mimo.shutdown()

    run = megatron_mimo.initialize(context_parallel_size=2, seed=1)
    for name, batches in (("separate", alone), ("packed", [packed(alone)]), ("padded", [padded(alone)])):
        found = loss_and_gradients(build(torch.bfloat16, 2, weights), batches, counts)
        for tensor in found.values():
            dist.all_reduce(tensor, group=run.groups.cp)
        assert found.keys() == exact.keys()
        worst = {}
        for key, expected in exact.items():
            off, usual = distance(found[key], expected), distance(rounded[key], expected)
            # Rounding to bfloat16 moves a gradient by `usual`; a part left out or counted twice by its own size.
            size = expected.norm().item()
            assert off <= 2 * usual + 2e-3 * size, f"{name}, {key}: off by {off}, usual {usual}, norm {size}"
            worst[key] = off / size
        if run.rank == 0:
            print(
                f"{name}: loss off by {worst['loss']:.1e}, gradients by {max(worst.values()):.1e} of their norm at most"
            )
    megatron_mimo.shutdown()


if __name__ == "__main__":
    main()
