"""How good answers are: exact match, VQA accuracy, and BLEU, ROUGE-L and CIDEr of captions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

#: Longest n-grams of BLEU and CIDEr.
_LONGEST = 4
_ARTICLES = {"a", "an", "the"}
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def words_of(text: str) -> list[str]:
    """Its words in lower case, without punctuation.

    Example:
        >>> words_of("It's red, a lot.")
        ["it's", 'red', 'a', 'lot']
    """
    return _WORD.findall(text.lower())


def scores(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Every score of a data set and of each of its records, in [0, 1] but for CIDEr, which lies in [0, 10].

    Those of a data set are the means of its records', but for BLEU, which a record alone does not have.

    Args:
        answers: one a record.
        references: of each record, at least one.

    Raises:
        ValueError: numbers that differ, no record, or a record without a reference.
    """
    if len(answers) != len(references) or not answers or not all(references):
        raise ValueError(
            f"scores: expected at least one answer, each with references, found {len(answers)} answers and references "
            f"for {sum(map(bool, references))}"
        )
    said, known = [words_of(one) for one in answers], [[words_of(one) for one in of] for of in references]
    of_each = {
        "exact": [exact(one, of) for one, of in zip(answers, references)],
        "vqa": [vqa(one, of) for one, of in zip(answers, references)],
        "rouge_l": [rouge_l(one, of) for one, of in zip(said, known)],
        "cider": ciders(said, known),
    }
    means = {name: _mean(values) for name, values in of_each.items()}
    whole = {name: means[name] for name in ("exact", "vqa")} | {"bleu": bleu(said, known)} | means
    return whole, [dict(zip(of_each, values)) for values in zip(*of_each.values())]


def exact(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is a reference but for case, punctuation and articles.

    Example:
        >>> exact("The cat.", ["cat"]), exact("cats", ["cat"])
        (1.0, 0.0)
    """
    return float(_plain(answer) in [_plain(one) for one in references])


def vqa(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy: a third for each person of ten who gave that answer, at most 1, over all choices of nine of them.

    With fewer than three references it is `exact`. Antol et al., "VQA: Visual Question Answering", 2015, section 3; the
    mean over the others as in its evaluation.

    Example:
        >>> round(vqa("two", ["two"] * 3 + ["three"] * 7), 2)
        0.9
    """
    if len(references) < 3:
        return exact(answer, references)
    alike = [_plain(one) == _plain(answer) for one in references]
    return _mean([min(1.0, (sum(alike) - own) / 3) for own in alike])


def bleu(answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """BLEU of a corpus, n-grams up to four, without smoothing. Papineni et al., "BLEU", 2002, section 2.3.

    Answers that are all shorter than four words are held to the longest n-grams that some have.

    Example:
        >>> bleu([["a", "red", "cat", "sat"]], [[["a", "red", "cat", "sat"]]])
        1.0
    """
    matched, found, said, known = Counter[int](), Counter[int](), 0, 0
    for answer, of in zip(answers, references):
        said += len(answer)
        known += min((abs(len(one) - len(answer)), len(one)) for one in of)[1]
        for size in range(1, _LONGEST + 1):
            own, most = grams(answer, size), Counter[tuple[str, ...]]()
            for one in of:
                most |= grams(one, size)
            matched[size] += (own & most).total()
            found[size] += own.total()
    sizes = [size for size in range(1, _LONGEST + 1) if found[size]]
    if not sizes or not all(matched[size] for size in sizes):
        return 0.0
    precision = math.exp(_mean([math.log(matched[size] / found[size]) for size in sizes]))
    return precision * min(1.0, math.exp(1 - known / said))


def rouge_l(answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F1 of the longest common subsequence with the nearest reference. Lin, "ROUGE", 2004, section 3.

    Example:
        >>> rouge_l(["the", "cat", "sat"], [["a", "cat", "sat"]])
        0.6666666666666666
    """
    return max(2 * _common(answer, one) / (len(answer) + len(one)) if answer and one else 0.0 for one in references)


def ciders(answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr of each record: cosine of n-grams weighed by how few records have them, times ten, over references, sizes.

    Vedantam et al., "CIDEr", 2015, section 3, without stemming. The weights come from these references, so a data set
    of one record has 0.
    """
    totals = [0.0] * len(answers)
    for size in range(1, _LONGEST + 1):
        having = Counter(gram for of in references for gram in {gram for one in of for gram in grams(one, size)})
        weight = {gram: math.log(len(references) / count) for gram, count in having.items()}
        unseen = math.log(len(references))
        for at, (answer, of) in enumerate(zip(answers, references)):
            own = _weighed(grams(answer, size), weight, unseen)
            totals[at] += _mean([_cosine(own, _weighed(grams(one, size), weight, unseen)) for one in of])
    return [10 * total / _LONGEST for total in totals]


def grams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    """How often each run of so many words stands there."""
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _plain(text: str) -> list[str]:
    return [word for word in words_of(text) if word not in _ARTICLES]


def _weighed(
    found: Mapping[tuple[str, ...], int], weight: Mapping[tuple[str, ...], float], unseen: float
) -> dict[tuple[str, ...], float]:
    total = sum(found.values())
    return {gram: count / total * weight.get(gram, unseen) for gram, count in found.items()}


def _cosine(one: Mapping[tuple[str, ...], float], other: Mapping[tuple[str, ...], float]) -> float:
    length = math.sqrt(sum(value**2 for value in one.values()) * sum(value**2 for value in other.values()))
    return sum(value * other.get(gram, 0.0) for gram, value in one.items()) / length if length else 0.0


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Words of the longest common subsequence."""
    best = [0] * (len(other) + 1)
    for word in one:
        before = best[:]
        for at, against in enumerate(other):
            best[at + 1] = before[at] + 1 if word == against else max(best[at], before[at + 1])
    return best[-1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
