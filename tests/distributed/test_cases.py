"""Every case of ``tests/distributed/cases/``; `tests.distributed.harness` says how to add one."""

import pytest

from tests.distributed.harness import Case, all_cases, run_cases


@pytest.fixture(scope="session")
def reports() -> dict[str, str | None]:
    """The reports so far, by case id."""
    return {}


@pytest.mark.distributed
@pytest.mark.parametrize("case", [pytest.param(case, id=id) for id, case in all_cases().items()])
def test_case(case: Case, reports: dict[str, str | None], request: pytest.FixtureRequest) -> None:
    if case.id not in reports:
        selected = [item.callspec.params["case"] for item in request.session.items if item.function is test_case]
        reports |= run_cases([other for other in selected if other.ranks == case.ranks])
    report = reports[case.id]
    if report is not None:
        pytest.fail(report, pytrace=False)
