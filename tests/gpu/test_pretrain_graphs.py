"""Megatron's own loop with --cuda-graph-impl full_iteration, on one GPU and on two."""

import pytest

from tests.distributed.cases.pretrain_graphs import LAYOUTS
from tests.gpu.launched import run_on
from tests.gpu.pretrain_graphs import ALONE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("gpus", "name"), [*((1, name) for name in ALONE), *((2, name) for name in LAYOUTS)])
def test_replayed_steps_of_megatrons_loop_log_what_launched_ones_do(gpus, name, tmp_path):
    assert f"{name}: replayed" in run_on(gpus, "tests.gpu.pretrain_graphs", str(tmp_path), name)
