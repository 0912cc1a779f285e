"""Many distributed cases in one torchrun, each its own pytest item.

**To add a case**, write a function in any file of ``tests/distributed/cases/`` and decorate it::

    from tests.distributed.harness import case

    @case(ranks=2, tensor_model_parallel_size=2)
    def logits_are_the_same_on_both_ranks(run):
        ...
        torch.testing.assert_close(theirs, mine)

Nothing else is needed. Every rank calls the function with the `megatron_mimo.launch.Run` of that layout, freshly
initialised on gloo and seeded; it passes when it returns on every rank. Decorate it again for another layout, and it is
another test. Its name is its claim, and the layout is added to it: ``logits_are_the_same_on_both_ranks[2-tp2]``.

To compare with one rank, start from data parallelism alone (``@case(ranks=2)``): each rank's model is then whole, and
as long as it is not wrapped in DDP it talks to nobody. Compute the reference, then ``run = relayout(...)``.
``tests/distributed/shards.py`` cuts whole weights for this rank and puts the gradients of all ranks together.

Temporary files go to the directory that `shared_directory` gives, the same one on every rank.

**How it runs.** `tests/distributed/test_cases.py` starts one torchrun for all selected cases of a world size, when the
first of them is asked for. Ranks go through the cases in order (``tests/distributed/rank.py``). A rank on which a case
raises writes its traceback and exits, so nobody waits for it; a case that exceeds its `timeout_s` is ended with the
stack of every thread. The cases after it then run in a new torchrun.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mimo.launch import Run, initialize, shutdown

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).parent / "cases"

# Starting the ranks and importing Megatron-Core: 10 s for 2 ranks and 20 s for 4 on 2 cores; more when they are busy.
STARTUP_S = 180

_SHORT = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}


@dataclass(frozen=True)
class Case:
    """One function under one layout."""

    function: Callable[[Run], None]
    ranks: int
    layout: tuple[tuple[str, int], ...]
    timeout_s: float

    @property
    def id(self) -> str:
        sizes = [str(self.ranks), *(f"{_SHORT[name]}{size}" for name, size in self.layout)]
        return f"{self.function.__module__.rsplit('.', 1)[-1]}.{self.function.__name__}[{'-'.join(sizes)}]"


_registry: dict[str, Case] = {}


def case(
    ranks: int, timeout_s: float = 60.0, **layout: int
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Registers a function as a distributed case on `ranks` ranks; `layout` are arguments of `initialize`."""

    def register(function: Callable[[Run], None]) -> Callable[[Run], None]:
        new = Case(function, ranks, tuple(layout.items()), timeout_s)
        if new.id in _registry:
            raise ValueError(f"{new.id} is registered twice; give one of the two functions another name.")
        _registry[new.id] = new
        return function

    return register


def all_cases() -> dict[str, Case]:
    """Every case of ``tests/distributed/cases/``, by id, in the order of files and lines."""
    for path in sorted(CASES.glob("[!_]*.py")):
        importlib.import_module(f"tests.distributed.cases.{path.stem}")
    return dict(_registry)


def relayout(**layout: int) -> Run:
    """Ends the run in progress and gives one of the same world with another layout. Every rank calls it."""
    shutdown()
    return initialize(backend="gloo", **layout)


def shared_directory() -> Path:
    """A directory of this job, the same on every rank. Give the files in it names of your own case."""
    return Path(os.environ["MIMO_CASES_DIRECTORY"])


@dataclass(frozen=True)
class Outcome:
    """How one case went.

    Args:
        report: what the ranks say of its failure, None where it passed.
        seconds: how long its slowest rank took; the first case of a job bears the start of the ranks.
    """

    report: str | None
    seconds: float


def run_cases(cases: Sequence[Case]) -> dict[str, Outcome]:
    """Runs `cases`, all of one world size, and gives the outcome of each by id."""
    outcomes: dict[str, Outcome] = {}
    pending = list(cases)
    while pending:
        reached = _run_job(pending)
        outcomes |= reached
        pending = [case for case in pending if case.id not in reached]
    return outcomes


def _run_job(cases: Sequence[Case]) -> dict[str, Outcome]:
    """Starts one torchrun and gives the outcomes of the cases that it got to, the first at least."""
    began = time.perf_counter()
    ranks = cases[0].ranks
    with tempfile.TemporaryDirectory(prefix="mimo-cases-") as directory:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "tests.distributed.rank", *(case.id for case in cases)]
        environment = os.environ | {"MIMO_CASES_DIRECTORY": directory, "OMP_NUM_THREADS": "1"}
        with open(Path(directory) / "output", "w+") as output:
            job = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                job.wait(timeout=STARTUP_S + sum(case.timeout_s for case in cases))
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
            output.seek(0)
            printed = output.read()
        of_ranks = [_lines(Path(directory), rank) for rank in range(ranks)]
    start = time.perf_counter() - began - sum(_slowest(of_ranks, case) for case in cases)
    outcomes: dict[str, Outcome] = {}
    for case in cases:
        report = _report([of_rank.get(case.id) for of_rank in of_ranks], printed)
        outcomes[case.id] = Outcome(report, _slowest(of_ranks, case) + (0.0 if outcomes else start))
        if report is not None:
            break
    return outcomes


#: What a rank wrote of a case: a traceback or an empty string, and how many seconds the case took.
Line = tuple[str, float]


def _report(of_ranks: Sequence[Line | None], printed: str) -> str | None:
    """What the ranks say of a case, None where all of them passed it."""
    if all(line is not None and line[0] == "" for line in of_ranks):
        return None
    told = [f"rank {rank} of {len(of_ranks)}:\n{line[0]}" for rank, line in enumerate(of_ranks) if line and line[0]]
    silent = [rank for rank, line in enumerate(of_ranks) if line is None]
    if not told:
        told = [f"the job died; last output:\n{printed[-6000:]}"]
    return "\n".join([*told, f"ranks that did not finish: {silent}"])


def _slowest(of_ranks: Sequence[dict[str, Line]], case: Case) -> float:
    return max(of_rank.get(case.id, ("", 0.0))[1] for of_rank in of_ranks)


def _lines(directory: Path, rank: int) -> dict[str, Line]:
    """What `rank` wrote, by case."""
    path = directory / f"rank{rank}.jsonl"
    if not path.exists():
        return {}
    return {id: (report, seconds) for id, report, seconds in map(json.loads, path.read_text().splitlines())}
