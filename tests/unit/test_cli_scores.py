"""Scores of answers, against values computed by hand from their definitions."""

import math

import pytest

from megatron_mimo.cli.scores import bleu, ciders, exact, rouge_l, scores, vqa, words_of


def test_an_exact_match_leaves_case_punctuation_and_articles_out_and_nothing_else() -> None:
    assert [exact(one, ["A red cat."]) for one in ("red cat", "The Red Cat!", "red cats", "cat red", "")] == [
        1,
        1,
        0,
        0,
        0,
    ]


def test_vqa_accuracy_is_a_third_for_each_of_nine_others_that_agree_at_most_one() -> None:
    people = ["two"] * 2 + ["three"] * 8
    # Of the ten choices of nine people, those without one of the two have one that agrees.
    assert vqa("two", people) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa("three", people) == 1 and vqa("four", people) == 0
    assert vqa("two", ["two"]) == 1


def test_bleu_is_the_mean_of_clipped_precisions_with_a_penalty_for_brevity() -> None:
    answer, known = words_of("the the the cat sat on the mat"), [words_of("the cat sat on the mat")]
    precisions = [6 / 8, 5 / 7, 4 / 6, 3 / 5]  # "the" counts twice, as often as in the reference
    assert bleu([answer], [known]) == pytest.approx(math.prod(precisions) ** (1 / 4))
    short = words_of("the cat sat on")
    assert bleu([short], [known]) == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu([words_of("a dog")], [known]) == 0 and bleu([[]], [known]) == 0
    # The nearest length of several references counts.
    assert bleu([short], [[*known, words_of("the cat sat on")]]) == 1


def test_rouge_l_is_f1_of_the_longest_common_subsequence_with_the_nearest_reference() -> None:
    answer = words_of("police kill the gunman")
    assert rouge_l(answer, [words_of("police killed the gunman")]) == pytest.approx(0.75)
    assert rouge_l(answer, [words_of("the gunman kill police")]) == pytest.approx(0.5)
    assert rouge_l(answer, [words_of("dogs"), answer]) == 1 and rouge_l([], [answer]) == 0


def test_cider_weighs_words_by_how_few_records_have_them() -> None:
    known = [[["a", "cat"]], [["a", "dog"]]]
    # "a" is in both records and weighs nothing: of one word "cat" alone counts, of two words "a cat".
    assert ciders([["a", "cat"], ["a", "dog"]], known) == pytest.approx([10 * (1 + 1) / 4] * 2)
    assert ciders([["a"], ["a"]], known) == [0, 0]
    # Of two words "the cat" is in no record; of one "the", which none has, weighs as much as "cat".
    assert ciders([["the", "cat"], ["a", "dog"]], known) == pytest.approx([10 / math.sqrt(2) / 4, 5])


def test_all_scores_of_a_data_set_are_given_and_one_without_references_is_refused() -> None:
    found, each = scores(["It is red.", "blue"], [["it is red"], ["green"]])
    assert found["exact"] == 0.5 and found["vqa"] == 0.5 and found["rouge_l"] == 0.5
    assert list(found) == ["exact", "vqa", "bleu", "rouge_l", "cider"]
    assert [(one["exact"], one["vqa"], one["rouge_l"]) for one in each] == [(1, 1, 1), (0, 0, 0)]
    assert all(found[name] == sum(one[name] for one in each) / 2 for name in each[0]) and "bleu" not in each[0]
    for answers, references in (([], []), (["a"], [[]]), (["a"], [["a"], ["b"]])):
        with pytest.raises(ValueError, match="each with references"):
            scores(answers, references)
