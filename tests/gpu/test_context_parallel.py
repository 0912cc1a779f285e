"""Context parallelism with TransformerEngine's attention: two GPUs give one's loss and gradients."""

import pytest

from tests.gpu.launched import run_on

pytestmark = pytest.mark.gpu


def test_two_ranks_equal_one_on_separate_and_packed_sequences():
    pytest.importorskip("transformer_engine", reason="attention over a split sequence is TransformerEngine's")
    run_on(2, "tests.gpu.context_parallel")
