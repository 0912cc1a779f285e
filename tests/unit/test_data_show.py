"""A page shows each token of the next packs as what it is to the model."""

import re

import pytest

from megatron_mimo.data import show
from megatron_mimo.data.loading import PackedData
from megatron_mimo.data.packing import PackShape
from megatron_mimo.data.sources import JsonLines
from tests import data_samples as made


def data_of(tmp_path, records: list, **changes) -> PackedData:
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(made.png(seed=index))
    path = made.lines(tmp_path / "train.jsonl", records)
    process = made.processor(**changes)
    return PackedData([JsonLines(path)], process, PackShape(length=64, multiple=2), samples=len(records))


CHAT = {
    "messages": [
        made.user(made.image("0.png"), made.text("What <is> it?")),
        made.assistant(made.text("A cat & it"), made.image("1.png"), made.image("0.png", learn=False)),
    ]
}


def test_what_is_read_written_and_learned_is_marked_and_pictures_are_inline(tmp_path):
    data = data_of(tmp_path, [CHAT])
    page = show(data, tmp_path / "packs.html", packs=1).read_text()
    body = page[page.index('<div class="sample">') :]
    assert '<span class="learned">A cat &amp; it' in body
    assert "What &lt;is&gt; it?" in re.sub("<[^>]*>", "", body)
    marks = re.findall('<span class="(read|written|unlearned)"><img [^>]*> images x 4</span>', body)
    assert marks == ["read", "written", "unlearned"]
    assert len(set(re.findall('base64,([^"]*)', body))) == 2  # two pictures, one of them twice
    assert "positions of padding" in body


def test_a_medium_that_is_read_again_is_shown_again(tmp_path):
    chat = {"messages": [made.user(made.text("Draw")), made.assistant(made.image("1.png"), made.text("it"))]}
    page = show(data_of(tmp_path, [chat], reread=True), tmp_path / "packs.html", packs=1).read_text()
    assert re.findall('<span class="(read|written)"><img', page) == ["written", "read"]


def test_the_source_stands_where_it_stood(tmp_path):
    records = [{"text": "a " * (index + 9)} for index in range(30)]
    data = data_of(tmp_path, records)
    next(data)
    before = data.state_dict()
    show(data, tmp_path / "packs.html", packs=2)
    assert data.state_dict() == before
    assert "2 packs" in (tmp_path / "packs.html").read_text()


def test_a_page_has_at_least_one_pack(tmp_path):
    with pytest.raises(ValueError, match="at least one pack"):
        show(data_of(tmp_path, [CHAT]), tmp_path / "packs.html", packs=0)
