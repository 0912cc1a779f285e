"""Many distributed cases on ranks that are started once, each its own pytest item.

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

**How it runs.** All selected cases of a world size are one job, of ranks that `tests.warm` forks: they have Megatron at
once, where torchrun's would each import it. Jobs begin with the session and run beside its other tests, one after the
other (`Jobs`). Ranks go through the cases in order (``tests/distributed/rank.py``). A rank on which a case raises
writes its traceback and exits, so nobody waits for it; a case that exceeds its `timeout_s` is ended with the stack of
every thread. The cases after it then run in a new job. That torchrun itself starts our ranks and ends them is
`tests/unit/test_launch.py`'s to show.
"""

import gc
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mimo.compat.megatron import release_graphs_of_experts
from megatron_mimo.launch import Run, initialize, shutdown
from tests import warm

ROOT = warm.ROOT
CASES = Path(__file__).parent / "cases"

# The warm process imports for 6 s of a core, which may be busy; then 8 ranks start in 2 s.
STARTUP_S = 120

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
    long: bool = False

    @property
    def id(self) -> str:
        sizes = [str(self.ranks), *(f"{_SHORT[name]}{size}" for name, size in self.layout)]
        return f"{self.function.__module__.rsplit('.', 1)[-1]}.{self.function.__name__}[{'-'.join(sizes)}]"


_registry: dict[str, Case] = {}


def case(
    ranks: int, timeout_s: float = 60.0, long: bool = False, **layout: int
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Registers a function as a distributed case on `ranks` ranks; `layout` are arguments of `initialize`.

    A `long` one is of `make test-long` alone.
    """

    def register(function: Callable[[Run], None]) -> Callable[[Run], None]:
        new = Case(function, ranks, tuple(layout.items()), timeout_s, long)
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
    end_run()
    return initialize(backend="gloo", **layout)


def end_run() -> None:
    """Ends the run in progress and frees its models, also those in cycles that Python's collector does not see.

    Of each model 20 process groups would stay, whose threads wake up every 10 ms. What keeps it are nodes of autograd
    with DDP's hooks: of experts' dispatchers, and of the float32 shards of a distributed optimizer.
    """
    shutdown()
    modules = [each for each in gc.get_objects() if issubclass(type(each), torch.nn.Module)]
    release_graphs_of_experts(modules)
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            vars(module).clear()  # of which nothing is used any more
    del modules
    gc.collect()


def shared_directory() -> Path:
    """A directory of this job, the same on every rank. Give the files in it names of your own case."""
    return Path(os.environ["MIMO_CASES_DIRECTORY"])


@dataclass(frozen=True)
class Outcome:
    """How one case went.

    Args:
        report: what the ranks say of its failure, None where it passed.
        seconds: how long its slowest rank took; the first case of a job bears the start of the ranks.
        cpu_seconds: what its ranks computed, together: comparable when the machine is busy.
    """

    report: str | None
    seconds: float
    cpu_seconds: float


def run_cases(cases: Sequence[Case]) -> dict[str, Outcome]:
    """Runs `cases`, all of one world size, and gives the outcome of each by id."""
    outcomes: dict[str, Outcome] = {}
    pending = list(cases)
    while pending:
        reached = _run_job(pending)
        outcomes |= reached
        pending = [case for case in pending if case.id not in reached]
    return outcomes


class Jobs:
    """The cases of a session, which run in the background one world size after the other."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._runner = ThreadPoolExecutor(max_workers=1)
        self._jobs: dict[int, Future[dict[str, Outcome]]] = {
            ranks: self._runner.submit(run_cases, [case for case in cases if case.ranks == ranks])
            for ranks in sorted({case.ranks for case in cases})
        }

    def outcome(self, case: Case) -> Outcome:
        """How `case` went; waits for its job."""
        return self._jobs[case.ranks].result()[case.id]

    def stop(self) -> None:
        """Ends what still runs."""
        self._runner.shutdown(wait=False, cancel_futures=True)


def _run_job(cases: Sequence[Case]) -> dict[str, Outcome]:
    """Starts the ranks and gives the outcomes of the cases that they got to, the first at least."""
    began = time.perf_counter()
    ranks = cases[0].ranks
    with tempfile.TemporaryDirectory(prefix="mimo-cases-") as directory:
        try:
            done = warm.ranks(
                ranks, "-m", "tests.distributed.rank", *(case.id for case in cases),
                env=os.environ | {"MIMO_CASES_DIRECTORY": directory},
                timeout=STARTUP_S + sum(case.timeout_s for case in cases),
            )  # fmt: skip
            printed = done.stdout + done.stderr
        except TimeoutError as error:
            printed = str(error)
        of_ranks = [_lines(Path(directory), rank) for rank in range(ranks)]
    spent = {case.id: [of_rank[case.id] for of_rank in of_ranks if case.id in of_rank] for case in cases}
    seconds = {id: max((line.seconds for line in lines), default=0.0) for id, lines in spent.items()}
    seconds[cases[0].id] += time.perf_counter() - began - sum(seconds.values())
    outcomes: dict[str, Outcome] = {}
    for case in cases:
        report = _report([of_rank.get(case.id) for of_rank in of_ranks], printed)
        cpu_seconds = sum(line.cpu_seconds for line in spent[case.id])
        outcomes[case.id] = Outcome(report, seconds[case.id], cpu_seconds)
        if report is not None:
            break
    return outcomes


class Line(NamedTuple):
    """What a rank writes of a case: a traceback or an empty string, and what it spent."""

    report: str
    seconds: float
    cpu_seconds: float


def _report(of_ranks: Sequence[Line | None], printed: str) -> str | None:
    """What the ranks say of a case, None where all of them passed it."""
    if all(line is not None and line.report == "" for line in of_ranks):
        return None
    told = [
        f"rank {rank} of {len(of_ranks)}:\n{line.report}" for rank, line in enumerate(of_ranks) if line and line.report
    ]
    silent = [rank for rank, line in enumerate(of_ranks) if line is None]
    if not told:
        told = [f"the job died; last output:\n{printed[-6000:]}"]
    return "\n".join([*told, f"ranks that did not finish: {silent}"])


def _lines(directory: Path, rank: int) -> dict[str, Line]:
    """What `rank` wrote, by case."""
    path = directory / f"rank{rank}.jsonl"
    if not path.exists():
        return {}
    return {id: Line(*line) for id, *line in map(json.loads, path.read_text().splitlines())}
