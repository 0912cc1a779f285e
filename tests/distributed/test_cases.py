"""Every case of ``tests/distributed/cases/``; `tests.distributed.harness` says how to add one."""

from collections.abc import Callable

import pytest

from tests.distributed.harness import Case, Outcome, all_cases, run_cases


@pytest.fixture(scope="session")
def outcomes() -> dict[str, Outcome]:
    """The outcomes so far, by case id."""
    return {}


@pytest.mark.distributed
@pytest.mark.parametrize("case", [pytest.param(case, id=id) for id, case in all_cases().items()])
def test_case(
    case: Case,
    outcomes: dict[str, Outcome],
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    if case.id not in outcomes:
        selected = [item.callspec.params["case"] for item in request.session.items if item.function is test_case]
        outcomes |= run_cases([other for other in selected if other.ranks == case.ranks])
    outcome = outcomes[case.id]
    record_property("seconds", outcome.seconds)
    if outcome.report is not None:
        pytest.fail(outcome.report, pytrace=False)
