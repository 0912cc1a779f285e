"""Every case of ``tests/distributed/cases/``; `tests.distributed.harness` says how to add one."""

from collections.abc import Callable

import pytest

from tests.distributed.harness import Case, Jobs, all_cases


@pytest.mark.process
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=id, marks=[pytest.mark.long] * case.long) for id, case in all_cases().items()]
)
def test_case(case: Case, jobs: Jobs, record_property: Callable[[str, object], None]) -> None:
    outcome = jobs.outcome(case)
    record_property("seconds", outcome.seconds)
    record_property("cpu_seconds", outcome.cpu_seconds)
    if outcome.report is not None:
        pytest.fail(outcome.report, pytrace=False)
