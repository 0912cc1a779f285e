"""Sequences packed one behind the other, and the same ones alone."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional as F

from megatron_mimo import LossTerm, MimoModel, loss_terms, total_loss
from tests import tiny
from tests.distributed.cases.decoders import SPAN

#: Length, length in the packed batch, first positions of images to read (READ_ROWS each) and of spans to write.
#: Padded lengths are multiples of 4, as CP 2 needs. Under CP 2 the third's chunks start at 3, 6 and 9: its
#: first span's predecessor is on the other rank. The second has text alone, the third ends in what it writes.
SEQUENCES = ((8, 8, (1,), (5,)), (4, 4, (), ()), (11, 12, (), (3, 8)), (6, 8, (4,), (1,)))
READ_ROWS = 2


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed_params(own: list[int], padded: list[int] | None = None) -> PackedSeqParams:
    padded = padded or own
    cu, cu_padded = boundaries(own), None if padded == own else boundaries(padded)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        cu_seqlens_q_padded=cu_padded,
        cu_seqlens_kv_padded=cu_padded,
        max_seqlen_q=max(padded),
        max_seqlen_kv=max(padded),
    )


def alone(opens: bool = False) -> list[dict]:
    """Each sequence as a batch of one; with `opens` the last one opens with what it writes."""
    draw = torch.Generator().manual_seed(13)
    batches = []
    for index, (length, _, reads, writes) in enumerate(SEQUENCES):
        if opens and index == len(SEQUENCES) - 1:
            writes = (0,)
        ids = torch.randint(0, 60, (1, length), generator=draw)
        for start in reads:
            ids[0, start : start + READ_ROWS] = tiny.READ
        for start in writes:
            ids[0, start : start + SPAN] = tiny.WRITE
        batch = {
            "input_ids": ids,
            "labels": ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1),
            "loss_mask": (torch.rand(ids.shape, generator=draw) > 0.3).float(),
        }
        if reads:
            images = torch.randn(len(reads), READ_ROWS, tiny.PIXELS, generator=draw)
            batch["modality_inputs"] = {"images": {"patches": {"x": images}}}
        batches.append(batch)
    return batches


def spans() -> list[int]:
    """How many spans each sequence writes."""
    return [len(writes) for _, _, _, writes in SEQUENCES]


def packed(batches: list[dict], padded: bool = True) -> dict:
    """All of them behind each other; `padded` to their lengths in the packed batch."""
    own = [batch["input_ids"].shape[1] for batch in batches]
    lengths = [length for _, length, _, _ in SEQUENCES] if padded else own
    return {**joined(batches, lengths, 1), "packed_seq_params": packed_params(own, lengths)}


def padded(batches: list[dict]) -> dict:
    """All of them as the samples of one batch."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    return joined(batches, [longest] * len(batches), 0)


def joined(batches: list[dict], lengths: list[int], dim: int) -> dict:
    tokens = {
        name: torch.cat(
            [F.pad(batch[name], (0, n - batch[name].shape[1])) for batch, n in zip(batches, lengths)], dim=dim
        )
        for name in ("input_ids", "labels", "loss_mask")
    }
    images = [batch["modality_inputs"]["images"]["patches"]["x"] for batch in batches if "modality_inputs" in batch]
    return {**tokens, "modality_inputs": {"images": {"patches": {"x": torch.cat(images)}}}}


def shares(model: MimoModel, targets: dict) -> list[dict | None]:
    """Each sequence's part of the targets."""
    decoder = model.modality_submodules["images"].decoders["out"]
    rows, start, parts = SPAN // decoder.rows_per_item, 0, []
    for count in spans():
        stop = start + count * rows
        parts.append(decoder.share(targets, start, stop) if count else None)
        start = stop
    return parts


def language_spec(config, **changes) -> ModuleSpec:
    return tiny.language_spec(config, **changes)


def step(
    model: MimoModel, batches: list[tuple[dict, dict | None]], counts: dict[str, Tensor]
) -> tuple[dict[str, LossTerm], dict[str, Tensor]]:
    """Every loss term added up over the batches and their targets, and every gradient."""
    model.zero_grad()
    terms: dict[str, LossTerm] = {}
    for batch, targets in batches:
        given = {} if targets is None else {"modality_targets": {"images": {"out": targets}}}
        outputs, loss_mask = model(**batch, **given)
        found = loss_terms(outputs, loss_mask)
        total_loss(found, model.loss_weights, counts).backward()
        for name, term in found.items():
            term = LossTerm(term.sum.detach(), term.count.detach())
            terms[name] = terms[name] + term if name in terms else term
    return terms, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def step_counts(model: MimoModel, batches: list[dict], targets: dict) -> dict[str, Tensor]:
    decoder = model.modality_submodules["images"].decoders["out"]
    return {
        "text": sum(batch["loss_mask"].sum() for batch in batches),
        "images/out": torch.tensor(decoder.count(targets)),
    }
