"""`examples/pretrain_mimo.py`: Megatron's own loop trains a recipe alike on every layout, stops and goes on.

One process runs it many times, because starting takes longer than training.
"""

import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.training.argument_utils import ArgumentGroupFactory
from torch import Tensor
from torch.distributed import checkpoint

from examples.recipes import any_to_any_small, vlm_clip_1b
from megatron_mimo import launch
from megatron_mimo.launch import Run, shutdown
from megatron_mimo.training import (
    adapt_megatron,
    add_mimo_args,
    dataset_provider,
    forward_step,
    model_provider,
    pretrain,
)
from tests import evil
from tests.distributed.harness import case, end_run, shared_directory

STEPS = 4
SIZES = [
    "--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64", "--num-attention-heads", "4",
    "--seq-length", "64", "--max-position-embeddings", "64", "--position-embedding-type", "rope",
    "--tokenizer-type", "NullTokenizer", "--vocab-size", "62", "--make-vocab-size-divisible-by", "32",
    "--untie-embeddings-and-output-weights", "--attention-dropout", "0", "--hidden-dropout", "0",
    "--no-gradient-accumulation-fusion", "--no-persist-layer-norm", "--transformer-impl", "local",
    "--no-rope-fusion", "--micro-batch-size", "1", "--global-batch-size", "4",
]  # fmt: skip
TRAINING = [
    "--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--lr-decay-iters", str(STEPS),
    "--lr-warmup-iters", "1",
    # Adam's epsilon far above rounding: with 1e-8 its first step is the gradient's sign.
    "--adam-eps", "1e-3", "--weight-decay", "0.01", "--log-interval", "1", "--eval-iters", "0",
    "--eval-interval", "100", "--num-workers", "0", "--ckpt-format", "torch_dist", "--distributed-timeout-minutes", "1",
]  # fmt: skip

Curves = dict[str, dict[int, float]]

# Help texts: Megatron parses the source of its dataclasses for them, 0.7 s of each rank twice a run.
ArgumentGroupFactory._get_field_docstrings = lambda self, described: {}


def run_recipe(where: Path, *arguments: str, steps: int = STEPS, recipe=any_to_any_small, train=pretrain) -> Curves:
    """Trains a recipe (by `train`) and gives what TensorBoard holds of it: tag -> step -> value.

    Empty but on the last rank.
    """
    given = [
        *SIZES,
        *TRAINING,
        "--train-iters",
        str(steps),
        "--tensorboard-dir",
        str(where / "tensorboard"),
        *arguments,
    ]
    with command_line(given):
        try:
            train(recipe)
        finally:
            forget_megatron()
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    return scalars(where / "tensorboard") if last else {}


@contextmanager
def command_line(arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["pretrain_mimo.py", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def alone() -> Iterator[None]:
    """Within it, this process is a world of one rank."""
    kept = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    shutdown()
    started = launch._runs_started  # by which ranks that start a run together find each other
    try:
        yield
    finally:
        shutdown()
        launch._runs_started = started
        os.environ.update(kept)


def forget_megatron() -> None:
    """What a process that trains once leaves behind."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import global_vars

    if global_vars._GLOBAL_TENSORBOARD_WRITER is not None:
        global_vars.get_tensorboard_writer().close()
    if global_vars._GLOBAL_SIGNAL_HANDLER is not None:
        global_vars.get_signal_handler().release()
    global_vars.destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    end_run()


def scalars(directory: Path) -> Curves:
    """Everything that was logged to a TensorBoard directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not directory.exists():
        return {}
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def losses(curves: Curves) -> Curves:
    return {
        tag: values
        for tag, values in curves.items()
        if tag in ("loss", "text loss", "images/pixels loss", "tones/waves loss")
    }


def assert_close(found: Curves, expected: Curves, steps: range) -> None:
    """The losses of some steps, in float32 summed in other orders."""
    assert losses(found), sorted(found)
    for tag, values in losses(found).items():
        assert list(values) == list(steps), (tag, values)
        theirs = {step: expected[tag][step] for step in steps}
        assert values == pytest.approx(theirs, rel=2e-5), f"{tag}: found {values}, expected {theirs}"


LAYOUTS = {
    # Recomputation changes no loss either.
    "tp2_sp": [
        "--tensor-model-parallel-size", "2", "--sequence-parallel",
        "--recompute-granularity", "selective", "--encoder-recompute-granularity", "selective",
    ],
    "pp2": [
        "--pipeline-model-parallel-size", "2", "--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", "1", "--encoder-recompute-granularity", "full",
    ],
    "dp2": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
}  # fmt: skip


REFUSED = {
    "expected a sequence length that is a multiple of 2 (": [
        "--tensor-model-parallel-size",
        "2",
        "--sequence-parallel",
        "--seq-length",
        "63",
    ],
    "context_parallel_size 2": ["--context-parallel-size", "2"],
    "have no room there": [
        "--pipeline-model-parallel-size",
        "2",
        "--num-layers",
        "1",
        "--account-for-loss-in-pipeline-split",
    ],
    "frozen: the model has no part 'vision'": ["--freeze", "vision"],
    "--lr-factor: 'decoders' is given 2 times": ["--lr-factor", "decoders=1", "decoders=2"],
    "--decoupled-lr 0.0001 and --lr-factor language_model=0.5 both set": [
        "--decoupled-lr",
        "1e-4",
        "--lr-factor",
        "language_model=0.5",
    ],
    "embedding_rows: 64 is outside the vocabulary": ["--train-embedding-rows", "64"],
    "--modality-loss-weight: the model has no modality 'imagse', expected one of ['text', 'images', 'tones']": [
        "--modality-loss-weight",
        "imagse=3",
    ],
    "--data-path: the data is the recipe's": ["--data-path", "corpus", "--split", "1,0,0"],
    "--mtp-num-layers 1: multi-token prediction is not supported": ["--mtp-num-layers", "1"],
    "--dataloader-type cyclic: multimodal batches are nested": ["--dataloader-type", "cyclic"],
}


@case(ranks=2)
def pretrain_refuses_before_any_process_group_and_names_the_argument(run: Run) -> None:
    shutdown()

    def built(*given, **named) -> None:
        raise AssertionError("a process group was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", built)
        for message, arguments in REFUSED.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                run_recipe(shared_directory(), *arguments)


@case(ranks=2, timeout_s=240)
def pretrain_trains_alike_on_every_layout_and_a_resumed_half_equals_the_unbroken_run(run: Run) -> None:
    where = shared_directory() / "pretrain"
    last, own = run.rank == run.world_size - 1, where / f"alone{run.rank}"
    with alone():  # each rank the same: Megatron keeps to itself how often it ran in a process
        run_recipe(own, "--save", str(own / "initial"), "--save-interval", "1", steps=1)
        one_rank = run_recipe(own / "one", "--load", str(own / "initial"), "--finetune")
    initial = ["--load", str(where / "alone0" / "initial"), "--finetune"]
    for name, layout in LAYOUTS.items():
        own = where / name
        unbroken = run_recipe(own, *layout, *initial, "--save", str(own / "saved"), "--save-interval", "2")
        if last:
            assert_close(unbroken, one_rank, range(1, STEPS + 1))
            assert_logged(unbroken)
        if name == "dp2":
            continue  # the next case resumes it
        resumed = run_recipe(own / "resumed", *layout, "--load", str(own / "saved"), "--ckpt-step", "2")
        if last:
            assert_close(resumed, unbroken, range(3, STEPS + 1))


def assert_logged(curves: Curves) -> None:
    """Rates of tokens, samples, items, operations and of their share of the peak, of every step."""
    expected = ["tokens/s", "images tokens read/s", "tones tokens written/s", "images/vit items/s", "TFLOP/s"]
    parts = ["language_model", "images/encoders/vit", "images/decoders/pixels", "tones/decoders/waves"]
    for name in [*expected, *(f"{part} TFLOP/s" for part in parts)]:
        rates = curves[f"throughput/{name}"]
        assert list(rates) == list(range(1, STEPS + 1)), name
    assert all(rate > 0 for rate in curves["throughput/TFLOP/s"].values())
    together = sum(curves[f"throughput/{name}"][STEPS] for name in flops(curves))
    assert curves["throughput/TFLOP/s"][STEPS] == pytest.approx(together, rel=1e-5)


def flops(curves: Curves) -> list[str]:
    names = [tag.removeprefix("throughput/") for tag in curves if tag.startswith("throughput/")]
    return [name for name in names if name.endswith(" TFLOP/s")]


@case(ranks=2, timeout_s=120)
def vlm_clip_1b_takes_a_step_of_its_four_images_with_everything_but_its_sizes(run: Run) -> None:
    shutdown()
    length = 4 * (vlm_clip_1b.IMAGE_ROWS + 1)
    arguments = [
        "--seq-length", str(length), "--max-position-embeddings", str(length), "--num-layers", "1",
        "--global-batch-size", "2", "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear",
        "--use-distributed-optimizer", "--bf16", "--calculate-per-token-loss", "--freeze", "images/encoders",
        "--lr-factor", "input_projections=10", "--train-embedding-rows", "3",
        "--compile-encoders", "images/encoders", "--device-peak-tflops", "0.001",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            vlm_clip_1b, "VISION", dict(num_layers=1, hidden_size=32, ffn_hidden_size=32, num_attention_heads=2)
        )
        curves = run_recipe(shared_directory() / "vlm", *arguments, steps=1, recipe=vlm_clip_1b)
    if run.rank == run.world_size - 1:
        assert curves["text loss"][1] == pytest.approx(math.log(64), rel=0.1)
        rates = {
            tag.removeprefix("throughput/"): values[1]
            for tag, values in curves.items()
            if tag.startswith("throughput/")
        }
        assert rates["images tokens read/s"] == pytest.approx(vlm_clip_1b.IMAGE_ROWS * rates["images/clip items/s"])
        assert rates["tokens/s"] == pytest.approx(length * rates["samples/s"])
        assert rates["MFU"] == pytest.approx(rates["TFLOP/s"] / 0.002, rel=1e-5)


@case(ranks=2, timeout_s=120)
def pretrain_goes_on_where_the_first_stage_is_frozen(run: Run) -> None:
    where = shared_directory() / "pretrain-frozen-stage"
    shutdown()
    frozen = [
        "--pipeline-model-parallel-size", "2", "--freeze", "language_model", "encoders", "input_projections",
        "generation_input",
    ]  # fmt: skip
    unbroken = run_recipe(where, *frozen, "--save", str(where / "saved"), "--save-interval", "2")
    resumed = run_recipe(where / "resumed", *frozen, "--load", str(where / "saved"), "--ckpt-step", "2")
    if run.rank == run.world_size - 1:
        assert_close(resumed, unbroken, range(3, STEPS + 1))


@case(ranks=2, timeout_s=120)
def pretrain_resumes_no_other_trained_parts_and_a_second_stage_moves_the_rows_it_names_alone(run: Run) -> None:
    where = shared_directory() / "pretrain-stages"
    shutdown()
    run_recipe(where, "--save", str(where / "first"), "--save-interval", "100", steps=2)
    second = ["--load", str(where / "first"), "--freeze", "language_model", "--train-embedding-rows", "5"]

    def built(*given, **named) -> None:
        raise AssertionError("a process group was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", built)
        with pytest.raises(ValueError, match="written with .* frozen, this run freezes .*--finetune.*--no-load-optim"):
            run_recipe(where, *second)
        own = where / f"evil{run.rank}"
        shutil.copytree(where / "first", own)
        evil.in_an_object(own / "iter_0000002", own / "marker")
        evil.seal(own / "iter_0000002")
        with pytest.raises(ValueError, match="is not data alone"):
            run_recipe(where, "--load", str(own))
        assert not (own / "marker").exists()
    for name, steps, go_on in (("finetune", 2, ["--finetune"]), ("no_load_optim", 4, ["--no-load-optim"])):
        saved = ["--save", str(where / name), "--save-interval", "100"]
        run_recipe(where, *second, *go_on, *saved, steps=steps)
        moved = embedding(where / name, steps) != embedding(where / "first", 2)
        rows = moved.any(1).nonzero().flatten().tolist()
        assert rows == [5], (name, rows)


def embedding(saved: Path, step: int) -> Tensor:
    """The table `[V, H]` of a checkpoint."""
    name = "language_model.embedding.word_embeddings.weight"
    tables = {name: torch.empty(64, 32)}
    checkpoint.load(tables, checkpoint_id=saved / f"iter_{step:07d}", no_dist=True)
    return tables[name]


def script_of_ones_own(recipe) -> None:
    """What docs/training.md has, its arguments parsed and Megatron called here."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    with adapt_megatron(recipe.model_config):
        args = parse_and_validate_args(add_mimo_args, args_defaults={"dataloader_type": "external"})
        pretrain(
            pretrain_cfg_container_from_args(args),
            dataset_provider(recipe, args),
            ModelType.encoder_or_decoder,
            forward_step,
            partial(model_provider, recipe.model_config),
        )


@case(ranks=2, timeout_s=120)
def a_script_of_ones_own_trains_like_our_pretrain_and_follows_the_same_arguments(run: Run) -> None:
    where = shared_directory() / "pretrain-script"
    arguments = [
        "--lr-factor", "language_model=0.1", "decoders=10", "--weight-decay-factor", "decoders=0",
        "--freeze", "images/encoders", "--modality-loss-weight", "images=3", "--tensor-model-parallel-size", "2",
    ]  # fmt: skip
    shutdown()
    ours = run_recipe(where / "ours", *arguments)
    theirs = run_recipe(where / "theirs", *arguments, train=script_of_ones_own)
    plain = run_recipe(where / "plain", "--tensor-model-parallel-size", "2", train=script_of_ones_own)
    if run.rank == run.world_size - 1:
        assert_close(theirs, ours, range(1, STEPS + 1))
        assert plain["text loss"][STEPS] != pytest.approx(theirs["text loss"][STEPS], rel=1e-3)
        assert not any(tag.startswith("throughput/") for tag in theirs)


class Terminated:
    """The recipe, whose reader on one rank gets a SIGTERM while it reads a microbatch."""

    model_config = staticmethod(any_to_any_small.model_config)
    datasets = staticmethod(any_to_any_small.datasets)

    def __init__(self, rank: int, microbatch: int) -> None:
        self._rank, self._left = rank, microbatch

    def collate(self, samples):
        self._left -= 1
        if self._left == 0 and dist.get_rank() == self._rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return any_to_any_small.collate(samples)


@case(ranks=2, timeout_s=120)
def sigterm_to_one_rank_of_pretrain_saves_at_the_step_boundary_and_the_run_goes_on_from_there(run: Run) -> None:
    where = shared_directory() / "pretrain-sigterm"
    last = run.rank == run.world_size - 1
    shutdown()
    saved = ["--save", str(where / "saved"), "--save-interval", "100"]
    unbroken = run_recipe(where / "unbroken", *LAYOUTS["dp2"])
    # Two microbatches a step on each rank: the third is in the second step.
    with pytest.raises(SystemExit) as stopped:
        run_recipe(where / "stopped", *LAYOUTS["dp2"], *saved, "--exit-signal-handler", recipe=Terminated(0, 3))
    assert stopped.value.code == 0
    assert (where / "saved" / "latest_checkpointed_iteration.txt").read_text() == "2"
    resumed = run_recipe(where / "resumed", *LAYOUTS["dp2"], "--load", str(where / "saved"), *saved)
    # Its own checkpoint is cut: the one before is taken.
    newest = where / "saved" / f"iter_{STEPS:07d}"
    os.truncate(newest / "__0_0.distcp", 1000)  # by both ranks, which have no group between two runs
    again = run_recipe(where / "again", *LAYOUTS["dp2"], "--load", str(where / "saved"))
    if last:
        assert_close(scalars(where / "stopped" / "tensorboard"), unbroken, range(1, 3))
        assert_close(resumed, unbroken, range(3, STEPS + 1))
        assert_close(again, unbroken, range(3, STEPS + 1))


@case(ranks=2, timeout_s=120)
def pretrain_logs_losses_of_experts_by_name(run: Run) -> None:
    experts = [
        "--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall",
        "--disable-bias-linear", "--moe-aux-loss-coeff", "0.1", "--moe-z-loss-coeff", "0.01",
        "--expert-model-parallel-size", "2",
    ]  # fmt: skip
    shutdown()
    curves = run_recipe(shared_directory() / "pretrain-experts", *experts, steps=2)
    if run.rank == run.world_size - 1:
        for name in ("load_balancing_loss", "z_loss"):
            assert list(curves[name]) == [1, 2] and all(value > 0 for value in curves[name].values()), curves.keys()
        # One is the least that balancing can be: experts used as evenly as they are chosen.
        assert curves["load_balancing_loss"][1] == pytest.approx(1.0, abs=0.3)


class Spoiled:
    """The recipe, of which one rank reads a microbatch of NaN."""

    model_config = staticmethod(any_to_any_small.model_config)
    datasets = staticmethod(any_to_any_small.datasets)

    def __init__(self, rank: int, microbatch: int) -> None:
        self._rank, self._left = rank, microbatch

    def collate(self, samples):
        self._left -= 1
        batch = any_to_any_small.collate(samples)
        if self._left == 0 and dist.get_rank() == self._rank:
            for modality in batch["modality_inputs"].values():
                for encoder in modality.values():
                    for value in encoder.values():
                        value[:] = float("nan")
        return batch


@case(ranks=2, timeout_s=120)
def pretrain_stops_at_a_nan_on_one_rank_and_keeps_the_last_good_checkpoint(run: Run) -> None:
    where = shared_directory() / "pretrain-nan"
    shutdown()
    saved = ["--save", str(where), "--save-interval", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_mimo.exits._exit_now", _raise)  # which would end this process
        # Two microbatches a step on each rank: the third is in the second step.
        with pytest.raises(SystemExit) as stopped:
            run_recipe(where, *saved, recipe=Spoiled(0, 3))
    assert stopped.value.code == 16  # Megatron's, for a job to start again
    assert not (where / "iter_0000002").exists()
    assert (where / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert torch.isfinite(embedding(where, 1)).all()
    # That checkpoint also has the microbatches to try again, which this option leaves aside.
    curves = run_recipe(where / "resumed", "--load", str(where), "--rerun-mode", "disabled")
    if run.rank == run.world_size - 1:
        assert list(curves["loss"]) == [2, 3, 4] and all(math.isfinite(each) for each in curves["loss"].values())
    own = where / f"alone{run.rank}"
    with alone(), pytest.raises(RuntimeError, match="Rank 0, .* Unexpected result nan"):
        run_recipe(own, "--save", str(own), "--save-interval", "1", "--rerun-mode", "disabled", recipe=Spoiled(0, 5))
    assert (own / "latest_checkpointed_iteration.txt").read_text() == "1"


def _raise(error: BaseException) -> None:
    raise error
