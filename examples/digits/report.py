"""The report of the demo: one page that needs no other file, the figures as JSON, and pictures."""

import base64
import html
import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from torch import Tensor

from examples.digits.data import CODE_ROWS, Digits
from examples.digits.evaluate import CodeResults, FlowResults
from examples.digits.tones import CLIP, HIGH_HZ, KEY_HZ, LOW_HZ, RATE
from examples.digits.vq import CODES

Losses = list[dict[str, float]]
"""Term -> mean over the batch, for each step."""

GOALS = {
    "read_accuracy": 0.95,
    "hear_accuracy": 0.98,
    "draw_accuracy": 0.90,
    "draw_diversity": 0.50,
    "dial_accuracy": 0.95,
    "hear_then_draw_accuracy": 0.85,
    "next_read_accuracy": 0.90,
    "next_draw_accuracy": 0.90,
    "next_dial_accuracy": 0.90,
    "draw_codes_accuracy": 0.90,
    "draw_codes_diversity": 0.50,
}
"""Figures that have a goal: at least this."""
SAYS = {
    "read_accuracy": "held-out handwriting read as the digit it is",
    "hear_accuracy": "new tones heard as the digit they dial",
    "draw_accuracy": "drawn digits that an SVM trained on real ones recognises",
    "draw_diversity": "distance between two drawings of a digit, over that of real handwriting",
    "draw_novelty": "distance from a drawing to the nearest training image, over that of unseen handwriting",
    "dial_accuracy": "dialled tones that a Goertzel detector decodes",
    "hear_then_draw_accuracy": "digits drawn from a tone that the SVM recognises",
    "next_read_accuracy": "held-out handwriting read as the digit it is, in one answer with the next two",
    "next_draw_accuracy": "the digit after it, drawn in that answer, that the SVM recognises",
    "next_dial_accuracy": "the digit after it, dialled in that answer, that the Goertzel detector decodes",
    "train_seconds": "time of the training on this machine",
    "draw_codes_accuracy": "digits drawn with codes that the SVM recognises",
    "draw_codes_diversity": "distance between two of them, over that of real handwriting",
    "draw_codes_novelty": "distance from one of them to the nearest training image, over that of unseen handwriting",
    "vq_reconstruction_error": "root mean square of what the tokenizer changes in unseen handwriting, white being -1 "
    "and black 1",
    "vq_recognised": "unseen handwriting that the SVM recognises after the tokenizer",
    "vq_codes_used": "share of the codebook that unseen handwriting uses",
    "train_codes_seconds": "time of the training on this machine, without the tokenizer's",
}
"""Every figure, and what it says."""

FLOW_TERMS = {
    "text": ("text: which digit", "#1b6ca8"),
    "images/pixels": ("images: velocity of the pixels", "#d1495b"),
    "audio/bands": ("audio: velocity of the spectrum", "#2e8b57"),
}
CODE_TERMS = {"images/codes": ("images: cross-entropy of the codes", "#d1495b")}
INK = "#22303c"
PHONE_NUMBER = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)

LOOK = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#616e7c",
    "ytick.color": "#616e7c",
}


@matplotlib.rc_context(LOOK)
def write_report(
    out: Path,
    losses: dict[str, Losses],
    held_out: Digits,
    *,
    flow: FlowResults | None = None,
    codes: CodeResults | None = None,
) -> None:
    """Writes metrics.json, report.html and a picture of each model to `out`; a model that is None is left out."""
    figures = {name: value for results in (flow, codes) if results for name, value in results.figures.items()}
    (out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    sections = []
    if flow:
        picture = png(draw_flow(flow, held_out))
        (out / "digits.png").write_bytes(picture)
        sections.append(flow_section(flow, losses["flow"], picture))
    if codes:
        picture = png(draw_codes(codes, held_out, flow))
        (out / "digits_codes.png").write_bytes(picture)
        sections.append(codes_section(losses["codes"], picture))
    (out / "report.html").write_text(page(figures, sections))


# Pictures --------------------------------------------------------------------------------


def draw_losses(losses: Losses, terms: dict[str, tuple[str, str]]) -> Figure:
    """Every term over the steps: each step pale, their running mean in full colour."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots(1, len(terms), squeeze=False)[0]
    for axis, (name, (title, colour)) in zip(axes, terms.items()):
        steps = [step for step, at_step in enumerate(losses) if name in at_step]
        values = np.array([losses[step][name] for step in steps])
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        width = max(1, len(values) // 40)
        if len(values) >= width:
            mean = np.convolve(values, np.ones(width) / width, mode="valid")
            axis.plot(steps[width // 2 :][: len(mean)], mean, color=colour, linewidth=1.8)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
    return figure


def draw_flow(results: FlowResults, held_out: Digits) -> Figure:
    """Real and drawn digits, and below each the spectrogram of its dialled tone."""
    figure = Figure(figsize=(10, 7))
    grid = figure.add_gridspec(
        5, 10, height_ratios=(3, 4, 2, 2, 4.5), left=0.1, right=0.99, top=0.95, bottom=0.02, hspace=0.1, wspace=0.1
    )
    blocks = (
        ("real", held_out.images, held_out.labels, 3),
        ("drawn", results.drawn, results.asked, 4),
        ("drawn on\nhearing\nits tone", results.heard_drawn, results.asked, 2),
        ("drawn on\nreading the\none before", results.answers.drawn, (results.shown.labels + 1) % 10, 2),
    )
    _draw_blocks(figure, grid, blocks)
    for digit in range(10):
        axis = figure.add_subplot(grid[4, digit])
        _draw_spectrogram(axis, results.dialled[results.asked == digit][0], labelled=digit == 0)
    return figure


def draw_codes(results: CodeResults, held_out: Digits, flow: FlowResults | None) -> Figure:
    """Real digits, the same after the tokenizer, digits drawn with codes, and by flow where there are any."""
    blocks = [
        ("real", held_out.images, held_out.labels, 2),
        ("the same\nthrough the\ntokenizer", results.given_back, held_out.labels, 2),
        ("drawn\nwith codes", results.drawn, results.asked, 4),
    ]
    if flow:
        blocks.append(("drawn\nby flow", flow.drawn, flow.asked, 4))
    heights = [rows for *_, rows in blocks]
    figure = Figure(figsize=(10, 0.3 + 0.42 * sum(heights)))
    grid = figure.add_gridspec(
        len(blocks), 10, height_ratios=heights, left=0.1, right=0.99, top=0.93, bottom=0.01, hspace=0.1, wspace=0.1
    )
    _draw_blocks(figure, grid, blocks)
    return figure


def _draw_blocks(figure: Figure, grid: GridSpec, blocks: Sequence[tuple[str, Tensor, Tensor, int]]) -> None:
    """A row of the grid for each block (title, images, labels, rows): two columns of images of every digit."""
    for place, (title, images, labels, rows) in enumerate(blocks):
        for digit in range(10):
            axis = figure.add_subplot(grid[place, digit])
            axis.imshow(-mosaic(images[labels == digit], rows, 2).numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[], anchor="N")
            axis.spines[:].set_visible(False)
            if place == 0:
                axis.set_title(str(digit))
            if digit == 0:
                axis.set_ylabel(title, rotation=0, ha="right", va="center", labelpad=10)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def mosaic(images: Tensor, rows: int, columns: int) -> Tensor:
    """The first `rows * columns` of images `[n, 8, 8]` side by side, with a blank pixel around each."""
    framed = torch.nn.functional.pad(images[: rows * columns], (1, 1, 1, 1), value=-1)
    return framed.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)


def _draw_spectrogram(axis: Axes, clip: Tensor, *, labelled: bool) -> None:
    decibel, seconds, frequencies = spectrogram(clip)
    axis.pcolormesh(seconds, frequencies, decibel.clip(decibel.max() - 40), cmap="magma", shading="gouraud")
    axis.set(ylim=(560, 1620), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if labelled:
        axis.set_yticks(LOW_HZ + HIGH_HZ, [f"{hertz:.0f} Hz" for hertz in LOW_HZ + HIGH_HZ], fontsize=7)


def spectrogram(clip: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Power in dB `[frequencies, frames]` of a clip `[n]`, and the seconds and hertz of its cells."""
    size, hop = 256, 32
    frames = clip.unfold(0, size, hop) * torch.hann_window(size)
    power = torch.fft.rfft(frames, n=1024).abs().square()
    seconds = (torch.arange(len(frames)) * hop + size / 2) / RATE
    hertz = torch.arange(513) * RATE / 1024
    return (10 * torch.log10(power.T + 1e-9)).numpy(), seconds.numpy(), hertz.numpy()


# Page ------------------------------------------------------------------------------------


def page(figures: dict[str, float], sections: list[str]) -> str:
    """The report as HTML; pictures and sounds are in it."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>megatron_mimo: digits</title>
<style>{STYLE}</style>
<main>
<h1>Models that read, hear, draw and dial</h1>
<p>Small Megatron language models over handwriting, dial tones and text, trained from nothing. What follows is
asked on data that they never trained on, and judged by programs that never saw them.</p>
<table>
<tr><th>figure<th class="number">goal<th class="number">reached</tr>
{"".join(_row(name, value) for name, value in figures.items())}
</table>
{"".join(sections)}
</main>
</html>
"""


def flow_section(results: FlowResults, losses: Losses, picture: bytes) -> str:
    """What the model that reads, hears, draws and dials has made."""
    return f"""
<h2>By flow: one model draws and dials</h2>
{_picture(picture, "Real digits, drawn digits, and spectrograms of dialled tones")}
<p>Every drawing starts from other noise. In the last four rows of digits the model was told no digit: in two it
heard its tone, in two it read the digit before it. Below, a dialled tone of each digit, from left to right in time.</p>
<h3>Listen</h3>
<p>Tones as the model made them, 128 ms each: it chooses level, phases, duration and noise anew every time.</p>
<div class="keys">{"".join(_key(results, digit) for digit in range(10))}</div>
<p>A number, dialled digit by digit: {"".join(map(str, PHONE_NUMBER))}</p>
{_player(_dialled_number(results))}
<h3>In one answer: read this, draw the next, dial it</h3>
<p>Each of these is one answer to a held-out digit. The model says the digit, begins to draw the next by itself, and
then to dial it.</p>
<div class="keys">{"".join(_answer(results, digit) for digit in range(10))}</div>
<h3>Losses of its {len(losses)} steps</h3>
{_picture(png(draw_losses(losses, FLOW_TERMS)), "Loss of every term over the steps")}
"""


def codes_section(losses: Losses, picture: bytes) -> str:
    """What the model that draws with codes has made."""
    return f"""
<h2>With codes: another draws them one by one</h2>
{_picture(picture, "Real digits, digits through the tokenizer, and drawn digits")}
<p>A small VQ tokenizer, trained first and then frozen, makes {CODE_ROWS} codes of an image, each one of {CODES}. The
model predicts them as a language model predicts words: it sees the codes before each. What the tokenizer loses, no
drawing can have.</p>
<h3>Losses of its {len(losses)} steps</h3>
{_picture(png(draw_losses(losses, CODE_TERMS)), "Loss of the codes over the steps")}
"""


STYLE = """
body { margin: 0; background: #f5f7fa; color: #22303c; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 2rem auto; padding: 1rem 3rem 3rem; background: white;
       border-radius: 8px; box-shadow: 0 1px 4px #0002; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid #e4e7eb; }
.number { font-variant-numeric: tabular-nums; text-align: right !important; }
td small { color: #616e7c; }
.reached { color: #2e8b57; } .missed { color: #d1495b; font-weight: bold; }
img { width: 100%; }
.keys { display: grid; grid-template-columns: repeat(5, 1fr); gap: .8rem; }
.keys figure { margin: 0; text-align: center; } audio { width: 100%; }
"""


def _row(name: str, value: float) -> str:
    goal = GOALS.get(name)
    reached = "" if goal is None else "reached" if value >= goal else "missed"
    shown = f"{value:.1f}" if name.endswith("seconds") else f"{value:.3f}"
    return (
        f"<tr><td>{name}<br><small>{html.escape(SAYS[name])}</small>"
        f'<td class="number">{"" if goal is None else f"{goal:.2f}"}'
        f'<td class="number {reached}">{shown}</tr>\n'
    )


def _picture(content: bytes, description: str) -> str:
    return f'<img alt="{description}" src="{_data_url("image/png", content)}">'


def _key(results: FlowResults, digit: int) -> str:
    clip = results.dialled[results.asked == digit][0]
    low, high = KEY_HZ[str(digit)]
    return f"<figure>{_player(clip)}<figcaption>{digit} <small>{low:.0f} + {high:.0f} Hz</small></figcaption></figure>"


def _answer(results: FlowResults, digit: int) -> str:
    """The answer to the first of the digits that were shown and are `digit`."""
    place = int((results.shown.labels == digit).nonzero()[0])
    words = "".join(map(str, results.answers.words[place]))
    figure = Figure(figsize=(2, 1))
    for axis, (title, image) in zip(
        figure.subplots(1, 2),
        (("shown", results.shown.images[place]), ("drawn", results.answers.drawn[place])),
    ):
        axis.imshow(-image.numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
    return (
        f"<figure>{_picture(png(figure), f'The digit {digit} as it was shown, and what was drawn')}"
        f"{_player(results.answers.dialled[place])}<figcaption>says {html.escape(words)}</figcaption></figure>"
    )


def _dialled_number(results: FlowResults) -> Tensor:
    """Another clip for each digit of the number, with pauses."""
    clips = [results.dialled[results.asked == digit][place] for place, digit in enumerate(PHONE_NUMBER)]
    return torch.cat([torch.nn.functional.pad(clip, (0, CLIP // 2)) for clip in clips])


def _player(waveform: Tensor) -> str:
    return f'<audio controls src="{_data_url("audio/wav", wav(waveform))}"></audio>'


def wav(waveform: Tensor) -> bytes:
    """A waveform `[n]` in [-1, 1] as a 16-bit WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((waveform.clamp(-1, 1) * 32767).short().numpy().tobytes())
    return buffer.getvalue()


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
