"""Records that are held out of a source."""

import pytest

from megatron_mimo.data import Records, split


def source(count: int) -> Records:
    return Records([{"text": str(number)} for number in range(count)])


@pytest.mark.parametrize(("count", "share", "held"), [(2, 0.01, 1), (2, 0.99, 1), (100, 0.05, 5), (7, 0.5, 4)])
def test_a_source_is_split_in_two_parts_that_are_its_records_once(count, share, held):
    rest, held_out = split(source(count), share, seed=5)
    texts = [[part.record(index)["text"] for index in range(len(part))] for part in (rest, held_out)]
    assert len(texts[1]) == held and sorted(texts[0] + texts[1], key=int) == [str(number) for number in range(count)]
    assert rest.where(0) == source(count).where(int(texts[0][0]))
    again = split(source(count), share, seed=5)[1]
    assert [again.record(index)["text"] for index in range(len(again))] == texts[1]


def test_another_seed_holds_out_other_records_and_what_cannot_be_split_is_refused():
    drawn = [
        {part.record(index)["text"] for index in range(len(part))}
        for part in (split(source(100), 0.2, seed=seed)[1] for seed in (1, 2))
    ]
    assert drawn[0] != drawn[1]
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            split(source(3), share)
    with pytest.raises(ValueError, match="expected at least 2 records, one to hold out, found 1"):
        split(source(1), 0.5)
