"""Loss curves of one recipe on several layouts, all from the same weights, each also broken off and resumed.

    python -m benchmarks.loss_curves --layouts 1 2:tp2-sp 2:pp2 --steps 200 --out out/curves.json
    python -m benchmarks.loss_curves --plot out/curves.json docs/loss_curves.png

The first run, on one rank, takes a single step with learning rate 0 and saves: these are the initial
weights that every layout loads. Then each layout trains all steps and saves half-way, and a second run
goes on from there. Layouts between two commas run at the same time, on GPUs of their own.
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

    def curves(self) -> dict[str, list]:
        """Every term's losses, by step from the run's first; ends the program if the run failed."""
        code = self.process.wait()
        text = self.log.read_text()
        if code:
            sys.exit(f"{self.layout.text} failed with {code}:\n{text[-6000:]}")
        steps: dict[str, list] = {"step": []}
        for line in filter(LOGGED.search, text.splitlines()):
            steps["step"].append(int(LOGGED.search(line).group(1)))
            for name, value in TERM.findall(line):
                losses = steps.setdefault(name.strip(), [])
                # Megatron prints its first step without forgetting it: the second line is a mean of two.
                losses.append(float(value) if len(losses) != 1 else 2 * float(value) - losses[0])
        steps["seconds"] = [float(ms) / 1e3 for ms in re.findall(r"per iteration \(ms\): ([\d.]+)", text)]
        return steps


def start(recipe: str, layout: Layout, arguments: list[str], log: Path, first_gpu: int, port: int) -> Job:
    """Starts the recipe's script on GPUs of its own."""
    gpus = ",".join(str(first_gpu + rank) for rank in range(layout.ranks))
    environment = os.environ | {
        "RANKS": str(layout.ranks),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": gpus,
        "OMP_NUM_THREADS": "1",
    }
    command = [str(ROOT / f"examples/recipes/{recipe}.sh"), *layout.arguments(), *arguments]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    return Job(layout, process, log)


def together(recipe: str, layouts: list[Layout], of: dict[str, list[str]], logs: Path) -> dict[str, dict]:
    """Runs layouts at the same time and gives their curves."""
    jobs, gpu = [], 0
    for index, layout in enumerate(layouts):
        log = logs / f"{layout.text.replace(':', '_')}-{len(list(logs.iterdir()))}.log"
        jobs.append(start(recipe, layout, of[layout.text], log, gpu, 29600 + index))
        gpu += layout.ranks
    return {job.layout.text: job.curves() for job in jobs}


def run(recipe: str, groups: list[list[Layout]], steps: int, extra: list[str], logs: Path) -> dict:
    """Unbroken and resumed curves of every layout."""
    half = steps // 2
    with tempfile.TemporaryDirectory(prefix="curves-") as directory:
        initial = Path(directory) / "initial"
        one_step = ["--train-iters", "1", "--lr-decay-iters", str(steps), "--save", str(initial),
                    "--save-interval", "1", "--eval-iters", "0"]  # fmt: skip
        together(recipe, [Layout("1")], {"1": [*extra, *one_step]}, logs)
        curves: dict = {"recipe": recipe, "steps": steps, "unbroken": {}, "resumed": {}}
        for layouts in groups:
            common = [*extra, "--train-iters", str(steps), "--log-interval", "1"]
            own = {layout.text: str(Path(directory) / layout.text.replace(":", "_")) for layout in layouts}
            first = {
                text: [*common, "--load", str(initial), "--finetune", "--save", path, "--save-interval", str(half)]
                for text, path in own.items()
            }
            second = {
                text: [*common, "--load", path, "--ckpt-step", str(half)] for text, path in own.items()
            }
            curves["unbroken"] |= together(recipe, layouts, first, logs)
            curves["resumed"] |= together(recipe, layouts, second, logs)
    return curves


def compare(curves: dict) -> list[str]:
    """How far layouts are from one rank, and resumed runs from unbroken ones: largest differences of the loss."""
    lines = []
    reference = curves["unbroken"]["1"]["loss"]
    for text, curve in curves["unbroken"].items():
        loss = curve["loss"]
        apart = max(abs(a - b) / b for a, b in zip(loss, reference))
        resumed = curves["resumed"][text]
        offset = resumed["step"][0] - 1
        broken = max(abs(a - b) / b for a, b in zip(resumed["loss"], loss[offset:]))
        lines.append(
            f"{text:12s} first {loss[0]:.5f}  last {loss[-1]:.5f}  largest relative difference from one rank "
            f"{apart:.2e}, of the resumed half from the unbroken one {broken:.2e}; "
            f"median step {sorted(curve['seconds'])[len(curve['seconds']) // 2] * 1e3:.1f} ms"
        )
    return lines


def plot(curves: dict, path: Path) -> None:
    """One panel a term; a line a layout, dashed where it was resumed."""
    import matplotlib.pyplot as plt

    terms = [name for name in curves["unbroken"]["1"] if name.endswith("loss") and name != "loss"]
    figure, panels = plt.subplots(1, len(terms), figsize=(4.5 * len(terms), 3.6), constrained_layout=True)
    for panel, term in zip(panels, terms):
        for index, (text, curve) in enumerate(curves["unbroken"].items()):
            colour = f"C{index}"
            panel.plot(curve["step"], curve[term], color=colour, label=text, linewidth=1)
            resumed = curves["resumed"][text]
            panel.plot(resumed["step"], resumed[term], color=colour, linestyle="--", linewidth=2, alpha=0.5)
        panel.set(title=term, xlabel="step", yscale="log")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="any_to_any_small")
    parser.add_argument("--layouts", nargs="+", help="such as 1 2:tp2-sp,2:pp2 4:tp2-pp2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("out/curves.json"))
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("CURVES", "PICTURE"))
    options, extra = parser.parse_known_args()
    if options.plot:
        plot(json.loads(options.plot[0].read_text()), options.plot[1])
        return
    groups = [[Layout(text) for text in group.split(",")] for group in options.layouts]
    logs = options.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    curves = run(options.recipe, groups, options.steps, extra, logs)
    options.out.write_text(json.dumps(curves))
    print(*compare(curves), sep="\n")


if __name__ == "__main__":
    main()
