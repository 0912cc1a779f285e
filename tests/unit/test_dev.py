"""The scripts of `dev/` count and draw what they say, and the faults of `tests.faults` can be put in."""

from pathlib import Path

import pytest
import torch

from dev import hops, imports
from megatron_mimo import total_loss
from megatron_mimo.decoders.base import weighted_sum
from tests import faults
from tests.distributed.harness import all_cases


def test_rooms_are_drawn_above_what_they_import_without_arrows_that_others_imply() -> None:
    drawn = imports.drawn({"top": {"middle", "low"}, "middle": {"low"}, "low": set()})
    assert [" ".join(line.split()) for line in drawn.splitlines()] == ["2 top -> middle", "1 middle -> low", "0 low"]


def test_a_circle_of_rooms_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found a circle among \['left', 'right'\]"):
        imports.levels({"left": {"right"}, "right": {"left"}, "low": set()})


def test_imports_within_functions_are_arrows_and_those_for_type_checkers_are_not(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    package.joinpath("low.py").write_text("")
    package.joinpath("types.py").write_text("")
    package.joinpath("high.py").write_text(
        "if TYPE_CHECKING:\n    from package.types import T\ndef f():\n    from package import low\n"
    )
    assert imports.graph(package) == {"high": {"low"}, "low": set(), "types": set()}


def test_the_page_of_rooms_draws_them_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rooms.md").read_text()
    now = page.partition("## Now\n\n")[2].partition("\n\n##")[0]
    drawn = imports.drawn(imports.graph(imports.PACKAGE))
    assert [line.split() for line in now.splitlines()] == [line.split() for line in drawn.splitlines()]


def test_a_call_is_counted_where_it_receives_the_very_tensor_and_not_a_copy_of_it() -> None:
    errors = torch.ones(2, 3)
    counted = hops.Hops({"errors": errors})
    counted.run(lambda: weighted_sum(errors.clone(), None))
    assert counted.found == {"errors": []}
    counted.run(lambda: weighted_sum(errors, None))
    assert counted.found["errors"][0] == "decoders/base.py:weighted_sum"


def test_what_a_dict_holds_is_handed_and_what_a_dataclass_holds_is_carried() -> None:
    term = weighted_sum(torch.ones(2, 3), None)
    counted = hops.Hops({"sum": term.sum})
    counted.run(lambda: total_loss({"text": term}))
    assert counted.found["sum"][0] == "losses.py:total_loss (carried)"
    assert list(hops.parts({"a": [1]}, carried=False)) == [{"a": [1]}, [1], 1]


def test_every_tensor_of_a_microbatch_is_followed_from_forward_on(single_process) -> None:
    found = hops.hops()
    assert found.keys() == {"input_ids", "input", "target", "states"}
    for name in ("input_ids", "input", "target"):
        assert found[name][0] == "model.py:MimoModel.forward"
    assert any(call.startswith("route.py:") for call in found["states"])


#: Calls that received the tensor at da713f0, before checks and plan had rooms of their own.
BEFORE = {"input_ids": 24, "input": 17, "target": 32, "states": 5}


@pytest.mark.parametrize("name", BEFORE)
def test_the_way_of_a_tensor_is_shorter_than_it_was(single_process, name) -> None:
    assert len(hops.hops()[name]) < BEFORE[name]


def test_each_fault_is_put_in_where_a_line_stands_once_and_into_a_case_that_runs() -> None:
    for fault in faults.FAULTS:
        assert (faults.ROOT / "megatron_mimo" / fault.file).read_text().count(fault.right) == 1, fault.what
        assert fault.wrong != fault.right and fault.case in all_cases(), fault.what
