"""A judge of pictures: what it is called with, what it may give, and each way in which it fails as one line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.judges import Judge, found_judge
from megatron_mimo.cli.judging import try_judge
from megatron_mimo.data import open_source
from tests.commands import pictures

JUDGES = """
import numpy

def alike(drawn, reference, text):
    return numpy.float32(drawn.getpixel((0, 0)) == reference.getpixel((0, 0)))

class Several:
    def __call__(self, drawn, reference, text):
        return {"words": len(text.split()), "wide": drawn.width, "known": reference is not None}

class NoCall:
    pass

class NotMade:
    def __init__(self, weights):
        pass

def raises(drawn, reference, text):
    raise KeyError("a\\nb")

def words(drawn, reference, text): return "good"
def nothing(drawn, reference, text): return None
def empty(drawn, reference, text): return {}
def nan(drawn, reference, text): return {"fine": 1, "bad": float("nan")}
constant = 3
"""


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch) -> None:
    """A module of judges in the working directory."""
    (tmp_path / f"judges_{tmp_path.name}.py").write_text(JUDGES)
    (tmp_path / f"broken_{tmp_path.name}.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def named(tmp_path: Path, name: str) -> str:
    return f"judges_{tmp_path.name}:{name}"


def test_a_function_gives_a_score_of_its_name_and_a_class_a_dict_of_scores(tmp_path: Path) -> None:
    red, green = (Image.fromarray(np.full((2, 4, 3), shade, np.uint8)) for shade in ((255, 0, 0), (0, 255, 0)))
    alike = Judge(named(tmp_path, "alike"))
    assert [alike(red, other, "", "record 1") for other in (red, green)] == [{"alike": 1.0}, {"alike": 0.0}]
    several = Judge(named(tmp_path, "Several"))
    assert several(red, None, "It is red.", "record 1") == {"words": 3.0, "wide": 4.0, "known": 0.0}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone:judge", "importing gone raised ModuleNotFoundError.*run the command beside gone.py, or install it"),
        ("broken:judge", "raised ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("judges", "expected module:function or module:Class"),
        (":alike", "expected module:function or module:Class"),
        ("judges:alik", "has no alik; name a function or class"),
        ("judges:constant", "found nothing that can be called"),
        ("judges:NoCall", "found nothing that can be called; give it __call__"),
        ("judges:NotMade", "raised TypeError: .*'weights' when made without arguments"),
        ("judges:raises", r"raised KeyError: .*at record 0 of .*it is called as judge\(drawn, reference, text\)"),
        ("judges:words", "expected it to give a finite number, or a dict of them, at .*found 'good'"),
        ("judges:nothing", "found None"),
        ("judges:empty", "found {}"),
        ("judges:nan", "found {'fine': 1, 'bad': nan}"),
    ],
)
def test_a_judge_that_fails_is_one_line_before_anything_is_drawn(name: str, told: str, tmp_path: Path) -> None:
    given = re.sub("^(judges|broken)", rf"\1_{tmp_path.name}", name)
    source = open_source(pictures(), columns="write")
    with pytest.raises(Refused, match=told) as found:
        try_judge(Judge(given), {"pictures": source})
    assert "\n" not in str(found.value)


def test_finding_a_judge_calls_nothing(tmp_path: Path) -> None:
    assert found_judge(named(tmp_path, "NotMade")).__name__ == "NotMade"
