"""Packs as a page of HTML: what the model reads, writes and learns, token by token, with the pictures inline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path

from megatron_mimo.data.loading import PackedData
from megatron_mimo.data.media import open_image
from megatron_mimo.data.messages import Conversation, Medium
from megatron_mimo.data.packs import Pack
from megatron_mimo.data.samples import Sample
from megatron_mimo.data.written import write_whole

THUMBNAIL = 128
"""Longest side of a picture on the page, in pixels."""

_STYLE = """
body { font: 14px/1.5 sans-serif; margin: 2em; max-width: 75em }
.sample { border-left: 3px solid #ccc; padding: .3em .8em; margin: .6em 0; white-space: pre-wrap }
.sample { word-break: break-word }
.learned { background: #c8ecc8 } .read { background: #cfe0ff } .written { background: #ffd9a8 }
.unlearned { background: #f3e6d5 } .pad { color: #999 } img { vertical-align: middle; margin: 2px }
.bar { height: 10px; background: #eee } .bar div { height: 10px; background: #6a9a6a; float: left; margin-right: 1px }
"""


def show(data: PackedData, path: Path | str, *, packs: int = 4) -> Path:
    """Writes the next packs of a data source as a page, and gives its path.

    Each token is coloured by what it is to the model: text that it learns to say, text that it sees, positions that an
    encoder fills, positions that a decoder learns to write. The source stands where it stood before.

    Args:
        data: a source; its own state is put back.
        path: of the HTML file.
        packs: how many.

    Raises:
        ValueError: no pack is asked for.

    Example:
        >>> show(data, "packs.html")                                              # doctest: +SKIP
    """
    if packs < 1:
        raise ValueError(f"show: expected at least one pack, found packs={packs}")
    taken = data.state()
    shown = [pack for pack, _ in zip(data, range(packs))]
    body = "\n".join(line for number, pack in enumerate(shown) for line in _pack(data, number, pack))
    data.restore(taken)
    waste = 1 - sum(pack.tokens for pack in shown) / max(1, sum(pack.input_ids.numel() for pack in shown))
    legend = " ".join(
        f'<span class="{name}">{words}</span>'
        for name, words in (
            ("learned", "learned text"), ("", "seen text"), ("read", "read"), ("written", "written"),
            ("unlearned", "written, not learned"), ("pad", "padding"),
        )
    )  # fmt: skip
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Packs</title><style>{_STYLE}</style></head>'
        f"<body><h1>{len(shown)} packs, {waste:.2%} of their positions empty</h1><p>{legend}</p>{body}</body></html>\n"
    )
    path = Path(path)
    write_whole(path, page)
    return path


def _pack(data: PackedData, number: int, pack: Pack) -> Iterator[str]:
    length = pack.input_ids.numel()
    learned = int(pack.loss_mask.sum())
    yield f"<h2>Pack {number}: {pack.tokens} of {length} tokens, {learned} learned, media cost {pack.cost:g}</h2>"
    samples = [data.sample_at(position) for position in pack.positions]
    widths = "".join(f'<div style="width: {100 * len(sample) / length - 0.2:.2f}%"></div>' for _, sample, _ in samples)
    yield f'<div class="bar">{widths}</div>'
    for conversation, sample, root in samples:
        written = _sample(data, conversation, sample, root)
        yield f'<div class="sample"><b>{html.escape(sample.name)}</b>\n{written}</div>'
    if pack.tokens < length:
        yield f'<p class="pad">{length - pack.tokens} positions of padding</p>'


def _sample(data: PackedData, conversation: Conversation, sample: Sample, root: Path | None) -> str:
    pieces, start = [], 0
    media = _media_of(conversation, sample)
    for item, medium in zip(sample.items, media):
        pieces.append(_text(data, sample, start, item.start))
        kind = "read" if not item.written else "written" if item.learn else "unlearned"
        pieces.append(f'<span class="{kind}">{_picture(medium, root)} {item.modality} x {item.rows}</span>')
        start = item.start + item.length
    return "".join([*pieces, _text(data, sample, start, len(sample))])


def _media_of(conversation: Conversation, sample: Sample) -> list[Medium | None]:
    """The medium of each item: in order, and once more where a written one is read again."""
    media = [(part.medium, turn.role == "assistant") for turn, part in conversation.media()]
    found: list[Medium | None] = []
    at = 0
    for item in sample.items:
        # A medium of the next turn is read where a user stands; anything else that is read is the last one again.
        follows = at < len(media) and media[at][1] == item.written
        at += follows
        found.append(media[at - 1][0] if at else None)
    return found


def _text(data: PackedData, sample: Sample, start: int, stop: int) -> str:
    """Tokens from `start` to `stop`, runs of learned ones marked."""
    pieces = []
    while start < stop:
        learned, end = bool(sample.learn[start]), start
        while end < stop and bool(sample.learn[end]) == learned:
            end += 1
        words = html.escape(data.decode(sample.input_ids[start:end].tolist()))
        pieces.append(f'<span class="learned">{words}</span>' if learned else words)
        start = end
    return "".join(pieces)


def _picture(medium: Medium | None, root: Path | None) -> str:
    if medium is None:
        return ""
    try:
        image = open_image(medium, root)
    except ValueError:  # a sound or a video
        return html.escape(medium.path or "")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
