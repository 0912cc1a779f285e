"""Loss curves of one recipe on several layouts, all from the same weights, each also broken off and resumed.

    python -m benchmarks.loss_curves --layouts 1,2:tp2-sp,2:pp2 4:tp2-pp2 --out out/curves.json
    python -m benchmarks.loss_curves --plot out/curves.json --out out/curves.png

The first run, on one rank, takes a single step with learning rate 0 and saves: these are the initial
weights that every layout loads. Then each layout trains all steps and saves half-way, and a second run
goes on from there. Layouts between two commas run at the same time, on the same GPUs where there are too
few: losses are compared here, not speed. A layout that fails is reported and left out.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
AXES = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
}
LOGGED = re.compile(r" iteration +(\d+)/.*")
TERM = re.compile(r"\| ([^|:]*loss): (\S+)")


@dataclass(frozen=True)
class Layout:
    """`"2:tp2-sp"`: two ranks, tensor-parallel size 2 with sequence parallelism."""

    text: str

    @property
    def ranks(self) -> int:
        return int(self.text.partition(":")[0])

    def title(self) -> str:
        """For people: `"2 ranks: TP 2, SP"`."""
        axes = [axis for axis in self.text.partition(":")[2].split("-") if axis]
        parts = [f"{axis[:2].upper()} {axis[2:]}".strip() for axis in axes]
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return f"{ranks}: {', '.join(parts)}" if parts else ranks

    def arguments(self) -> list[str]:
        given = []
        for axis in filter(None, self.text.partition(":")[2].split("-")):
            given += ["--sequence-parallel"] if axis == "sp" else [AXES[axis[:2]], axis[2:]]
        return given


@dataclass(frozen=True)
class Job:
    """A run of the recipe that was started."""

    layout: Layout
    process: subprocess.Popen
    log: Path

    def curves(self) -> dict[str, list] | None:
        """Every term's losses, by step from the run's first; None if the run failed."""
        code = self.process.wait()
        text = self.log.read_text()
        if code:
            told = [line for line in text.splitlines() if line.startswith("[rank")]
            print(f"{self.layout.text} failed with {code}:", *told[-25:], sep="\n")
            return None
        steps: dict[str, list] = {"step": []}
        for line in filter(LOGGED.search, text.splitlines()):
            steps["step"].append(int(LOGGED.search(line).group(1)))
            for name, value in TERM.findall(line):
                losses = steps.setdefault(name.strip(), [])
                # Megatron prints its first step without forgetting it: the second line is a mean of two.
                losses.append(float(value) if len(losses) != 1 else 2 * float(value) - losses[0])
        return steps


def start(recipe: str, layout: Layout, arguments: list[str], log: Path, gpus: list[int]) -> Job:
    """Starts the recipe's script on some GPUs."""
    environment = os.environ | {
        "RANKS": str(layout.ranks),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
        "OMP_NUM_THREADS": "1",
    }
    command = [str(ROOT / f"examples/recipes/{recipe}.sh"), *layout.arguments(), *arguments]
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    return Job(layout, process, log)


def together(recipe: str, arguments: dict[Layout, list[str]], logs: Path, available: int) -> dict[str, dict]:
    """Runs layouts at the same time and gives the curves of those that came through."""
    jobs, first = [], 0
    for layout, own in arguments.items():
        log = logs / f"{layout.text.replace(':', '_')}-{len(list(logs.iterdir()))}.log"
        gpus = [(first + rank) % available for rank in range(layout.ranks)]
        jobs.append(start(recipe, layout, own, log, gpus))
        first += layout.ranks
    curves = {job.layout.text: job.curves() for job in jobs}
    return {text: curve for text, curve in curves.items() if curve is not None}


def run(recipe: str, groups: list[list[Layout]], steps: int, extra: list[str], out: Path, gpus: int) -> dict:
    """Unbroken and resumed curves of every layout, written to `out` group by group."""
    half, logs = steps // 2, out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    curves: dict = {"recipe": recipe, "steps": steps, "unbroken": {}, "resumed": {}}
    with tempfile.TemporaryDirectory(prefix="curves-") as directory:
        initial = f"{directory}/initial"
        one_step = ["--train-iters", "1", "--lr-decay-iters", str(steps),
                    "--save", initial, "--save-interval", "1", "--eval-iters", "0"]  # fmt: skip
        together(recipe, {Layout("1"): [*extra, *one_step]}, logs, gpus)
        common = [*extra, "--train-iters", str(steps), "--log-interval", "1", "--eval-iters", "0"]
        first = ["--load", initial, "--finetune", "--save-interval", str(half)]
        for layouts in groups:
            own = {layout: f"{directory}/{layout.text.replace(':', '_')}" for layout in layouts}
            unbroken = {layout: [*common, *first, "--save", path] for layout, path in own.items()}
            found = together(recipe, unbroken, logs, gpus)
            resumed = {
                layout: [*common, "--load", path, "--ckpt-step", str(half)]
                for layout, path in own.items()
                if layout.text in found
            }
            curves["unbroken"] |= found
            curves["resumed"] |= together(recipe, resumed, logs, gpus)
            out.write_text(json.dumps(curves))
    return curves


def difference(curve: dict[str, list], reference: dict[str, list]) -> list[float]:
    """Relative difference of the loss at each step that both have."""
    expected = dict(zip(reference["step"], reference["loss"]))
    return [abs(loss - expected[step]) / expected[step] for step, loss in zip(curve["step"], curve["loss"])]


def compare(curves: dict) -> list[str]:
    """A line a layout: how far it is from one rank, and its resumed half from its unbroken run."""
    lines = ["layout       first    last     largest relative difference: steps 1-20   all steps   resumed"]
    for text, curve in curves["unbroken"].items():
        apart, loss = difference(curve, curves["unbroken"]["1"]), curve["loss"]
        resumed = curves["resumed"].get(text)
        broken = max(difference(resumed, curve)) if resumed else float("nan")
        lines.append(
            f"{text:12s} {loss[0]:.5f}  {loss[-1]:.5f}  {max(apart[:20]):38.1e}   {max(apart):9.1e}   {broken:7.1e}"
        )
    return lines


def plot(files: list[Path], picture: Path) -> None:
    """One panel a loss term, and one for the differences from one rank; a line a layout, the same colour in all.

    Args:
        files: whose first one's losses are drawn, with its resumed halves as dots; of all, the differences.
        picture: to write.
    """
    import matplotlib.pyplot as plt

    runs = {path.stem: json.loads(path.read_text()) for path in files}
    curves = runs[files[0].stem]
    layouts = dict.fromkeys(text for run in runs.values() for text in run["unbroken"])
    colours = {text: f"C{index}" for index, text in enumerate(layouts)}
    terms = [name for name in curves["unbroken"]["1"] if name.endswith("loss") and name != "loss"]
    columns = -(-(len(terms) + 1) // 2)
    figure, grid = plt.subplots(2, columns, figsize=(5 * columns, 7), constrained_layout=True)
    panels = list(grid.flatten())
    for panel, term in zip(panels, terms):
        _draw_term(panel, term, curves, colours)
    _draw_differences(panels[len(terms)], runs, colours)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def _draw_term(panel, term: str, curves: dict, colours: dict[str, str]) -> None:
    for text, curve in curves["unbroken"].items():
        panel.plot(curve["step"], curve[term], color=colours[text], label=Layout(text).title(), linewidth=1)
        resumed = curves["resumed"][text]
        panel.plot(resumed["step"][::5], resumed[term][::5], ".", color=colours[text], markersize=3)
    panel.set(title=term, xlabel=f"step (dots: resumed after {curves['steps'] // 2})", yscale="log")
    panel.legend(fontsize=7)


def _draw_differences(panel, runs: dict[str, dict], colours: dict[str, str]) -> None:
    for (name, run), style in zip(runs.items(), ("-", ":")):
        for text, curve in run["unbroken"].items():
            if text == "1":
                continue
            apart = [max(each, 1e-8) for each in difference(curve, run["unbroken"]["1"])]
            label = f"{Layout(text).title()}, {name}"
            panel.plot(curve["step"], apart, style, color=colours[text], linewidth=1, label=label)
    panel.set(title="loss, relative difference from 1 rank", xlabel="step", yscale="log")
    panel.legend(fontsize=7)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="any_to_any_small")
    parser.add_argument("--layouts", nargs="+", help="such as 1,2:tp2-sp,2:pp2 4:tp2-pp2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("out/curves.json"))
    parser.add_argument("--plot", nargs="+", type=Path, metavar="CURVES", help="draw these files' curves to --out")
    options, extra = parser.parse_known_args()
    if options.plot:
        plot(options.plot, options.out)
        for path in options.plot:
            print(path.stem, *compare(json.loads(path.read_text())), sep="\n")
        return
    groups = [[Layout(text) for text in group.split(",")] for group in options.layouts]
    most = max(layout.ranks for group in groups for layout in group)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    curves = run(options.recipe, groups, options.steps, extra, options.out, torch.cuda.device_count() or most)
    print(*compare(curves), sep="\n")


if __name__ == "__main__":
    main()
