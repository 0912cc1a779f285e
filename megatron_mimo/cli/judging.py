"""`evaluate`: answers to data sets with what they should have been, scores a data set, and a page with samples."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mimo.cli.answering import generate, read_answers
from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.models import Opened
from megatron_mimo.cli.prompts import asked_of
from megatron_mimo.cli.scores import exact, scores
from megatron_mimo.data import SampleError, conversation_of
from megatron_mimo.data.media import open_image
from megatron_mimo.data.sources import Source
from megatron_mimo.launch import Run

SCORES, PAGE = "scores.json", "samples.html"
#: Longest side of a picture on the page, in pixels.
_THUMBNAIL = 160

_STYLE = """
body { font: 14px/1.5 sans-serif; margin: 2em; max-width: 75em } td, th { padding: .3em .8em; text-align: left }
td { border-top: 1px solid #ccc; vertical-align: top } .right { color: #2a7a2a } .wrong { color: #a33 }
"""


def evaluate(
    opened: Opened, sources: Mapping[str, Source], output: Path, run: Run, *, asked: Mapping[str, Any],
    batch_size: int, samples: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Scores of each data set, which are in `scores.json` too, beside a page with samples. Collective over all ranks.

    Args:
        opened: the model.
        sources: name -> records that end with the answer that is right, or have a list of `answers`.
        output: directory; answers lie in a folder a data set, and those of an earlier attempt are kept.
        run: in progress.
        asked: as `answering.generate` takes it.
        batch_size: records that are answered together.
        samples: records of each data set on the page.

    Raises:
        Refused: a data set without any record that has an answer.
    """
    found: dict[str, dict[str, float]] = {}
    body = []
    for name, source in sources.items():
        file = generate(opened, source, output / name, run, asked=asked, batch_size=batch_size)
        lines = list(read_answers(file))
        pairs = [(line, right) for line in lines if (right := right_answers(source, line["index"]))]
        if not pairs:
            raise Refused(f"{source.path}: expected records that end with an answer, found none among {len(lines)}")
        # A record that could not be answered counts as answered wrongly.
        found[name] = {"records": float(len(pairs))} | scores(
            [line["text"] for line, _ in pairs], [right for _, right in pairs]
        )
        if run.rank == 0:
            body += [f"<h2>{html.escape(name)}</h2>{_table({name: found[name]})}", *_rows(source, pairs[:samples])]
    if run.rank == 0:
        (output / SCORES).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        head = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Samples</title><style>{_STYLE}</style>'
        )
        page = f"{head}</head><body><h1>Samples</h1>{''.join(body)}</body></html>\n"
        (output / PAGE).write_text(page, encoding="utf-8")
    return found


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
    """The question, its pictures included."""
    conversation = conversation_of(source.record(index), columns=source.columns)
    pieces = []
    for turn in conversation.turns:
        if turn.role == "assistant":
            break
        for part in turn.parts:
            if part.kind == "image" and part.medium is not None:
                pieces.append(_picture(part.medium, source.media_root))
            else:
                pieces.append(html.escape(part.text or part.kind))
    return " ".join(pieces)


def _picture(medium: Any, root: Path | None) -> str:
    try:
        image = open_image(medium, root)
    except (SampleError, ValueError):
        return "(a picture that cannot be opened)"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
