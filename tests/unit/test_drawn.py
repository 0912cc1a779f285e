"""Drawn inputs against a reference in plain loops: what is valid gives its numbers, the rest is refused.

The reference knows nothing of placements, shards or deferred checks: it walks over positions one by one, embeds each,
runs the language model's transformer layers, and adds losses up. Cases are drawn from a seed, 2,000 in `make test`.
"""

import math
import random

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional as F

from megatron_mimo import MimoModel, MimoModelConfig, build_placement, loss_terms
from megatron_mimo.decoders.discrete import draw_codes
from tests import tiny

SEED = 20261126
SEEDS = st.integers(0, 2**32 - 1)
REFUSED = (ValueError, TypeError)


def share(part: float):
    """Draws `part` of what the profile says (200 or 2,000 over the whole file), the same in every run."""
    count = max(int(settings.default.max_examples * part), 1)

    def decorate(test):
        return seed(SEED)(settings(max_examples=count, deadline=None, database=None)(given(SEEDS)(test)))

    return decorate


# Forward ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(one_process) -> MimoModel:
    torch.manual_seed(0)
    config = tiny.language_config(num_layers=1)
    return MimoModel(tiny.mimo_config(tiny.language_spec(config)))


def drawn_ids(draw: random.Random) -> list[list[int]]:
    samples, length = draw.randint(1, 3), draw.randint(2, 10)
    choices = [*range(1, 60), *[tiny.READ] * 8, *[tiny.WRITE] * 8, *[tiny.HEAR] * 4]
    ids = []
    for _ in range(samples):
        row: list[int] = []
        while len(row) < length:
            row += [draw.choice(choices)] * draw.choice([1, 1, 2, 3])
        ids.append(row[:length])
    if draw.random() < 0.1:
        ids[draw.randrange(samples)][draw.randrange(length)] = draw.choice([-1, 64, 10**12, -(2**40)])
    return ids


def near(draw: random.Random, count: int) -> int:
    """The right count mostly, else one beside it."""
    return count if draw.random() < 0.85 else max(count + draw.choice([-1, 1]), 0)


def drawn_batch(draw: random.Random) -> dict:
    """Keyword arguments of forward, mostly valid."""
    ids = drawn_ids(draw)
    flat = [token for row in ids for token in row]
    made = torch.Generator().manual_seed(draw.randrange(2**31))
    batch: dict = {"input_ids": torch.tensor(ids)}
    labels = batch["input_ids"].roll(-1, 1).clone()
    labels[:, -1] = draw.choice([-1, -100, 3])
    batch["labels"] = labels
    if draw.random() < 0.5:
        mask = (torch.rand(labels.shape, generator=made) > 0.5).float() * draw.choice([1.0, 0.25])
        if draw.random() < 0.1:
            mask[0, 0] = draw.choice([-1.0, math.nan, math.inf])
        batch["loss_mask"] = mask
    inputs: dict = {}
    if (reads := near(draw, flat.count(tiny.READ))) or draw.random() < 0.2:
        inputs["images"] = {"patches": {"x": torch.randn(reads, tiny.PIXELS, generator=made)}}
    if (hears := near(draw, flat.count(tiny.HEAR))) or draw.random() < 0.2:
        inputs["audio"] = {"frames": {"x": torch.randn(hears, tiny.PIXELS, generator=made)}}
    batch["modality_inputs"] = inputs
    if (writes := near(draw, flat.count(tiny.WRITE))) or draw.random() < 0.2:
        batch["modality_targets"] = {"images": {"pixels": {"pixels": torch.randn(writes, tiny.PIXELS, generator=made)}}}
    if draw.random() < 0.1:
        wrong = draw.choice(["labels", "input_ids", "modality_inputs", "loss_mask", "attention_mask", "position_ids"])
        batch[wrong] = draw.choice(
            [[1], "x", 3.0, torch.zeros(3), torch.zeros(1, 2, 3, 4), {"video": {}}, {"images": 3}]
        )
    return batch


def reference(model: MimoModel, batch: dict) -> tuple[Tensor, Tensor, float, float] | None:
    """Per-token loss, mask, and the image loss's sum and count of a valid batch; None for one that is not."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor) or batch[name].dtype != torch.int64 or batch[name].dim() != 2:
            return None
    if labels.shape != ids.shape or "attention_mask" in batch or "position_ids" in batch:
        return None
    mask = batch.get("loss_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return None
    if not isinstance(batch["modality_inputs"], dict):
        return None
    rows = {}
    for modality, token, encoder in (("images", tiny.READ, "patches"), ("audio", tiny.HEAR, "frames")):
        given = batch["modality_inputs"].get(modality)
        if given is not None and not isinstance(given, dict):
            return None
        values = torch.zeros(0, tiny.PIXELS) if given is None else given[encoder]["x"]
        if values.shape[0] != int((ids == token).sum()):
            return None
        part = model.modality_submodules[modality]
        projected = part.input_projections[0](part.encoders[encoder].linear(values))
        rows[token] = iter(projected)
    if set(batch["modality_inputs"]) - {"images", "audio"}:
        return None
    targets = batch.get("modality_targets", {}).get("images", {}).get("pixels", {}).get("pixels")
    count = 0 if targets is None else targets.shape[0]
    if count != int((ids == tiny.WRITE).sum()):
        return None
    if mask is None:
        mask = torch.tensor([[learned(ids[b], labels[b], s) for s in range(ids.shape[1])] for b in range(ids.shape[0])])
    if not (mask >= 0).all() or not mask.isfinite().all():
        return None
    table = model.language_model.embedding.word_embeddings.weight
    embedded = []
    for row in ids.tolist():
        for token in row:
            if token in rows:
                embedded.append(next(rows[token]))
            elif 0 <= token < tiny.VOCABULARY:
                embedded.append(table[token])
            else:
                return None
    for label, weight in zip(labels.flatten().tolist(), mask.flatten().tolist(), strict=True):
        if weight and not 0 <= label < tiny.VOCABULARY:
            return None
    hidden = torch.stack(embedded).view(*ids.shape, -1).transpose(0, 1)
    language = model.language_model
    states = language.decoder(hidden, attention_mask=None, rotary_pos_emb=language.rotary_pos_emb(ids.shape[1]))
    logits = (states @ language.output_layer.weight.T).transpose(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.clamp(0, tiny.VOCABULARY - 1).flatten(), reduction="none")
    images = model.modality_submodules["images"]
    error = 0.0
    at = [(b, s) for b, row in enumerate(ids.tolist()) for s, token in enumerate(row) if token == tiny.WRITE]
    for index, (b, s) in enumerate(at):
        drawn = images.decoders["pixels"].linear(images.output_projections[0](states[s, b]))
        error += float((drawn - targets[index]).square().sum())
    return losses.view_as(ids), mask.float(), error, float(count * tiny.PIXELS)


def learned(ids: Tensor, labels: Tensor, at: int) -> float:
    label = int(labels[at])
    if label < 0 or label in (tiny.READ, tiny.HEAR):
        return 0.0
    return float(label != tiny.WRITE or int(ids[at]) != tiny.WRITE)


@share(0.35)
def test_forward_gives_the_references_losses_or_refuses(model, number):
    batch = drawn_batch(random.Random(number))
    model.train()
    with torch.no_grad():
        expected = reference(model, batch)
        if expected is None:
            with pytest.raises(REFUSED):
                model(**batch)
            return
        outputs, mask = model(**batch)
    losses, weights, error, count = expected
    assert torch.equal(mask.float(), weights)
    torch.testing.assert_close(outputs.language * weights, losses * weights, rtol=1e-4, atol=1e-5)
    terms = loss_terms(outputs, mask)
    assert float(terms["images/pixels"].count) == count
    assert math.isclose(float(terms["images/pixels"].sum), error, rel_tol=1e-4, abs_tol=1e-4)


# Placement ----------------------------------------------------------------------------------------------------------


@share(0.25)
def test_a_placement_is_the_references_or_refused(number):
    draw = random.Random(number)
    ids = drawn_ids(draw)
    tokens = {"images": tiny.READ, "audio": draw.choice([tiny.HEAR, tiny.READ, 7])}
    writes = {"images": draw.choice([tiny.WRITE, tiny.READ, 5])}
    vocabulary = draw.choice([None, 64, 30])
    seen: dict[int, int] = {}
    source, row = [], []
    outside = False
    for token in (token for sample in ids for token in sample):
        read = [index for index, name in enumerate(tokens) if tokens[name] == token]
        source.append(read[0] if read else -1)
        row.append(seen.get(token, 0) if read else 0)
        seen[token] = seen.get(token, 0) + 1
        outside |= not read and vocabulary is not None and not 0 <= token < vocabulary
    tensor = torch.tensor(ids)
    if draw.random() < 0.5:
        tensor = tensor.t().contiguous().t()
    if outside or tokens["images"] == tokens["audio"]:
        with pytest.raises(REFUSED):
            build_placement(tensor, tokens, writes, vocabulary_size=vocabulary)
        return
    made = build_placement(tensor, tokens, writes, vocabulary_size=vocabulary)
    assert made.source.flatten().tolist() == source and made.row.flatten().tolist() == row
    flat = [token for sample in ids for token in sample]
    generates = [at for at, token in enumerate(flat) if token == writes["images"]]
    assert made.generation_positions("images").tolist() == generates
    opens = any(at % len(ids[0]) == 0 for at in generates)
    if opens:
        with pytest.raises(REFUSED):
            made.generation_positions("images", rule="predecessor")
    else:
        assert made.generation_positions("images", rule="predecessor").tolist() == [at - 1 for at in generates]


# Configuration ------------------------------------------------------------------------------------------------------


@share(0.2)
def test_a_configuration_is_taken_or_refused(number):
    draw = random.Random(number)
    some = ["images", "audio"]
    plain = ModuleSpec(module=object)
    values = [3, 10, 10, 63, 64, -1, -200, 2**63, 1.5, True, "3"]

    def tokens() -> dict:
        return {name: draw.choice(values) for name in some if draw.random() < 0.5}

    given = {
        name: tokens() for name in ("special_token_ids", "generation_token_ids", "begin_token_ids", "end_token_ids")
    }
    language = ModuleSpec(module=object, params={"vocab_size": 64})
    try:
        made = MimoModelConfig(language, dict.fromkeys(some, plain), **given)
    except REFUSED:
        assert not valid(given)
    else:
        assert valid(given)
        assert made.reading_tables == given["special_token_ids"]


def valid(given: dict[str, dict]) -> bool:
    every = [token for tokens in given.values() for token in tokens.values()]
    if any(type(token) is not int or not -(2**63) <= token < 2**63 for token in every):
        return False
    read, write = given["special_token_ids"], given["generation_token_ids"]
    begin, end = given["begin_token_ids"], given["end_token_ids"]
    owners: dict[int, set[str]] = {}
    for tokens in (read, write):
        for name, token in tokens.items():
            owners.setdefault(token, set()).add(name)
    if any(len(names) > 1 for names in owners.values()):
        return False
    if any(not 0 <= token < 64 and read.get(name) != token for name, token in write.items()):
        return False
    if any(name not in write for name in (*begin, *end)):
        return False
    if any(not 0 <= token < 64 or token in owners for token in (*begin.values(), *end.values())):
        return False
    return len({*begin.values()}) == len(begin) and not {*begin.values()} & {*end.values()}


# Decoding and sampling ----------------------------------------------------------------------------------------------


@share(0.1)
def test_decoding_gives_the_references_rows_or_refuses(model, number):
    draw = random.Random(number)
    ids = torch.tensor(drawn_ids(draw)).clamp(0, 63)
    options = draw.choice([None, {}, {"images": {}}, {"video": {}}, {"images": {"sound": {}}}])
    model.eval()
    with torch.no_grad():
        outputs, _ = model(ids)
        if options in (None, {}, {"images": {}}):
            found = model.decode(outputs, options)
            rows = outputs.modalities["images"].hidden
            part = model.modality_submodules["images"]
            expected = part.decoders["pixels"].linear(part.output_projections[0](rows))
            assert rows.shape[0] == int((ids == tiny.WRITE).sum())
            if rows.shape[0]:
                torch.testing.assert_close(found["images"]["pixels"], expected)
            else:
                assert found == {}
        else:
            with pytest.raises(REFUSED):
                model.decode(outputs, options)


@share(0.1)
def test_drawn_codes_are_among_those_allowed_or_the_options_are_refused(number):
    draw = random.Random(number)
    made = torch.Generator().manual_seed(number % 2**31)
    logits = torch.randn(draw.randint(0, 4), draw.randint(1, 9), generator=made)
    temperature = draw.choice([0.0, 0.5, 1.0, 2.0, -1.0, math.nan, math.inf])
    top_k, top_p = draw.choice([None, 1, 2, 20, 0, -3]), draw.choice([None, 0.1, 0.9, 1.0, 0.0, 1.5, math.nan])
    bad = not 0 <= temperature < math.inf or (top_k is not None and top_k < 1)
    if bad or (top_p is not None and not 0 < top_p <= 1):
        with pytest.raises(REFUSED):
            draw_codes(logits, temperature, top_k, top_p, made)
        return
    codes = draw_codes(logits, temperature, top_k, top_p, made)
    for row, code in zip(logits.tolist(), codes.tolist(), strict=True):
        assert code in allowed(row, temperature, top_k, top_p)


def allowed(row: list[float], temperature: float, top_k: int | None, top_p: float | None) -> set[int]:
    order = sorted(range(len(row)), key=lambda index: -row[index])
    if temperature == 0:
        return {order[0]}
    order = order[:top_k]
    weights = [math.exp((row[index] - row[order[0]]) / temperature) for index in order]
    kept, before = set(), 0.0
    for index, weight in zip(order, weights, strict=True):
        if top_p is None or before / sum(weights) < top_p + 1e-6:
            kept.add(index)
        before += weight
    return kept
