"""What the command line of pretraining says reaches the model, is refused, or is explained."""

import inspect
import os
import re
from argparse import ArgumentParser, Namespace
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_mimo import training
from megatron_mimo.axes import Layout
from megatron_mimo.compat.megatron import writers_report_here
from megatron_mimo.compat.megatron_training import with_printable_help
from megatron_mimo.training import TrainingControl, language_spec_from_args
from megatron_mimo.training.pretraining import step_graphs
from megatron_mimo.training.pretraining.arguments import add_mimo_args, control_from_args, with_loss_weights
from megatron_mimo.training.pretraining.checks import (
    DATA_ARGUMENTS,
    check_data_arguments,
    check_in_effect,
    check_resumed,
    check_supported,
)
from megatron_mimo.training.pretraining.session import end_session, session_of
from megatron_mimo.training.pretraining.step_graphs import LoopSteps, ready_for_step_graphs
from tests import tiny, warm
from tests.recorded_graphs import record_graphs

ROOT = Path(__file__).parents[2]


def test_loss_weights_of_the_command_line_win_over_the_recipes():
    config = tiny.mimo_config(modality_loss_weights={"images": 0.5, "text": 2.0})
    weighted = with_loss_weights(config, Namespace(modality_loss_weight=[("images", 3.0)]))
    assert weighted.modality_loss_weights == {"images": 3.0, "text": 2.0}
    assert config.modality_loss_weights == {"images": 0.5, "text": 2.0}


def test_a_loss_weight_of_an_unknown_modality_is_refused():
    with pytest.raises(ValueError, match="--modality-loss-weight: the model has no modality 'imagse', expected one of"):
        with_loss_weights(tiny.mimo_config(), Namespace(modality_loss_weight=[("imagse", 3.0)]))


def arguments(**given) -> Namespace:
    """What `check_supported` looks at."""
    return Namespace(**{**dict(mtp_num_layers=None, graph_encoders=[], encoder_recompute_granularity=None), **given})


@pytest.mark.parametrize("option", ["--compile-encoders", "--graph-encoders"])
def test_encoders_that_a_script_compiles_or_graphs_can_be_taken_back_at_the_end_of_its_command_line(option):
    parser = add_mimo_args(ArgumentParser())
    args = parser.parse_args([option, "images/encoders", "--freeze", "encoders", option])
    control = control_from_args(args)
    assert (control.compiled, control.graphed) == ([], [])
    args = parser.parse_args([option, "images/encoders", option, "audio/encoders", "sounds/encoders"])
    assert sorted([*args.compile_encoders, *args.graph_encoders]) == ["audio/encoders", "sounds/encoders"]


def test_the_language_model_is_compiled_beside_encoders_where_a_script_says_so():
    parser = add_mimo_args(ArgumentParser())
    control = control_from_args(parser.parse_args(["--compile-language-model", "--compile-encoders", "encoders"]))
    assert control.compiled == ["encoders", "language_model"]
    assert control_from_args(parser.parse_args([])).compiled == []


def test_two_learning_rates_of_the_embedding_are_refused_and_those_of_other_parts_are_not():
    parser = add_mimo_args(ArgumentParser())
    parser.add_argument("--decoupled-lr", type=float)
    both = ["--decoupled-lr", "1e-4", "--lr-factor", "language_model=0.5", "decoders=2"]
    with pytest.raises(ValueError, match="--decoupled-lr 0.0001 and --lr-factor language_model=0.5 both set"):
        control_from_args(parser.parse_args(both))
    apart = control_from_args(parser.parse_args(["--decoupled-lr", "1e-4", "--lr-factor", "decoders=2"]))
    assert apart.learning_rate == {"decoders": 2.0}


@pytest.mark.parametrize("name", DATA_ARGUMENTS)
def test_arguments_of_megatrons_datasets_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: the data is the recipe's"):
        check_data_arguments(Namespace(**{name: ["corpus"]}))
    check_data_arguments(Namespace(data_path=None))


def test_what_is_evaluated_is_named_by_megatrons_own_arguments_with_data_of_files_alone():
    named = dict(valid_data_path=["valid.jsonl"], test_data_path=["test.jsonl"])
    check_data_arguments(Namespace(data=["train.jsonl"], **named))
    with pytest.raises(ValueError, match="--train-data-path: the data is the recipe's, or --data"):
        check_data_arguments(Namespace(data=["train.jsonl"], train_data_path=["other"]))
    with pytest.raises(ValueError, match="--valid-data-path: the data is the recipe's"):
        check_data_arguments(Namespace(data=None, **named))


def test_multi_token_prediction_is_refused_and_nothing_else():
    check_supported(arguments())
    with pytest.raises(ValueError, match="--mtp-num-layers 2: multi-token prediction.*train with .*Trainer"):
        check_supported(arguments(mtp_num_layers=2))


def test_rates_scaled_by_the_language_models_width_are_refused():
    check_supported(arguments(use_mup=False))
    with pytest.raises(ValueError, match="--use-mup: Megatron would scale the learning rate of every matrix"):
        check_supported(arguments(use_mup=True))


def test_graphs_of_recomputed_encoders_are_refused():
    check_supported(arguments(graph_encoders=["encoders"]))
    check_supported(arguments(encoder_recompute_granularity="full"))
    with pytest.raises(ValueError, match="--graph-encoders with --encoder-recompute-granularity full"):
        check_supported(arguments(graph_encoders=["encoders"], encoder_recompute_granularity="full"))


def write_checkpoint(directory: Path, args: Namespace | None) -> None:
    """As Megatron does after 3 steps, with these arguments and one weight."""
    path = directory / "iter_0000003"
    path.mkdir(parents=True)
    state = {"iteration": 3, "weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(2))}
    with writers_report_here():  # Megatron's process for reports may be gone by now
        dist_checkpointing.save(state | ({} if args is None else {"args": args}), str(path))
    (directory / "latest_checkpointed_iteration.txt").write_text("3")


def loading(directory: Path | None, **changes) -> Namespace:
    """Megatron's arguments that say what is loaded."""
    said = dict(
        load=directory and str(directory), finetune=False, no_load_optim=None, pretrained_checkpoint=None,
        ckpt_step=None, non_persistent_ckpt_type=None, non_persistent_global_ckpt_dir=None,
        exit_on_missing_checkpoint=False, save=directory and str(directory),
    )  # fmt: skip
    return Namespace(**said | changes)


def written_with(freeze: list[str], rows: list[int], **more) -> Namespace:
    return Namespace(freeze=freeze, train_embedding_rows=rows, **more)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (([], []), (["language_model"], [3]), "written with [] frozen, this run freezes ['language_model.']"),
        ((["encoders"], []), (["images"], []), "encoders.'] frozen, this run freezes ['modality_submodules.images.']"),
        (([], []), ([], [3]), "momentum of embedding rows outside embedding_rows"),
        (([], [3, 5]), ([], [3]), "momentum of embedding rows outside embedding_rows"),
        ((["video"], []), ([], []), "written with --freeze video. parts: the model has no part 'video'"),
    ],
)
def test_a_checkpoint_of_other_trained_parts_is_not_resumed_but_begins_a_second_stage(
    before, now, message, single_process, tmp_path
):
    write_checkpoint(tmp_path, written_with(*before))
    control, config = TrainingControl(*now), tiny.mimo_config()
    for args in (
        loading(tmp_path),
        loading(tmp_path, ckpt_step=3),
        loading(tmp_path, non_persistent_ckpt_type="local"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            check_resumed(args, control, config)
        assert "iter_0000003" in str(refused.value)
        assert "--finetune" in str(refused.value) and "--no-load-optim" in str(refused.value)
    check_resumed(loading(tmp_path, finetune=True), control, config)
    check_resumed(loading(tmp_path, no_load_optim=True), control, config)
    check_resumed(loading(tmp_path / "new", pretrained_checkpoint=str(tmp_path)), control, config)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (written_with(["images/encoders", "audio/encoders"], [5, 3]), (["encoders"], [3, 5, 3])),
        (written_with(["images/encoders/patches", "audio"], []), (["audio", "images/encoders"], [])),
        (written_with([], [3]), ([], [3, 5])),
        (written_with(["language_model"], [], no_save_optim=True), ([], [])),
        (Namespace(num_layers=2), (["encoders"], [3])),
        (None, (["encoders"], [3])),
    ],
    ids=["rows", "parts", "more rows", "no optimizer state", "Megatron's own", "no arguments"],
)
def test_a_checkpoint_of_the_same_trained_parts_or_of_none_is_resumed(before, now, single_process, tmp_path):
    write_checkpoint(tmp_path, before)
    check_resumed(loading(tmp_path), TrainingControl(*now), tiny.mimo_config())


def test_without_a_checkpoint_any_part_may_train(tmp_path):
    for args in (loading(None), loading(tmp_path), loading(tmp_path / "new")):
        check_resumed(args, TrainingControl(frozen=["encoders"]), tiny.mimo_config())


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
def test_scaled_rotary_embeddings_reach_the_language_model(monkeypatch):
    monkeypatch.setattr(
        "megatron.training.argument_utils.core_transformer_config_from_args", lambda args: tiny.language_config()
    )
    args = Mock(use_rope_scaling=True, rope_scaling_factor=4.0, rotary_seq_len_interpolation_factor=2)
    params = language_spec_from_args(args).params
    assert (params["rope_scaling"], params["rope_scaling_factor"]) == (True, 4.0)
    assert params["seq_len_interpolation_factor"] == 2


def test_a_percent_sign_in_a_help_text_is_printed():
    parser = ArgumentParser()
    parser.add_argument("--one", default=3, help="by 10%).")
    parser.add_argument("--two", default=3, help="100%%, by default %(default)s")
    shown = with_printable_help(parser).format_help()
    assert "by 10%)." in shown and "100%, by default 3" in shown


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "any_to_any_small, vlm_clip_1b, or a module importable"),
        (["--recipe", "any_to_any_small", "--help"], 0, "--modality-loss-weight"),
        (["--recipe", "nope"], 2, "--recipe: there is no module 'nope' to import from"),
        (["--recipe", "nope"], 2, "Give one of ['any_to_any_small', 'vlm_clip_1b'], or the dotted name"),
        (["--recipe", "examples.nope"], 2, "there is no module 'examples.nope'"),
        (["--recipe", "./my_recipe.py"], 2, "'./my_recipe.py' is no module's name. Give my.recipe for my/recipe.py"),
        (["--recipe", "mine.whole", "--help"], 0, "--modality-loss-weight"),
        (["--recipe", "mine.part"], 1, "the recipe 'mine.part' lacks ['model_config', 'collate'], expected functions"),
        (["--recipe", "mine.broken"], 1, "No module named 'nope'"),
    ],
    ids=[
        "help",
        "help of a recipe",
        "unknown",
        "what to give",
        "unknown in a package",
        "path",
        "own",
        "part",
        "broken",
    ],
)
def test_the_example_explains_itself(arguments, code, said, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, text in {
        "whole": "from examples.recipes.any_to_any_small import *",
        "part": "def datasets(args, samples): ...",
        "broken": "import nope",
    }.items():
        (tmp_path / "mine" / f"{name}.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = warm.python("-m", "examples.pretrain_mimo", *arguments, cwd=tmp_path, env=environment)
    assert found.returncode == code and said in found.stdout + found.stderr


def args_of(*given: str) -> Namespace:
    return add_mimo_args(ArgumentParser()).parse_args(given)


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (Namespace(), r"Megatron's parser lacks the arguments.*parse_and_validate_args\(add_mimo_args\)"),
        (args_of("--lr-factor", "decoders=2"), "--lr-factor: Megatron makes .* without them.*adapt_megatron"),
        (
            args_of("--weight-decay-factor", "decoders=2", "--train-embedding-rows", "3"),
            "--weight-decay-factor, --train-embedding-rows: Megatron makes",
        ),
        (
            Namespace(**vars(args_of()), cuda_graph_impl="full_iteration"),
            "--cuda-graph-impl full_iteration: Megatron's own capture knows one shape.*adapt_megatron",
        ),
        (args_of("--device-peak-tflops", "1"), "--device-peak-tflops: only megatron_mimo.training.pretrain logs"),
    ],
    ids=["no arguments", "a factor", "two", "full iterations", "peak"],
)
def test_arguments_that_nothing_would_follow_in_a_script_of_ones_own_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        check_in_effect(args)
    check_in_effect(args_of("--freeze", "encoders"))
    check_in_effect(args_of("--device-peak-tflops", "1"), logs_throughput=True)


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
def test_packs_of_a_loop_whose_checkpoints_would_not_know_them_are_refused():
    args = args_of("--data", "train.jsonl", "--processor", "words", "--pack")
    args.dataloader_type = "external"
    with pytest.raises(ValueError, match="--data: Megatron's checkpoints would not know how far .*adapt_megatron"):
        training.dataset_provider(Mock(), args)


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("add_mimo_args", "pretraining.arguments"),
        ("forward_step", "pretraining.provider"),
        ("loss_func", "scale"),
        ("model_provider", "pretraining.provider"),
        ("pretrain", "pretraining.loop"),
    ],
)
def test_training_has_what_a_pretrain_script_passes_to_megatron(name, home):
    import_module("megatron_mimo.training.forward")  # takes no name from the package
    assert getattr(training, name) is getattr(import_module(f"megatron_mimo.training.{home}"), name)


def test_megatron_calls_the_model_provider_as_its_own():
    given = list(inspect.signature(partial(training.model_provider, None)).parameters)
    assert given == ["pre_process", "post_process", "vp_stage", "config", "pg_collection"]
    assert list(inspect.signature(training.forward_step).parameters) == ["data_iterator", "model"]


def test_stages_send_without_a_wait_where_steps_are_captured(monkeypatch):
    record_graphs(monkeypatch)
    given = dict(cuda_graph_warmup_steps=1, overlap_param_gather=False, check_for_nan_in_loss_and_grad=False)
    for impl, waits in (("none", True), ("full_iteration", False)):
        config = tiny.mimo_config()
        args = Namespace(**vars(args_of()), **given, check_for_large_grads=False, cuda_graph_impl=impl)
        ready_for_step_graphs(args, config, Layout(2, pipeline_model_parallel_size=2), TrainingControl())
        assert config.language_config.batch_p2p_sync is waits


def test_random_numbers_that_no_graph_can_use_are_refused_before_a_step(monkeypatch):
    """Of a process that trained before; Megatron keeps the first run's."""
    given = dict(cuda_graph_warmup_steps=1, cuda_graph_impl="full_iteration", seed=1, distributed_timeout_minutes=1)
    run = Mock(device=torch.device("cuda"), graph_safe_rng=False)
    monkeypatch.setattr(step_graphs, "run_over_megatrons_groups", lambda *asked: run)
    steps = LoopSteps(Mock(), Namespace(**vars(args_of()), **given), Layout(1), Mock())
    with pytest.raises(ValueError, match="full_iteration: the process had random numbers before"):
        steps(data_iterator=iter([{}]), model=Mock(), num_microbatches=1, forward_only=False)


def test_what_the_arguments_ask_for_is_worked_out_and_checked_once_a_run(single_process):
    sizes = dict.fromkeys(["tensor", "pipeline", "context", "expert"], 1)
    args = args_of("--modality-loss-weight", "images=3")
    for name, value in {
        **{f"{axis}_model_parallel_size".replace("context_model", "context"): size for axis, size in sizes.items()},
        **dict(virtual_pipeline_model_parallel_size=None, expert_tensor_parallel_size=None, world_size=1),
        **dict(mtp_num_layers=None, seq_length=16, load=None, pretrained_checkpoint=None, finetune=False),
        **dict(cuda_graph_impl="none"),
    }.items():
        setattr(args, name, value)
    asked = []

    def model_config(args):
        asked.append(args)
        return tiny.mimo_config()

    session = session_of(args)
    first = session.ask(model_config)
    assert session_of(args) is session and session.ask(model_config) is first and asked == [args]
    assert first.model.modality_loss_weights["images"] == 3
    assert session_of(Namespace()) is not session  # another run's
    end_session()


def test_a_configuration_of_megatrons_own_is_refused():
    with pytest.raises(ValueError, match="model_provider got a TransformerConfig, expected None"):
        training.model_provider(lambda args: tiny.mimo_config(), config=tiny.language_config())
