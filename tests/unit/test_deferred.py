"""Checks that wait for the device, with an event that answers as the test wants."""

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


@pytest.fixture(autouse=True)
def nothing_left_waiting():
    yield
    assert not deferred._waiting


def refuse(values: torch.Tensor) -> None:
    raise ValueError(f"refused {values.tolist()}")


def test_values_on_the_cpu_are_checked_at_once():
    with pytest.raises(ValueError, match=r"refused \[3\]"):
        deferred.check(deferred.Arrival(torch.tensor([3])), refuse, "key")


def test_values_under_way_are_checked_when_somebody_asks():
    arrival = under_way(torch.tensor([3]))
    deferred.check(arrival, refuse, "key")
    with pytest.raises(ValueError, match=r"refused \[3\]"):
        deferred.report()
    deferred.report()


def test_values_that_have_come_meanwhile_are_checked_without_waiting():
    arrival = under_way(torch.tensor([3]))
    arrival._event.happened = True
    with pytest.raises(ValueError, match="refused"):
        deferred.check(arrival, refuse, "key")


def test_the_current_step_is_not_waited_for():
    arrival = under_way(torch.tensor([3]))
    deferred.check(arrival, refuse, "key")
    event = arrival._event
    deferred.report(current=arrival)
    assert not event.happened
    with pytest.raises(ValueError, match="refused"):
        deferred.report()


def test_one_failure_leaves_the_others_to_the_next_call():
    for number in (1, 2):
        deferred.check(under_way(torch.tensor([number])), refuse, number)
    for number in (1, 2):
        with pytest.raises(ValueError, match=rf"refused \[{number}\]"):
            deferred.report()


def test_the_same_check_handed_over_twice_waits_once():
    arrival, seen = under_way(torch.tensor([3])), []
    for _ in range(2):
        deferred.check(arrival, seen.append, "key")
    deferred.report()
    assert len(seen) == 1


def late_placement(ids: torch.Tensor, **settings):
    """A deferred placement whose counts are still under way."""
    placement = build_placement(ids, {"images": -200}, {"images": 7}, validate="deferred", **settings)
    placement.arrival._event = Event()
    return placement


IDS = torch.tensor([[1, -200, -200, 7], [1, -200, 7, 7]])


def test_a_late_mismatch_is_the_same_error_one_step_later():
    placement = late_placement(IDS)
    placement.check_rows("images", 2)
    with pytest.raises(ValueError, match="images: sample 1 has 1 special tokens but 0 embeddings"):
        build_placement(IDS, {"images": -200})


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
