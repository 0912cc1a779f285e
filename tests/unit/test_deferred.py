"""Checks that wait for the device, with an event that answers as the test wants."""

import gc
import pickle

import pytest
import torch

from megatron_mimo import deferred
from megatron_mimo.placement import build_placement


class Event:
    """A CUDA event that has not happened until somebody waits for it."""

    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


def under_way(values: torch.Tensor) -> deferred.Arrival:
    arrival = deferred.Arrival(values)
    arrival._event = Event()
    return arrival


@pytest.fixture
def checks() -> deferred.Checks:
    return deferred.Checks()


def refuse(values: torch.Tensor) -> None:
    raise ValueError(f"refused {values.tolist()}")


def test_values_on_the_cpu_are_checked_at_once(checks):
    with pytest.raises(ValueError, match=r"refused \[3\]"):
        checks.check(deferred.Arrival(torch.tensor([3])), refuse, "key")


def test_values_under_way_are_checked_when_somebody_asks(checks):
    arrival = under_way(torch.tensor([3]))
    checks.check(arrival, refuse, "key")
    with pytest.raises(ValueError, match=r"refused \[3\]"):
        checks.report()
    checks.report()


def test_values_that_have_come_meanwhile_are_checked_without_waiting(checks):
    arrival = under_way(torch.tensor([3]))
    arrival._event.happened = True
    with pytest.raises(ValueError, match="refused"):
        checks.check(arrival, refuse, "key")


def test_the_current_step_is_not_waited_for(checks):
    arrival = under_way(torch.tensor([3]))
    checks.check(arrival, refuse, "key")
    event = arrival._event
    checks.report(current=arrival)
    assert not event.happened
    with pytest.raises(ValueError, match="refused"):
        checks.report()


def test_one_failure_leaves_the_others_to_the_next_call(checks):
    for number in (1, 2):
        checks.check(under_way(torch.tensor([number])), refuse, number)
    for number in (1, 2):
        with pytest.raises(ValueError, match=rf"refused \[{number}\]"):
            checks.report()


def test_the_same_check_handed_over_twice_waits_once(checks):
    arrival, seen = under_way(torch.tensor([3])), []
    for _ in range(2):
        checks.check(arrival, seen.append, "key")
    checks.report()
    assert len(seen) == 1


def late_placement(ids: torch.Tensor, **settings):
    """A deferred placement whose counts are still under way."""
    placement = build_placement(ids, {"images": -200}, {"images": 7}, validate="deferred", **settings)
    placement.arrival._event = Event()
    return placement


IDS = torch.tensor([[1, -200, -200, 7], [1, -200, 7, 7]])


def test_an_error_of_one_batch_does_not_come_out_of_the_construction_of_another():
    placement = late_placement(IDS)
    placement.check_rows("images", 2)
    build_placement(IDS, {"images": -200})
    with pytest.raises(ValueError, match="images: sample 1 has 1 special tokens but 0 embeddings"):
        placement.raise_deferred()


def test_what_nobody_asked_for_is_logged_when_its_owner_is_gone(caplog):
    checks = deferred.Checks()
    checks.check(under_way(torch.tensor([3])), refuse, "key")
    del checks
    gc.collect()
    assert "a batch before the end was bad, and its results are too: refused [3]" in caplog.text


def test_a_copy_of_an_owner_waits_for_nothing(checks):
    checks.check(under_way(torch.tensor([3])), refuse, "key")
    pickle.loads(pickle.dumps(checks)).report()
    with pytest.raises(ValueError, match="refused"):
        checks.report()


def test_a_late_mismatch_can_be_asked_for():
    placement = late_placement(IDS)
    placement.check_rows("images", 3)
    placement.check_generation("images", 4)
    with pytest.raises(ValueError, match="images: sample 1 has 2 generation tokens but 3 target rows"):
        placement.raise_deferred()
    placement.raise_deferred()


def test_asking_one_placement_leaves_the_others_waiting():
    one, other = late_placement(IDS), late_placement(IDS)
    one.check_rows("images", 9)
    other.raise_deferred()
    with pytest.raises(ValueError, match="images"):
        one.raise_deferred()


def test_a_placement_that_was_checked_at_once_has_nothing_to_raise():
    build_placement(IDS, {"images": -200}).raise_deferred()
