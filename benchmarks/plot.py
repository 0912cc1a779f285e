"""Draws what `benchmarks.step --out` measured.

    python -m benchmarks.plot step1b.json step3b.json --out docs/images/step.svg

A bar a variant: device time by kind of kernel, the device's idle time on top, and above it the step and the MFU. The
title says how quiet the host was, without which a ratio to upstream means little.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IDLE = "idle"


def bars(figures: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Variant -> kind of kernel, or `idle` -> milliseconds of its step; kinds in the order of the largest first.

    Kernels that overlap count once: their kinds are scaled to the time in which the device is busy.

    Args:
        figures: of one file of `benchmarks.step`.

    Example:
        >>> result = {"name": "ours", "step_ms": 10.0, "busy_ms": 8.0, "kinds_ms": {"GEMM": 6.0, "copies": 2.0}}
        >>> bars({"results": [result]})
        {'ours': {'GEMM': 6.0, 'copies': 2.0, 'idle': 2.0}}
    """
    found = {}
    for result in figures["results"]:
        kinds, busy = result["kinds_ms"], result["busy_ms"]
        share = busy / sum(kinds.values()) if kinds else 0.0
        idle = max(0.0, result["step_ms"] - busy)
        found[result["name"]] = {kind: spent * share for kind, spent in kinds.items()} | {IDLE: idle}
    return found


def draw(files: Sequence[Path], out: Path) -> None:
    """Writes a picture with one panel a file, two in a row."""
    import matplotlib.pyplot as plt

    columns = min(2, len(files))
    rows = -(-len(files) // columns)
    width, legend = 5.5 * columns, 1.6  # inches
    figure, grid = plt.subplots(rows, columns, figsize=(width + legend, 5 * rows), squeeze=False)
    panels, spare = grid.flat[: len(files)], grid.flat[len(files) :]
    for panel in spare:
        panel.set_axis_off()
    colours = plt.get_cmap("tab20")
    kinds: list[str] = []
    for panel, path in zip(panels, files, strict=True):
        figures = json.loads(path.read_text())
        operations = sum(figures["flops"].values())
        for place, (name, spent) in enumerate(bars(figures).items()):
            below = 0.0
            for kind, milliseconds in spent.items():
                kinds += [kind] if kind not in kinds else []
                colour = "0.9" if kind == IDLE else colours(kinds.index(kind))
                panel.bar(name, milliseconds, bottom=below, color=colour, label=kind)
                below += milliseconds
            step = figures["results"][place]["step_ms"]
            said = f"{step:.0f} ms"
            if figures["peak"]:
                said += f"\n{100 * operations / step * 1e3 / figures['peak']:.1f} %"
            panel.text(place, below, said, ha="center", va="bottom")
        quiet = figures["launches_a_second"]
        host = f"\n{quiet / 1e3:.0f} k launches a second" if quiet else ""
        panel.set_title(f"{path.stem}: {figures['device']}{host}")
        panel.set_ylabel("ms a step; above: MFU")
        panel.margins(y=0.15)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="center right")
    figure.tight_layout(rect=(0, 0, width / (width + legend), 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of benchmarks.step")
    parser.add_argument("--out", type=Path, default=Path("docs/images/step.png"))
    options = parser.parse_args()
    draw(options.files, options.out)


if __name__ == "__main__":
    main()
