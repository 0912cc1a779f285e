"""Alignment on a GPU: the fused kernels against the reference, no host sync, and what a bad batch does."""

import random
import warnings
from types import SimpleNamespace

import pytest
import torch

import megatron_mimo
from megatron_mimo.align import align, align_by_token_positions
from megatron_mimo.kernels import kernels_for, reference
from megatron_mimo.placement import build_placement
from megatron_mimo.sharding import sequence_shard

pytestmark = pytest.mark.gpu

IMAGES, AUDIO, VIDEO = -200, 10**12, 61


@pytest.fixture(scope="module")
def fused():
    """The Triton kernels, which a GPU machine must have."""
    kernels = kernels_for(torch.device("cuda"))
    assert kernels is not reference
    return kernels


@pytest.fixture(scope="module")
def run():
    """Megatron-Core with one rank on the GPU."""
    yield megatron_mimo.initialize(seed=1)
    megatron_mimo.shutdown()


def draw_ids(batch: int, length: int, tokens: tuple[int, ...], vocabulary: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, length), generator=draw)
    for token in tokens:
        ids[torch.rand(batch, length, generator=draw) < 0.25] = token
    return ids


def on_gpu(x):
    return None if x is None else x.cuda()


SHAPES = [(1, 1, 1), (3, 37, 17), (2, 1500, 40), (1, 3000, 33), (2, 64, 4100), (4, 256, 1024)]


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 37), (2, 1500), (1, 3000)])
@pytest.mark.parametrize(("reads", "generates", "text_is_table"), [(0, 0, True), (1, 1, False), (5, 2, True)])
def test_plan_equals_the_reference(fused, batch, length, reads, generates, text_is_table):
    tokens = (IMAGES, AUDIO, VIDEO, -1, 7)[:reads]
    ids = draw_ids(batch, length, tokens, 64)
    arguments = (tokens, (IMAGES, 3)[:generates])
    settings = {"text_is_table": text_is_table, "vocabulary_size": 50}
    for dtype in (torch.int64, torch.int32)[: 1 + generates]:
        here = ids.clamp(-(2**31), 2**31 - 1).to(dtype)
        expected = reference.plan(here, *arguments, **settings)
        for ours, theirs in zip(fused.plan(here.cuda(), *arguments, **settings), expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.cpu(), theirs)


def tables_of(counts, hidden: int, dtype: torch.dtype, layout: str) -> list[torch.Tensor | None]:
    """One table per count; `layout` says how it lies in memory, or that tables have another dtype or no rows."""
    shapes = {
        "contiguous": lambda n: torch.randn(n, hidden).to(dtype),
        "sliced": lambda n: torch.randn(n, hidden + 3).to(dtype)[:, 1 : 1 + hidden],
        "transposed": lambda n: torch.randn(hidden, n).to(dtype).t(),
        "float32": lambda n: torch.randn(n, hidden),
        "short": lambda n: torch.randn(max(n - 2, 0), hidden).to(dtype),
        "long": lambda n: torch.randn(n + 2, hidden).to(dtype),
        "missing": lambda n: None,
    }
    return [shapes[layout](n) for n in counts]


def drawn_cases(choices: dict[str, list], count: int) -> list[tuple]:
    """`count` combinations, the same at every run; each one compiles kernels of its own, so not all of them."""
    draw = random.Random(0)
    return [tuple(draw.choice(options) for options in choices.values()) for _ in range(count)]


CHOICES = {
    "shape": SHAPES,
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "sharded": [False, True],
    "layout": ["contiguous", "sliced", "transposed", "float32", "short", "long", "missing"],
}


def held_positions(length: int, sharded: bool) -> torch.Tensor | None:
    """Half of the positions in any order, or all."""
    return torch.randperm(length)[: (length + 1) // 2] if sharded else None


@pytest.mark.parametrize(
    ("shape", "dtype", "sharded", "layout", "text_rows"),
    drawn_cases(CHOICES | {"text_rows": ["lookup", "lookup", "given", "zero", "keep"]}, 24),
)
@pytest.mark.parametrize("with_tables", [True, False])
def test_gather_equals_the_reference_bitwise(fused, shape, dtype, sharded, layout, text_rows, with_tables):
    batch, length, hidden = shape
    tokens = (IMAGES, AUDIO, VIDEO, -1, 7)
    ids = draw_ids(batch, length, tokens, 64)
    source, row, _, counts = reference.plan(ids, tokens, (), text_is_table=False, vocabulary_size=None)
    held = held_positions(length, sharded)
    rows = length if held is None else held.numel()
    text = {"lookup": (40, hidden), "given": (rows, batch, hidden)}.get(text_rows)
    text = None if text is None else torch.randn(text).to(dtype)
    tables = tables_of(counts[:-1].sum(1).tolist(), hidden, dtype, layout) if with_tables else []
    expected = torch.full((rows, batch, hidden), 7.0, dtype=dtype)
    ours = expected.cuda()
    plan = (ids, source, row, held)
    settings = {"text_rows": text_rows, "vocabulary_start": 10}
    reference.gather(expected, text, tables, *plan, **settings)
    fused.gather(ours, on_gpu(text), [on_gpu(x) for x in tables], *map(on_gpu, plan), **settings)
    assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "sharded", "layout"),
    [case for case in drawn_cases(CHOICES, 16) if case[3] not in ("transposed", "missing")],
)
def test_table_gradients_equal_the_reference_bitwise(fused, shape, dtype, sharded, layout):
    batch, length, hidden = shape
    tokens = (IMAGES, AUDIO, VIDEO, -1, 7, 8)
    ids = draw_ids(batch, length, tokens, 64)
    *_, positions, counts = reference.plan(ids, tokens, (), text_is_table=False, vocabulary_size=None)
    held = held_positions(length, sharded)
    rows, local_row = length, None
    if held is not None:
        rows = held.numel()
        local_row = torch.full((length,), -1, dtype=torch.int32)
        local_row[held] = torch.arange(rows, dtype=torch.int32)
    grad = torch.randn(rows, batch, hidden).to(dtype)
    expected = tables_of(counts[:-1].sum(1).tolist(), hidden, dtype, layout)
    expected[1] = None
    ours = [None if x is None else torch.full_like(x.cuda(), torch.nan) for x in expected]
    reference.table_gradients(expected, grad, positions, length, local_row)
    fused.table_gradients(ours, grad.cuda(), positions.cuda(), length, on_gpu(local_row))
    for a, b in zip(ours, expected, strict=True):
        assert b is None or torch.equal(a.cpu(), b)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1), torch.float32),
        ((3, 37, 17), torch.bfloat16),
        ((2, 1500, 40), torch.float32),
        ((2, 64, 4100), torch.bfloat16),
        ((4, 256, 1024), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("distinct", [1, 3, 64])
def test_vocabulary_gradient_sums_each_token_in_high_precision(fused, shape, dtype, distinct):
    batch, length, hidden = shape
    ids = draw_ids(batch, length, (IMAGES,), distinct)
    source = reference.plan(ids, (IMAGES,), (), text_is_table=False, vocabulary_size=None)[0]
    grad = torch.randn(length, batch, hidden).to(dtype)
    exact = torch.zeros(40, hidden, dtype=torch.float64)
    reference.vocabulary_gradient(exact, grad.double(), reference.vocabulary_order(ids, source, None, 1, 40))
    gradients = []
    for _ in range(2):
        gradient = torch.zeros(40, hidden + 8, dtype=dtype, device="cuda")[:, :hidden]
        order = fused.vocabulary_order(ids.cuda(), source.cuda(), None, 1, 40)
        fused.vocabulary_gradient(gradient, grad.cuda(), order)
        gradients.append(gradient)
    assert torch.equal(*gradients), "two runs differ"
    # float32 sums of up to 3000 rows; bfloat16 rounds the result once.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradients[0].cpu().double(), exact, rtol=tolerance, atol=tolerance)


def embedding(vocabulary: int, hidden: int, dtype: torch.dtype, group):
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=1, hidden_dropout=0.0, params_dtype=dtype
    )
    return LanguageModelEmbedding(config, vocabulary, 64, position_embedding_type="rope", tp_group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_align_is_bitwise_upstreams(run, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.models.mimo import MimoModel as Upstream

    words = embedding(512, 96, dtype, run.groups.tp)
    special = {"images": IMAGES, "audio": AUDIO}
    ids = draw_ids(3, 700, tuple(special.values()), 512).cuda()
    tables = {k: torch.randn(int((ids == v).sum()), 96, dtype=dtype, device="cuda") for k, v in special.items()}
    tables = {k: x.requires_grad_() for k, x in tables.items()}
    stub = SimpleNamespace(language_model=SimpleNamespace(embedding=words), partition_adapter=None)
    text = Upstream.get_text_embeddings(stub, ids, None, special)
    expected = Upstream.align_embeddings_by_token_positions(stub, {"text": text, **tables}, ids, special)

    placement = build_placement(ids, special, vocabulary_size=512)
    ours = align(words, ids, None, tables, placement, sequence_shard(700, device="cuda"), run.groups.tp)
    assert torch.equal(ours, expected)
    assert torch.equal(align_by_token_positions({"text": text, **tables}, ids, special), expected)

    inputs = [*tables.values(), words.word_embeddings.weight]
    grad = torch.randn_like(expected)
    *theirs, their_weight = torch.autograd.grad(expected, inputs, grad)
    *mine, my_weight = torch.autograd.grad(ours, inputs, grad)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    exact = torch.zeros(512, 96, dtype=torch.float64)
    order = reference.vocabulary_order(ids.cpu(), placement.source.cpu(), None, 0, 512)
    reference.vocabulary_gradient(exact, grad.cpu().double(), order)
    errors = [(weight.cpu().double() - exact).abs().max() for weight in (my_weight, their_weight)]
    # In float32 both differ from it by the order of their sums alone.
    assert errors[0] <= max(errors[1], 1e-5), "further from the exact sum than the embedding's own backward"


def test_align_runs_without_a_host_sync(run):
    words = embedding(64, 32, torch.bfloat16, run.groups.tp)
    ids = draw_ids(2, 48, (IMAGES,), 64)
    ids[:, 0] = 5  # so that every generation token has a predecessor
    ids = ids.pin_memory()
    images = torch.randn(int((ids == IMAGES).sum()), 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    boundaries = torch.tensor([0, 16, 48], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(2):
        here = ids.cuda(non_blocking=True)
        for placement in (
            build_placement(here, {"images": IMAGES}, {"images": 7}, vocabulary_size=64),
            build_placement(here, {"images": IMAGES}),
            build_placement(ids, {"images": IMAGES}).pin_memory().to("cuda", non_blocking=True),
        ):
            for layout in ({}, {"cp_size": 2}, {"cp_size": 2, "cu_seqlens": boundaries}):
                shard = sequence_shard(48, device="cuda", checks=placement.checks, **layout)
                rows = align(words, here, None, {"images": images}, placement, shard, run.groups.tp)
                rows.float().square().sum().backward()
    here = ids.cuda(non_blocking=True)
    placement = build_placement(here, {}, {"images": IMAGES})
    placement.generation_positions("images", images.shape[0])
    placement.generation_positions("images", images.shape[0], rule="predecessor")
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    placement.raise_deferred()


@pytest.mark.parametrize("found", [0, 3, 9])
def test_a_wrong_count_does_not_fault_and_raises_when_its_owner_is_asked(run, found):
    words = embedding(64, 32, torch.float32, run.groups.tp)
    ids = torch.full((2, 8), 5)
    ids[0, 2:4] = IMAGES
    ids[1, 1:5] = IMAGES
    ids = ids.cuda()
    images = torch.randn(found, 32, device="cuda", requires_grad=True)
    shard = sequence_shard(8, device="cuda")
    build_placement(ids, {"images": IMAGES}, vocabulary_size=64)  # pinned memory comes with a sync at first
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # keeps the device busy, so that the counts cannot be there yet
    placement = build_placement(ids, {"images": IMAGES}, vocabulary_size=64)
    rows = align(words, ids, None, {"images": images}, placement, shard, run.groups.tp)
    rows.sum().backward()
    torch.cuda.synchronize()
    assert torch.isfinite(rows).all()
    assert torch.equal(images.grad[6:], torch.zeros_like(images.grad[6:]))
    sample, tokens, rows = {0: (0, 2, 0), 3: (1, 4, 1), 9: (1, 4, 7)}[found]
    message = f"images: sample {sample} has {tokens} special tokens but {rows} embeddings"
    build_placement(ids, {"images": IMAGES}, vocabulary_size=64)
    with pytest.raises(ValueError, match=message):
        placement.raise_deferred()
    placement.raise_deferred()


@pytest.mark.parametrize("vocabulary_size", [64, None])
def test_a_text_id_outside_the_vocabulary_does_not_fault_and_is_reported(run, vocabulary_size):
    words = embedding(64, 32, torch.float32, run.groups.tp)
    ids = torch.tensor([[1, 2, 3, 4], [5, 10**15, -7, 6]]).cuda()
    shard = sequence_shard(4, device="cuda")
    torch.cuda._sleep(200_000_000)
    with pytest.raises(ValueError, match="text: sample 1 has 2 token ids outside"):
        placement = build_placement(ids, {}, vocabulary_size=vocabulary_size)
        rows = align(words, ids, None, {}, placement, shard, run.groups.tp)
        rows.sum().backward()
        placement.checks.report()
    torch.cuda.synchronize()


def test_the_whole_model_runs_without_a_host_sync(run):
    from tests import tiny

    model = megatron_mimo.MimoModel(tiny.mimo_config()).cuda()
    batches = [_moved(tiny.batch(seed)) for seed in (0, 1)]
    tiny.total(model, batches[0]).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for arguments in batches:
            tiny.total(model, arguments).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    model.finish_checks()


def _moved(value):
    return {k: _moved(v) for k, v in value.items()} if isinstance(value, dict) else value.cuda()


def test_packed_partition_is_transformer_engines():
    tex = pytest.importorskip("transformer_engine_torch", reason="TransformerEngine is not installed")
    lengths = torch.tensor([16, 48, 8, 120])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).cuda()
    total = int(lengths.sum())
    for size in (2, 4):
        for rank in range(size):
            expected = tex.thd_get_partitioned_indices(boundaries, total, size, rank)
            shard = sequence_shard(total, cp_rank=rank, cp_size=size, cu_seqlens=boundaries, device="cuda")
            assert torch.equal(shard.positions, expected.long())
