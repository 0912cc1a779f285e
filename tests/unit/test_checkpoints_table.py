"""The page's table of layouts is the list that the multi-rank cases go through."""

import re

from tests.distributed.cases import checkpoints
from tests.distributed.cases.checkpoints import FAMILIES
from tests.warm import ROOT

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()


def rows(heading: str) -> dict[str, tuple[str, str]]:
    """What stands first in a row of a table -> the two other columns."""
    table = PAGE[PAGE.index(heading) :].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: (second, third) for first, second, third in lines}


def test_every_family_of_layouts_is_a_row_with_its_layouts_and_its_case():
    found = rows("| | saved in any of")
    assert {heading: layouts.split(", ") for heading, (layouts, _) in found.items()} == {
        heading: list(family.layouts) for heading, family in FAMILIES.items()
    }
    for heading, (_, case) in found.items():
        function = getattr(checkpoints, case.strip("`"))
        source = (ROOT / "tests" / "distributed" / "cases" / "checkpoints.py").read_text()
        body = source[source.index(f"def {function.__name__}(") :].split("\n\n\n")[0]
        assert f'each_reads_each("{heading}"' in body


def test_every_other_pair_names_a_test_that_is_there():
    for pair, (_, test) in rows("| other pairs").items():
        path, _, name = test.strip("`").rpartition("::")
        source = (ROOT / (path or "tests/distributed/cases/checkpoints.py")).read_text()
        assert re.search(rf"^def {name}\(", source, flags=re.MULTILINE), pair
