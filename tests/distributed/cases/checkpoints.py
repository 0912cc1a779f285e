"""A checkpoint of any layout goes on in any other, optimizer included: the table of ``docs/checkpoints.md``.

Each family of layouts saves in every layout and loads each of these checkpoints in every layout; its cells are the
pairs. `tests/unit/test_checkpoints_table.py` compares the page with `FAMILIES`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from megatron_mimo.launch import Run, initialize
from megatron_mimo.training import Trainer, TrainingControl
from tests.distributed.cases.pretrain import alone
from tests.distributed.cases.training import assert_close, four_samples, trainer
from tests.distributed.harness import case, relayout, shared_directory

EXPERTS = dict(
    num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="alltoall", moe_aux_loss_coeff=0.0,
    moe_router_load_balancing_type="none", add_bias_linear=False,
)  # fmt: skip
_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "CP": "context_parallel_size",
}
ALONE = "1 rank"


@dataclass(frozen=True)
class Family:
    """Layouts, each of which reads what each of them writes.

    Args:
        ranks: their number; one of them alone under `ALONE`.
        layouts: by the names that the page gives them, as `layout_of` reads them. Tensor parallelism is with sequence
            parallelism.
        distributed: whether the optimizer is distributed.
        model: what is particular about the model.
    """

    ranks: int
    layouts: tuple[str, ...]
    distributed: bool = True
    model: dict = field(default_factory=dict)


#: By the heading that the page gives them.
FAMILIES = {
    "Distributed optimizer": Family(2, (ALONE, "DP 2", "TP 2", "PP 2", "PP 2 VPP 2")),
    "Optimizer that is not distributed": Family(2, ("DP 2", "TP 2", "PP 2 VPP 2"), distributed=False),
    "Experts, whole on every rank": Family(2, ("DP 2", "TP 2", "PP 2"), model=EXPERTS),
    # Attention of torch's layers has no context parallelism: these layers mix no tokens.
    "Parts of a sequence": Family(2, ("DP 2", "CP 2", "TP 2", "PP 2"), model={"token_local": True}),
    "Two axes": Family(4, ("TP 2 DP 2", "TP 2 PP 2", "PP 2 VPP 2 DP 2")),
    "Experts, shared out": Family(4, ("DP 4 EP 2", "DP 4 EP 4", "PP 2 EP 2 DP 2"), model=EXPERTS),
}


def layout_of(name: str) -> dict[str, int]:
    """The arguments of `initialize` for a layout as the page names it, such as ``TP 2 PP 2``."""
    words = name.split()
    return {_SIZES[axis]: int(size) for axis, size in zip(words[::2], words[1::2]) if axis != "DP"}


@contextmanager
def laid_out(name: str) -> Iterator[Run | None]:
    """The run of a layout; of `ALONE` on the first rank, and nothing on the others."""
    if name != ALONE:
        yield relayout(**layout_of(name))
        return
    run = relayout()
    with alone():
        yield initialize(backend="gloo") if run.rank == 0 else None


def going_on(ours: Trainer) -> list[dict]:
    """The losses and the norm of the gradient of two steps."""
    reports = [ours.train_step(four_samples) for _ in range(2)]
    return [dict(report.losses) | {"gradient norm": report.gradient_norm} for report in reports]


def each_reads_each(heading: str, root: Path) -> None:
    """Saves after two steps in every layout of a family; every layout goes on from each as the unbroken run did."""
    family = FAMILIES[heading]

    def build(run: Run, directory: Path | None = None) -> Trainer:
        return trainer(run, directory, distributed=family.distributed, **family.model)

    unbroken = build(relayout(**layout_of(family.layouts[-1])), root / "start")
    start = unbroken.save()
    going_on(unbroken)
    expected = going_on(unbroken)
    places = {layout: root / layout.replace(" ", "") for layout in family.layouts}
    for layout, directory in places.items():
        with laid_out(layout) as run:
            if run is not None:
                ours = build(run, directory)
                ours.load(start)
                going_on(ours)
                ours.save()
    for layout in family.layouts:
        with laid_out(layout) as run:
            if run is None:
                continue
            ours = build(run)
            for writer, directory in places.items():
                assert ours.load(directory / "step_00000002") == 2
                try:
                    assert_close(going_on(ours), expected)
                except AssertionError as error:
                    raise AssertionError(f"saved in {writer}, loaded in {layout}: {error}") from error


@case(ranks=2, timeout_s=120)
def every_layout_goes_on_from_every_other(run: Run) -> None:
    each_reads_each("Distributed optimizer", shared_directory() / "distributed")


@case(ranks=2, timeout_s=180, long=True)
def every_layout_goes_on_from_every_other_without_a_distributed_optimizer(run: Run) -> None:
    each_reads_each("Optimizer that is not distributed", shared_directory() / "whole")


@case(ranks=2, timeout_s=180, long=True)
def every_layout_of_experts_goes_on_from_every_other_and_refuses_their_state_where_they_are_shared_out(
    run: Run,
) -> None:
    root = shared_directory() / "experts"
    each_reads_each("Experts, whole on every rank", root)
    with laid_out("EP 2") as run:
        ours = trainer(run, None, distributed=True, **EXPERTS)
        before = {name: weight.clone() for name, weight in ours.models[0].named_parameters()}
        with pytest.raises(
            ValueError, match="expected the state of 2 optimizers, found that of 1: with expert paralleli"
        ):
            ours.load(root / "DP2" / "step_00000002")
        assert all(torch.equal(weight, before[name]) for name, weight in ours.models[0].named_parameters())
        ours.load(root / "DP2" / "step_00000002", weights_only=True)
        ours.settings = replace(ours.settings, directory=root / "EP2")
        going_on(ours)
        shared_out = ours.save()
    with (
        laid_out("DP 2") as run,
        pytest.raises(ValueError, match="expected the state of 1 optimizers, found that of 2: with expert paralleli"),
    ):
        trainer(run, None, distributed=True, **EXPERTS).load(shared_out)


@case(ranks=2, timeout_s=180, long=True)
def every_layout_of_parts_of_a_sequence_goes_on_from_every_other(run: Run) -> None:
    each_reads_each("Parts of a sequence", shared_directory() / "parts")


@case(ranks=4, timeout_s=300, long=True)
def every_layout_of_two_axes_goes_on_from_every_other(run: Run) -> None:
    each_reads_each("Two axes", shared_directory() / "axes")


@case(ranks=2)
def what_is_written_in_the_background_goes_on_at_any_data_parallelism_and_is_refused_elsewhere(run: Run) -> None:
    directory = shared_directory() / "background"
    unbroken = trainer(run, directory, distributed=True)
    going_on(unbroken)
    unbroken.save(background=True)
    unbroken._saver.wait()
    expected = going_on(unbroken)
    for layout in ("TP 2", "PP 2", ALONE):
        with laid_out(layout) as one:
            if one is None:
                continue
            ours = trainer(one, None, distributed=True)
            if layout == ALONE:
                assert ours.load(directory / "step_00000002") == 2
                assert_close(going_on(ours), expected)
                continue
            before = {
                name: weight.clone() for name, weight in ours.models[0].state_dict().items() if weight is not None
            }
            with pytest.raises(
                ValueError, match="written in the background, and its optimizer state is read by its own"
            ):
                ours.load(directory / "step_00000002")
            after = ours.models[0].state_dict()
            assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@case(ranks=4, timeout_s=300, long=True)
def every_layout_of_experts_that_are_shared_out_goes_on_from_every_other(run: Run) -> None:
    each_reads_each("Experts, shared out", shared_directory() / "shared-out")


@case(ranks=2, timeout_s=120)
def a_run_whose_first_or_last_stage_is_frozen_goes_on_in_any_layout(run: Run) -> None:
    for frozen in (["language_model", "encoders", "input_projections"], ["decoders", "output_projections"]):
        directory = shared_directory() / frozen[0]
        control = TrainingControl(frozen=frozen)
        unbroken = trainer(relayout(**layout_of("PP 2")), directory, control=control)
        going_on(unbroken)
        unbroken.save()
        expected = going_on(unbroken)
        for layout in ("PP 2", "TP 2", "DP 2"):
            ours = trainer(relayout(**layout_of(layout)), None, control=control)
            assert ours.load(directory / "step_00000002") == 2
            assert_close(going_on(ours), expected)
