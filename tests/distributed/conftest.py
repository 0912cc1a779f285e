"""A case took the seconds that its ranks took, not those that its test waited for the job of all of them."""

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    seconds = dict(item.user_properties).get("seconds")
    if report.when == "call" and isinstance(seconds, float):
        report.duration = seconds
    return report
