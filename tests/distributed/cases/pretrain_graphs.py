"""Megatron's own loop replays its steps, with --cuda-graph-impl full_iteration; captures are recordings here."""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from examples.recipes import any_to_any_small
from examples.recipes.any_to_any_small import Sample
from megatron_mimo.launch import Run, shutdown
from tests.distributed.cases.pretrain import Curves, run_recipe
from tests.distributed.harness import case, shared_directory
from tests.recorded_graphs import record_graphs

STEPS = 6
#: One step launched, one captured and replayed, the others replayed.
GRAPHS = [
    "--cuda-graph-impl", "full_iteration", "--no-check-for-nan-in-loss-and-grad", "--cuda-graph-warmup-steps", "1",
]  # fmt: skip
KINDS = ("seen", "drawn", "heard", "sung")
LAYOUTS = {
    "tensor parallelism, experts": [
        "--tensor-model-parallel-size", "2", "--sequence-parallel", "--calculate-per-token-loss",
        "--num-experts", "4", "--moe-router-topk", "2", "--moe-aux-loss-coeff", "0.01", "--disable-bias-linear",
        "--moe-token-dispatcher-type", "alltoall", "--moe-expert-capacity-factor", "1",
        "--moe-pad-expert-input-to-capacity",
    ],
    "interleaved stages": [
        "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1", "--num-layers", "4",
        "--overlap-p2p-communication-warmup-flush",
    ],
}  # fmt: skip


class Alike(Sequence[Sample]):
    """Samples that read and write a picture and a tone each, in one order: a recording on the CPU has one shape."""

    def __init__(self, length: int, offset: int) -> None:
        self._length, self._offset = length, offset

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(self._offset + index)
        sample, ids, learned = Sample(torch.empty(0), torch.empty(0)), [], []
        for kind in KINDS:
            turn = Sample(torch.empty(0), torch.empty(0))
            while not getattr(turn, kind):
                turn = Sample(torch.empty(0), torch.empty(0))
                said, answers = any_to_any_small._turn(turn, generator, self._length)
            ids += said
            learned += answers
            getattr(sample, kind).extend(getattr(turn, kind))
        room = self._length - len(ids)
        sample.ids = torch.tensor(ids + [any_to_any_small.TOKEN["<pad>"]] * room)
        sample.learned = torch.tensor(learned + [0] * room, dtype=torch.float32)
        return sample


def datasets(args: Namespace, samples: Sequence[int | None]) -> tuple[Alike, Alike, None]:
    del samples
    return Alike(args.seq_length, 0), Alike(args.seq_length, 1000), None


RECIPE = Namespace(model_config=any_to_any_small.model_config, datasets=datasets, collate=any_to_any_small.collate)


def told_of_steps(curves: Curves) -> Curves:
    """What is logged but for times: losses of training and of evaluations, auxiliary ones, norms, rates of learning."""
    return {tag: values for tag, values in curves.items() if not tag.startswith("throughput") and "time" not in tag}


def replayed(where: Path, layout: list[str], graphs: Callable[[], AbstractContextManager[object]]) -> Curves:
    """What the loop logs, with one step launched, one captured and all but that one replayed as without graphs.

    Args:
        where: a directory of its own, on all ranks.
        layout: arguments of Megatron's.
        graphs: within it captures work.
    """
    given, told = [*layout, "--eval-iters", "1", "--eval-interval", "2"], []
    eager = run_recipe(where / "eager", *given, steps=STEPS, recipe=RECIPE)
    with graphs(), mock.patch("megatron.training.print_rank_0", lambda text, *more: told.append(text)):
        graphed = run_recipe(where / "graphed", *given, *GRAPHS, steps=STEPS, recipe=RECIPE)
    assert told_of_steps(graphed) == told_of_steps(eager), where.name
    (line,) = [text for text in told if text.startswith("training steps as one CUDA graph")]
    assert line.endswith(f": 1 captured, {STEPS - 1} replayed, 1 launched kernel by kernel"), (where.name, line)
    return graphed


@contextmanager
def recorded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        record_graphs(patch)
        yield


@case(ranks=2, timeout_s=240)
def replayed_steps_of_megatrons_loop_log_what_launched_ones_do_and_evaluations_draw_alike(run: Run) -> None:
    shutdown()
    for name, layout in LAYOUTS.items():
        logged = replayed(shared_directory() / "graphs" / name, layout, recorded)
        assert run.rank == 0 or {"text loss", "images/pixels loss validation", "grad-norm"} <= logged.keys()


REFUSED = {
    "--cuda-graph-buckets, --cuda-graph-label-rows and --cuda-graph": ["--cuda-graph-buckets", "images=4"],
    "--cuda-graph-packed-sequences shape steps": ["--cuda-graph-packed-sequences", "8"],
    "buckets has 'imagse', expected modalities that are read": [*GRAPHS, "--cuda-graph-buckets", "imagse=4"],
    "overlap_param_gather=False": [
        *GRAPHS, "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"
    ],
    "--save-wgrads-interval 2 with --cuda-graph-impl full_iteration": [*GRAPHS, "--save-wgrads-interval", "2"],
    "--timing-log-level 1 with --cuda-graph-impl full_iteration": [*GRAPHS, "--timing-log-level", "1"],
    "graphed=() of TrainingControl": [*GRAPHS, "--graph-encoders", "images/encoders"],
}  # fmt: skip


@case(ranks=2)
def what_a_step_as_one_graph_cannot_be_right_with_is_refused_by_its_argument(run: Run) -> None:
    shutdown()
    with pytest.MonkeyPatch.context() as patch:
        record_graphs(patch)
        for message, arguments in REFUSED.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                run_recipe(shared_directory(), *arguments)
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        run_recipe(shared_directory(), *GRAPHS)
