"""Every argument of GPTModel works here or is refused, and the page says which."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_mimo import MimoModel, MimoModelConfig
from tests import tiny

ROOT = Path(__file__).parents[2]
PAGE = ROOT.joinpath("docs/gptmodel.md").read_text()
IDS = torch.arange(1, 9)[None]


def rows(heading: str) -> dict[str, tuple[str, str]]:
    """Argument -> what happens to it, and the test that shows it."""
    part = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (.+) \| `([\w.]+::\w+)` \|$", part, flags=re.MULTILINE)
    return {name: (what, test) for name, what, test in found}


@pytest.mark.parametrize(("heading", "function"), [("`forward`", GPTModel.forward), ("Constructor", GPTModel.__init__)])
def test_every_argument_has_its_row_and_its_test(heading, function):
    assert [*rows(heading)] == [name for name in inspect.signature(function).parameters if name != "self"]
    for name, (what, test) in rows(heading).items():
        assert re.match("works|refused|given|not taken", what), name
        file, function_name = test.split("::")
        tree = ast.parse((ROOT / "tests/unit" / file).read_text())
        assert function_name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_what_is_not_taken_is_refused_by_name(single_process):
    model = MimoModel(MimoModelConfig(tiny.language_spec()))
    refused = [name for name, (what, _) in rows("`forward`").items() if what.startswith("not taken")]
    assert refused
    for name in refused:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            model(IDS, **{name: None})


CONSTRUCTORS = {
    "fp16_lm_cross_entropy": {"fp16_lm_cross_entropy": True},
    "parallel_output": {"parallel_output": False},
    "share_embeddings_and_output_weights": {"share_embeddings_and_output_weights": True},
    "position_embedding_type": {"position_embedding_type": "learned_absolute"},
    "rotary_percent": {"rotary_percent": 0.5},
    "rotary_base": {"rotary_base": 500},
    "rope_scaling": {"rope_scaling": True},
    "rope_scaling_factor": {"rope_scaling": True, "rope_scaling_factor": 32.0},
    "scatter_embedding_sequence_parallel": {"scatter_embedding_sequence_parallel": False},
    "seq_len_interpolation_factor": {"seq_len_interpolation_factor": 2.0},
    "pg_collection": {},
}


@pytest.mark.parametrize("argument", CONSTRUCTORS)
def test_what_only_the_language_model_reads_gives_gptmodels_loss(single_process, argument):
    spec = tiny.language_spec(**CONSTRUCTORS[argument])
    layers = spec.params["transformer_layer_spec"](spec.params["config"])
    theirs = GPTModel(**{**spec.params, "transformer_layer_spec": layers})
    groups = single_process.groups if argument == "pg_collection" else None
    ours = MimoModel(MimoModelConfig(spec), pg_collection=groups)
    ours.language_model.load_state_dict(theirs.state_dict())
    expected = theirs(IDS, torch.arange(8)[None], None, labels=IDS)
    assert torch.equal(ours(IDS, labels=IDS)[0], expected)
