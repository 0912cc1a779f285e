"""Starts the multi-rank cases beside the session's other tests, and tells what each of them took."""

from collections.abc import Generator

import pytest

from tests.distributed.harness import Case, Jobs

JOBS = pytest.StashKey[Jobs]()
_slowest: list[tuple[float, float, str]] = []


def selected(session: pytest.Session) -> list[Case]:
    return [item.callspec.params["case"] for item in session.items if getattr(item, "originalname", "") == "test_case"]


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and (cases := selected(session)):
        session.stash[JOBS] = Jobs(cases)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if JOBS in session.stash:
        session.stash[JOBS].stop()


@pytest.fixture(scope="session")
def jobs(request: pytest.FixtureRequest) -> Jobs:
    """The jobs of the selected cases, which began with the session."""
    return request.session.stash[JOBS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A case took the seconds that its ranks took, not those that its test waited for them."""
    report = yield
    spent = dict(item.user_properties)
    if report.when == "call" and "seconds" in spent:
        report.duration = spent["seconds"]
        _slowest.append((spent["cpu_seconds"], spent["seconds"], item.callspec.id))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The cases by what their ranks computed, which does not depend on what else the machine does."""
    if not _slowest:
        return
    count = len(_slowest) if terminalreporter.config.option.durations == 0 else 10
    terminalreporter.section("cases: seconds computed by all ranks, seconds of the slowest rank")
    for computed, seconds, name in sorted(_slowest, reverse=True)[:count]:
        terminalreporter.line(f"{computed:8.2f} {seconds:8.2f}  {name}")
    computed, seconds = (sum(line[column] for line in _slowest) for column in (0, 1))
    terminalreporter.line(f"{computed:8.2f} {seconds:8.2f}  together")
