"""A recipe is typed: what is wrong with one is told in one line that names the key and says what to do."""

import re
import sys
from pathlib import Path

import pytest
import torch

from megatron_mimo.cli import entry, errors
from megatron_mimo.cli.errors import Refused, line_of
from megatron_mimo.cli.graphs import step_graphs, with_graphs
from megatron_mimo.cli.kept import check_kept, settled
from megatron_mimo.cli.ranks import check_processes
from megatron_mimo.cli.reading import checked, read_recipe, shipped, written
from megatron_mimo.cli.recipe import Graphs, Layout
from megatron_mimo.cli.settings import settings_of
from megatron_mimo.training import StepGraphs

PLAIN = {
    "directory": "run",
    "model": {"language_model": "owner/model"},
    "data": "folder",
    "stages": [{"name": "whole", "steps": 3, "trains": {"language_model": 1e-3}}],
}


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_one_whose_resolved_form_says_the_same(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name, ["data=folder"])
    file = tmp_path / "resolved.yaml"
    file.write_text(written(recipe))
    assert read_recipe(str(file)) == recipe


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("modle.source=x", "unknown key 'modle'; did you mean 'model'"),
        ("stages.0.stpes=3", "stages.0: unknown key 'stpes'; did you mean 'steps'"),
        ("stages.0.steps=many", "stages.0.steps: expected a valid integer.* found 'many'"),
        ("stages.0.steps=0", "stages.0.steps: expected greater than 0, found 0"),
        ("stages.final.steps=3", "unknown entry 'final'; expected one of .'projector', 'whole'"),
        ("stages.whol.steps=3", "unknown entry 'whol'; did you mean 'whole'"),
        ("stages.0.trains={}", "stages.0.trains: .*at least 1 item"),
        ("stages.0.name=whole", "expected names that differ"),
        ("model.dtype=float", "model.dtype: expected 'float32', 'bfloat16' or 'float16', found 'float'"),
        ("model.source=owner/other", "model: expected source .* or language_model"),
        ("model.modalities.images={token: a}", "model.modalities.images: expected reads, writes or both"),
        ("model.modalities.images.reads={name: a, frozen: true}", "as_it_is: true"),
        (
            "model.modalities.images.writes={kind: code, size: [8, 8]}",
            "images.writes.kind: .*'code'; did you mean 'codes'",
        ),
        ("model.modalities.images.writes={size: [8, 8]}", "images.writes.kind: expected one of .*'codes'., found none"),
        (
            "model.modalities.images.writes={kind: flow, size: [8, 8]}",
            "images.writes.patch: expected a value, found none",
        ),
        (
            "model.modalities.images.writes={kind: flow, size: [8, 8], patch: 3}",
            "images.writes: patch 3 does not divide",
        ),
        (
            "model.modalities.images.writes={kind: codes, codec: a}",
            "images.writes: expected size .of images. or seconds",
        ),
        ("model.modalities.images.writes={kind: codes, codec: a, seconds: 1}", "writes: expected a decoder of image"),
        ("model.modalities.speech={writes: {kind: flow, size: [8, 8], patch: 4}}", "kind: codes with seconds"),
        ("model.modalities.images.writes={kind: codes, codec: a, size: [8, 8], codebooks: 2}", "writes: codebooks:"),
        ("data=[{path: a, weight: 1}, b]", "a weight for each source of data or for none"),
        ("data=[]", "stages.projector: expected data"),
        ("graphs={bucket: {images: 4}}", "graphs: unknown key 'bucket'; did you mean 'buckets'"),
        ("graphs=full_iteration", "graphs: expected .*, found 'full_iteration'"),
        ("graphs={warmup: 0}", "graphs.warmup: expected greater than 0, found 0"),
        ("layout={context: 2}", "evaluation.samples: answers need a layout without context"),
        ("stages", "'stages': expected key=value"),
        ("data=[", "data: expected YAML"),
    ],
)
def test_each_fault_of_a_recipe_is_one_line_that_names_the_key(change: str, told: str) -> None:
    with pytest.raises(Refused, match=told) as found:
        read_recipe("caption", ["data=folder", "evaluation.data=folder", change])
    assert "\n" not in str(found.value)


def test_a_file_that_is_none_or_says_a_key_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for text, told in (("- 1", "expected keys"), ("seed: 1\nseed: 2", "'seed'. twice"), ("a: [", "expected YAML")):
        file.write_text(text)
        with pytest.raises(Refused, match=told):
            read_recipe(str(file))
    with pytest.raises(Refused, match="a recipe's file or one of .*'caption'"):
        read_recipe(str(tmp_path / "nothing.yaml"))


def test_changes_reach_entries_by_number_and_by_name_and_are_read_as_yaml() -> None:
    changes = ["data=[a, {path: b, columns: write}]", "stages.whole.steps=7", "stages.0.trains={decoders: 1e-3}"]
    recipe = read_recipe("caption", [*changes, "megatron.recompute_granularity=full"])
    assert [str(one.path) for one in recipe.data] == ["a", "b"] and recipe.data[1].columns == "write"
    assert recipe.stages[1].steps == 7 and recipe.stages[0].trains == {"decoders": 1e-3}
    assert recipe.megatron == {"recompute_granularity": "full"}


def test_graphs_are_switched_by_a_word_or_told_in_full() -> None:
    found = [read_recipe("caption", ["data=folder", f"graphs={given}"]).graphs for given in ("false", "null", "true")]
    assert found == [None, None, Graphs()]
    told = read_recipe("caption", ["data=folder", "graphs.buckets.images=4", "graphs.label_rows=64"]).graphs
    assert step_graphs(told) == StepGraphs(buckets={"images": 4}, label_rows=64)
    assert step_graphs(Graphs()) == StepGraphs()  # the same defaults


def test_graphs_bring_megatrons_settings_that_they_need_and_leave_those_that_are_given() -> None:
    given = settings_of({"batch_p2p_sync": True, "cross_entropy_fusion_impl": "te"})
    assert with_graphs(given, None) is given
    plain = {"batch_p2p_sync": False, "cuda_graph_impl": "full_iteration"}
    assert with_graphs(settings_of({}), Graphs()).transformer == plain
    assert with_graphs(given, Graphs()).transformer == plain | given.transformer


def test_settings_of_megatron_go_where_they_belong_and_unknown_ones_are_told_the_nearest() -> None:
    settings = settings_of({"recompute_granularity": "full", "adam_beta2": 0.95, "use_distributed_optimizer": True})
    assert settings.transformer == {"recompute_granularity": "full"}
    assert settings.optimizer == {"adam_beta2": 0.95, "use_distributed_optimizer": True}
    assert settings.ddp == {"use_distributed_optimizer": True}
    for given, told in (
        ({"recompute_granularty": "full"}, "did you mean 'recompute_granularity'"),
        ({"cuda_graph_impl": "full_iteration"}, "megatron.cuda_graph_impl: set it with graphs of the recipe"),
        ({"adam_beta2": "much"}, "megatron.adam_beta2: expected a valid number.* found 'much'"),
        ({"lr": 1e-3}, "stages.NAME.trains"),
        ({"tensor_model_parallel_size": 2}, "layout.tensor"),
    ):
        with pytest.raises(Refused, match=told):
            settings_of(given)


def test_a_directory_goes_on_with_its_own_recipe_alone(tmp_path: Path) -> None:
    given = PLAIN | {"directory": str(tmp_path)}
    recipe = checked(given, "recipe")
    check_kept(recipe)  # nothing is there yet
    (tmp_path / "recipe.yaml").write_text(written(recipe))
    check_kept(recipe)
    check_kept(checked(given | {"seed": 7}, "recipe"))  # there is no checkpoint to go on from
    (tmp_path / "stages/one/step_00000002").mkdir(parents=True)
    check_kept(checked(given | {"layout": {"tensor": 2}, "processor": {"workers": 4}, "graphs": True}, "recipe"))
    with pytest.raises(Refused, match="seed: 1234 then, 7 now"):
        check_kept(checked(given | {"seed": 7}, "recipe"))


def test_paths_that_a_run_keeps_hold_from_elsewhere_and_are_the_same_from_there(tmp_path: Path, monkeypatch) -> None:
    for name in ("pictures", "qwen", "ears", "deep", "whole"):
        (tmp_path / name).mkdir()
    reads = {"audio": {"reads": {"name": "ears", "as_it_is": True}}, "images": {"reads": "owner/model"}}
    stage = PLAIN["stages"][0] | {"name": "whole", "data": "pictures"}
    given = PLAIN | {"model": {"language_model": "qwen", "modalities": reads}, "data": "pictures", "stages": [stage]}
    monkeypatch.chdir(tmp_path)
    kept = settled(checked(given | {"directory": "run"}, "recipe"))
    assert kept.model.language_model == str(tmp_path / "qwen")
    assert kept.model.modalities["audio"].reads.name == str(tmp_path / "ears")
    assert kept.model.modalities["images"].reads.name == "owner/model"
    assert kept.data[0].path == kept.stages[0].data[0].path == tmp_path / "pictures"
    assert kept.stages[0].name == "whole" and settled(kept) == kept
    (tmp_path / "run/stages/whole/step_00000002").mkdir(parents=True)
    (tmp_path / "run/recipe.yaml").write_text(written(kept))
    monkeypatch.chdir(tmp_path / "deep")
    reads["audio"]["reads"]["name"] = "../ears"
    stage["data"] = "../pictures"
    again = {"directory": "../run", "data": "../pictures", "model": {"language_model": "../qwen", "modalities": reads}}
    check_kept(settled(checked(given | again, "recipe")))


def test_a_layout_for_other_processes_and_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    check_processes(Layout(tensor=2), 4)
    with pytest.raises(Refused, match="multiple of 4 processes, found 2; give --nproc 4"):
        check_processes(Layout(tensor=2, pipeline=2), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_processes(Layout(), 1)
    with pytest.raises(Refused, match="--nproc 4: expected at most one process a GPU, found 1 GPUs here"):
        check_processes(Layout(tensor=4), 4)


@pytest.mark.parametrize("missing", ["typer", "pydantic", "yaml"])
def test_without_the_extra_the_command_says_in_one_line_what_to_install(missing: str, monkeypatch, capsys) -> None:
    for name in [name for name in sys.modules if name.startswith("megatron_mimo.cli") and not name.endswith("entry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"megatron-mimo: {missing} is missing: pip install 'megatron-mimo[cli,hf,data]'\n"


@pytest.mark.parametrize("missing", ["transformers", "transformers.models", "PIL"])
def test_without_the_other_extras_it_says_the_same(missing: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended, errors.told(False):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"megatron-mimo: {missing} is missing: pip install 'megatron-mimo[cli,hf,data]'")
    assert "fault" in line_of(ModuleNotFoundError("our fault", name="megatron_mimo.absent"))


def test_help_names_every_command_and_a_misspelt_one_ends_with_2(monkeypatch, capsys) -> None:
    for words, status, told in (
        (["--version"], 0, r"^megatron-mimo \d+\.\d+"),
        (["--help"], 0, "train.*generate.*evaluate.*convert.*data"),
        (["train", "--help"], 0, "recipe.*changes.*--nproc.*--print.*--debug"),
        (["data", "--help"], 0, "show.*prepare"),
        (["trian"], 2, "No such command 'trian'. Did you mean 'train'"),
        (["train", "caption", "--nprocs", "2"], 2, "No such option: --nprocs"),
        (["train", "caption", "--print"], 2, "stages.projector: expected data"),
        (["train", "caption", "data=folder", "--print"], 0, "directory: runs/caption.*language_model: Qwen"),
    ):
        monkeypatch.setattr(sys, "argv", ["megatron-mimo", *words])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back after the test
        with pytest.raises(SystemExit) as ended:
            entry.main()
        found = capsys.readouterr()
        assert (ended.value.code or 0) == status, found
        assert re.search(told, found.out + found.err, re.DOTALL), found
