"""`evaluate`: answers to data sets with what they should have been, scores a data set, and a page with samples."""

from __future__ import annotations

import base64
import html
import io
import json
import wave
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_mimo.cli.answering import generate, read_answers
from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.judges import Judge
from megatron_mimo.cli.models import Opened
from megatron_mimo.cli.prompts import asked_of, picture_of, text_of
from megatron_mimo.cli.scores import exact, scores
from megatron_mimo.data import SampleError, conversation_of
from megatron_mimo.data.media import open_image, open_sound
from megatron_mimo.data.messages import Medium
from megatron_mimo.data.sources import Source
from megatron_mimo.data.written import write_whole
from megatron_mimo.launch import Run

if TYPE_CHECKING:
    from PIL.Image import Image

#: Scores of data sets, those of each record in a data set's folder, and the page.
SCORES, EACH, PAGE = "scores.json", "scores.jsonl", "samples.html"
#: Longest side of a picture on the page, in pixels.
_THUMBNAIL = 160
#: Of a sound on the page: samples a second, and its longest.
_RATE, _SECONDS = 16_000, 30

_STYLE = """
body { font: 14px/1.5 sans-serif; margin: 2em; max-width: 75em } td, th { padding: .3em .8em; text-align: left }
td { border-top: 1px solid #ccc; vertical-align: top } .right { color: #2a7a2a } .wrong { color: #a33 }
"""


def evaluate(
    opened: Opened, sources: Mapping[str, Source], output: Path, run: Run, *, asked: Mapping[str, Any],
    batch_size: int, samples: int, judge: Judge | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Scores of each data set, which are in `scores.json` too, beside a page with samples. Collective over all ranks.

    In a data set's folder `scores.jsonl` has a line a record that is scored: its `index` and scores, whose means are
    those of the data set; of pictures `drawn` is 1 or 0. BLEU is one of a data set alone.

    Args:
        opened: the model.
        sources: name -> records that end with the answer that is right, or have a list of `answers`.
        output: directory; answers lie in a folder a data set, and those of an earlier attempt are kept.
        run: in progress.
        asked: as `answering.generate` takes it.
        batch_size: records that are answered together.
        samples: records of each data set on the page.
        judge: of pictures that the model draws; data-parallel ranks share them out.

    Raises:
        Refused: a data set without any record that the model can answer, or that has a right answer; or a judge that
            fails, on every rank.
    """
    found: dict[str, dict[str, float]] = {}
    body = []
    for name, source in sources.items():
        file = generate(opened, source, output / name, run, asked=asked, batch_size=batch_size)
        lines = list(read_answers(file))
        if all("error" in line for line in lines) and lines:
            raise Refused(f"{source.path}: expected records that the model can answer, found none: {lines[0]['error']}")
        pairs = [(line, right) for line in lines if (right := right_answers(source, line["index"]))]
        seen = {} if judge is None else _judged(judge, source, lines, output / name, run)
        if not pairs and not seen:
            raise Refused(
                f"{source.path}: expected records that end with an answer, found none among {len(lines)}"
                + ("; pictures are scored by --judge" if judge is None else "")
            )
        found[name] = {"records": len(lines if seen else pairs)}
        each: dict[int, dict[str, float]] = {}
        if pairs:  # a record that could not be answered counts as answered wrongly
            means, of_each = scores([line["text"] for line, _ in pairs], [right for _, right in pairs])
            found[name] |= means
            each = {line["index"]: one for (line, _), one in zip(pairs, of_each)}
        if seen:
            found[name] |= _means(seen, found[name], judge)
            each |= {index: each.get(index, {}) | {"drawn": float(bool(one))} | one for index, one in seen.items()}
        if run.rank == 0:
            told = "".join(json.dumps({"index": index} | each[index]) + "\n" for index in sorted(each))
            write_whole(output / name / EACH, told)
            body += [f"<h2>{html.escape(name)}</h2>{_table({name: found[name]})}", *_rows(source, pairs[:samples])]
            body += _pictures(source, [line for line in lines if line["index"] in seen][:samples], seen, output / name)
    if run.rank == 0:
        write_whole(output / SCORES, json.dumps(found, indent=2) + "\n")
        head = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Samples</title><style>{_STYLE}</style>'
        )
        page = f"{head}</head><body><h1>Samples</h1>{''.join(body)}</body></html>\n"
        write_whole(output / PAGE, page)
    return found


def try_judge(judge: Judge, sources: Mapping[str, Source]) -> None:
    """Shows a judge the first picture that a record is to be answered with, as if it had been drawn.

    Raises:
        Refused: it fails on it.
    """
    for source in sources.values():
        for index in range(len(source)):
            if (right := _right_picture(source, index)) is not None:
                judge(right, right, _text(source, index), source.where(index))
                return


def _judged(
    judge: Judge, source: Source, lines: Sequence[Mapping[str, Any]], folder: Path, run: Run
) -> dict[int, dict[str, float]]:
    """Scores of each record that a picture was drawn for, none of one that should have one. Collective over all ranks.

    Raises:
        Refused: the judge fails, on every rank.
    """
    seen: dict[int, dict[str, float]] = {}
    told: str | None = None
    if run.tensor_rank == run.pipeline_rank == run.context_rank == 0:
        for line in lines[run.data_rank :: run.layout.data_parallel_size]:
            index = line["index"]
            drawn, right = _drawn(line, folder), _right_picture(source, index)
            if drawn is None:
                seen |= {} if right is None else {index: {}}
                continue
            try:
                seen[index] = judge(drawn, right, _text(source, index), source.where(index))
            except Refused as error:
                told = f"{error}. The answers are kept: mend it and give the same command"
                break
    everyone: list[Any] = [(seen, told)]
    if run.world_size > 1:
        everyone = [None] * run.world_size
        dist.all_gather_object(everyone, (seen, told))
    for _, of_one in everyone:
        if of_one is not None:
            raise Refused(of_one)
    return {index: values for of_one, _ in everyone for index, values in of_one.items()}


def _means(
    seen: Mapping[int, Mapping[str, float]], beside: Mapping[str, float], judge: Judge | None
) -> dict[str, float]:
    """The share of records that have a picture, and the mean of each score over those."""
    judged = [values for values in seen.values() if values]
    names = list(judged[0]) if judged else []
    unlike = [list(values) for values in judged if values.keys() != set(names)]
    taken = [*beside, "drawn", "index"]
    if unlike or set(names) & set(taken):
        given = None if judge is None else judge.given
        raise Refused(
            f"judge {given}: expected the same names for each picture, and none of {taken}, found "
            f"{[names, *unlike[:1]]}; rename them"
        )
    means = {name: sum(values[name] for values in judged) / len(judged) for name in names}
    return {"drawn": len(judged) / len(seen)} | means


def _drawn(line: Mapping[str, Any], folder: Path) -> Image | None:
    """The first picture of an answer."""
    files = [part["image"] for part in line["parts"] if "image" in part]
    return open_image(Medium(path=files[0]), folder) if files else None


def _right_picture(source: Source, index: int) -> Image | None:
    medium = picture_of(source, index)
    try:
        return None if medium is None else open_image(medium, source.media_root)
    except SampleError:
        return None


def _text(source: Source, index: int) -> str:
    try:
        return text_of(asked_of(source, index)[0])
    except SampleError:
        return ""


def right_answers(source: Source, index: int) -> tuple[str, ...]:
    """Texts that a record is to be answered with; none where it has none or cannot be read."""
    try:
        return asked_of(source, index)[1]
    except SampleError:
        return ()


def _table(found: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(found.values())))
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{values[name]:.4g}</td>" for name in names) + "</tr>" for values in found.values()
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _rows(source: Source, pairs: Sequence[tuple[Mapping[str, Any], Sequence[str]]]) -> Iterator[str]:
    if not pairs:
        return
    yield "<table><tr><th>record</th><th>asked</th><th>answer</th><th>right</th></tr>"
    for line, right in pairs:
        kind = "right" if exact(line["text"], right) else "wrong"
        said = html.escape(line.get("error") or line["text"])
        yield (
            f"<tr><td>{line['index']}</td><td>{_asked(source, line['index'])}</td>"
            f'<td class="{kind}">{said}</td><td>{html.escape(" / ".join(dict.fromkeys(right)))}</td></tr>'
        )
    yield "</table>"


def _asked(source: Source, index: int) -> str:
    """The question, its pictures and sounds included, with the names of their files."""
    conversation = conversation_of(source.record(index), columns=source.columns)
    pieces = []
    for turn in conversation.turns:
        if turn.role == "assistant":
            break
        for part in turn.parts:
            if part.kind in ("image", "audio") and part.medium is not None:
                shown = _picture if part.kind == "image" else _sound
                pieces.append(shown(part.medium, source.media_root))
                pieces += [f"<br><small>{html.escape(part.medium.path)}</small><br>"] if part.medium.path else []
            else:
                pieces.append(html.escape(part.text or part.kind))
    return " ".join(pieces)


def _pictures(
    source: Source, lines: Sequence[Mapping[str, Any]], seen: Mapping[int, Mapping[str, float]], folder: Path
) -> Iterator[str]:
    """Drawn pictures beside the right ones, with the judge's scores."""
    if not lines:
        return
    yield "<table><tr><th>record</th><th>asked</th><th>drawn</th><th>right</th><th>scores</th></tr>"
    for line in lines:
        index = line["index"]
        drawn, right = _drawn(line, folder), picture_of(source, index)
        told = "<br>".join(f"{html.escape(name)} {value:.4g}" for name, value in seen[index].items())
        yield (
            f"<tr><td>{index}</td><td>{_asked(source, index)}</td>"
            f"<td>{_shown(drawn) if drawn is not None else html.escape(line.get('error') or '(none)')}</td>"
            f"<td>{'' if right is None else _picture(right, source.media_root)}</td><td>{told}</td></tr>"
        )
    yield "</table>"


def _picture(medium: Medium, root: Path | None) -> str:
    try:
        return _shown(open_image(medium, root))
    except (SampleError, ValueError):
        return "(a picture that cannot be opened)"


def _sound(medium: Medium, root: Path | None) -> str:
    """A player of the first seconds of a sound."""
    try:
        samples = open_sound(medium, _RATE, root).samples[: _SECONDS * _RATE]
    except (SampleError, ValueError):
        return "(a sound that cannot be opened)"
    file = io.BytesIO()
    with wave.open(file, "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(_RATE)
        clip.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    data = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>'


def _shown(image: Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
