"""`inspect` counts the layers that will train: those of the backend that is asked for, or of the recipe."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from megatron_mimo.cli import counting
from megatron_mimo.cli.counting import Step, footprints
from megatron_mimo.cli.inspecting import sizes_of, told
from megatron_mimo.cli.model_recipe import Model
from megatron_mimo.cli.models import Place, find
from megatron_mimo.training.footprint import Footprint
from tests.checkpoints import language_config, written
from tests.commands import command, parts

HEADS, GROUPS, WIDE, INNER, LAYERS, LENGTH = 8, 4, 32, 96, 2, 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A language model whose attention outweighs the rest, with a tokenizer."""
    sizes = dict(
        hidden_size=HEADS * WIDE, num_attention_heads=HEADS, num_key_value_heads=GROUPS, intermediate_size=INNER
    )
    directory = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts()[0])
    tokenizer.save_pretrained(directory)
    config = language_config("qwen2", num_hidden_layers=LAYERS, vocab_size=len(tokenizer), **sizes)
    return written(transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16), directory)


def counted(place: Place, backend: str, **options: object) -> Footprint:
    (found,) = footprints(place, Step(length=LENGTH, backend=backend, **options))
    return found


def test_layers_of_transformer_engine_hold_less_than_those_of_plain_torch_but_in_float32(
    model: Path, no_run, monkeypatch
) -> None:
    with monkeypatch.context() as patch:  # without the kernels that are not attention's
        patch.setattr(counting, "_with_its_kernels", lambda config: None)
        engine = counted(find(str(model)), "transformer_engine")
        full = counted(find(str(model)), "transformer_engine", dtype="float32")
    plain = counted(find(str(model)), "torch")
    assert (engine.weights, engine.gradients) == (plain.weights, plain.gradients)
    # Of query, key and value it has copies; plain torch's value is a view, which keeps what all three are cut from.
    kept = LENGTH * WIDE * 2 * LAYERS
    assert plain.activations - engine.activations == pytest.approx(kept * (HEADS + GROUPS), rel=0.1)
    # In float32 the language model's attention is the same one on both.
    assert full.activations == counted(find(str(model)), "torch", dtype="float32").activations
    # Its gated SiLU is one kernel, which keeps its input; else what is activated and what it is multiplied by besides.
    for dtype, unfused, size in (("bfloat16", engine, 2), ("float32", full, 4)):
        fused = counted(find(str(model)), "transformer_engine", dtype=dtype)
        assert unfused.activations - fused.activations == pytest.approx(2 * LENGTH * INNER * size * LAYERS, rel=0.1)


def test_adam_is_torchs_own_where_neither_library_is_there(model: Path, no_run, monkeypatch) -> None:
    monkeypatch.setattr("megatron_mimo.cli.counting.USING_PYTORCH_OPTIMIZER", True)
    alone = counted(find(str(model)), "torch").stepping
    monkeypatch.setattr("megatron_mimo.cli.counting.USING_PYTORCH_OPTIMIZER", False)
    assert counted(find(str(model)), "torch").stepping == counted(find(str(model)), "transformer_engine").stepping
    assert alone == 2 * counted(find(str(model)), "torch").stepping  # the root of the second moments besides


def test_auto_is_what_will_train_where_a_gpu_is_here_and_transformer_engine_elsewhere(
    model: Path, no_run, monkeypatch
) -> None:
    place = find(str(model))
    engine, plain = (counted(place, backend) for backend in ("transformer_engine", "torch"))
    assert counted(place, "auto") == engine != plain
    assert Step().counted_backend == "transformer_engine" and Step(backend="torch").counted_backend == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for here, chosen in ((True, "transformer_engine"), (False, "torch")):
        monkeypatch.setattr("megatron_mimo.specs.HAVE_TE", here)
        monkeypatch.setattr("megatron_mimo.specs.HAVE_FUSED_LAYER_NORM", False)
        assert Step().counted_backend == chosen
        assert counted(place, "auto").activations == {"transformer_engine": engine, "torch": plain}[chosen].activations


def test_the_recipes_backend_is_counted_unless_another_is_asked_for(model: Path) -> None:
    place = find(str(model))
    assert place.backend == "auto"
    recipe = Model(source=str(model), backend="torch")
    assert Place(place.directory, recipe, False).backend == "torch"


def lines(model: Path, *words: object) -> list[str]:
    done = command("inspect", model, "--length", LENGTH, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.process
def test_the_command_says_whose_layers_it_counted(model: Path, tmp_path: Path, no_run) -> None:
    default, plain = lines(model), lines(model, "--backend", "torch")
    assert any(line.endswith("recomputation none, layers of TransformerEngine:") for line in default)
    assert any(line.endswith("recomputation none, layers of plain torch:") for line in plain)
    assert default == lines(model, "--backend", "auto")
    place = find(str(model))
    for found, backend in ((default, "transformer_engine"), (plain, "torch")):
        assert found == list(told(sizes_of(place), place, Step(length=LENGTH, backend=backend)))
    refused = command("inspect", model, "--backend", "cudnn")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert re.search("--backend: expected one of .*'transformer_engine'.*, found 'cudnn'", refused.stderr)

    # A run keeps its recipe, and with it the backend.
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{directory: {tmp_path / 'run'}, data: {tmp_path / 'data.jsonl'}, "
        f"model: {{source: {model}, backend: torch}}, "
        "packing: {length: 64}, loggers: {progress: false}, "
        "stages: [{name: whole, steps: 1, trains: {language_model: 1.0e-3}}]}"
    )
    (tmp_path / "data.jsonl").write_text('{"text": "It is red."}\n' * 8)
    done = command("train", recipe)
    assert done.returncode == 0, done.stderr
    assert any(line.endswith("layers of plain torch:") for line in lines(tmp_path / "run"))
    assert any(line.endswith("layers of TransformerEngine:") for line in lines(tmp_path / "run", "--backend", "auto"))
