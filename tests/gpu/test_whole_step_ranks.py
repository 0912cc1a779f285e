"""A training step as one CUDA graph on two GPUs: data, tensor, context, pipeline and expert parallelism."""

import pytest

from tests.gpu.launched import run_on
from tests.gpu.whole_step_ranks import EXACT, UNENDED

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def printed() -> str:
    """By one start for all layouts, which ends where one of them fails."""
    return run_on(2, "tests.gpu.whole_step_ranks", *EXACT, UNENDED)


@pytest.mark.parametrize("name", EXACT)
def test_replayed_steps_of_changing_batches_equal_eager_ones_bit_by_bit(name, printed):
    assert f"{name}: replayed" in printed


def test_a_program_that_leaves_its_graphs_ends(printed):
    assert f"{UNENDED}: replayed" in printed


def test_attention_over_a_shared_sequence_is_replayed():
    pytest.importorskip("transformer_engine", reason="attention over a split sequence is TransformerEngine's")
    run_on(2, "tests.gpu.whole_step_ranks", "cp2-attention")
