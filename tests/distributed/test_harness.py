"""The harness itself refuses what it could not tell apart."""

import pytest

from tests.distributed import harness
from tests.distributed.harness import Case, case


def test_a_case_that_is_registered_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_registry", {})

    def claim(run) -> None:
        pass

    case(ranks=2)(claim)
    case(ranks=2, tensor_model_parallel_size=2)(claim)
    with pytest.raises(ValueError, match=r"test_harness.claim\[2\] is registered twice"):
        case(ranks=2)(claim)


def test_the_id_of_a_case_tells_its_layout() -> None:
    sizes = (("tensor_model_parallel_size", 2), ("pipeline_model_parallel_size", 2))
    assert Case(test_the_id_of_a_case_tells_its_layout, 4, sizes, 1.0).id.endswith("layout[4-tp2-pp2]")
