"""The messages of docs/troubleshooting.md are those of the code: each stands there, and what is cheap is provoked."""

import ast
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mimo import MimoModel, MimoModelConfig, launch
from megatron_mimo.cli.ranks import check_processes
from megatron_mimo.cli.reading import read_recipe
from megatron_mimo.data import Medium, conversation_of, open_source
from megatron_mimo.data.media import read_bytes
from megatron_mimo.hf.source import resolve
from megatron_mimo.layout import check_layout
from tests import tiny

ROOT = Path(__file__).parents[2]
PAGE = ROOT.joinpath("docs/troubleshooting.md").read_text()
QUOTES = re.findall(r"^\| `(.*?)` \|", PAGE, flags=re.MULTILINE)


def normal(text: str) -> str:
    """Blanks as one, and `... ...` as one `...`."""
    text = " ".join(text.split())
    while "... ..." in text:
        text = text.replace("... ...", "...")
    return text.removesuffix("...").strip()


def written(node: ast.JoinedStr | ast.Constant) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)


@cache
def messages() -> str:
    """Every text that the package writes, `...` for what is put in."""
    found = []
    for path in sorted((ROOT / "megatron_mimo").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            normal(written(node))
            for node in ast.walk(tree)
            if (isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)))
            and id(node) not in docstrings
        ]
    return "\n".join(found)


def test_the_page_has_enough_messages() -> None:
    assert len(QUOTES) == len(set(QUOTES)) == PAGE.count("\n| `") >= 40


@pytest.mark.parametrize("quote", QUOTES)
def test_each_message_of_the_page_stands_in_the_code(quote: str) -> None:
    assert normal(quote) in messages()


def text_model(**language) -> MimoModel:
    return MimoModel(MimoModelConfig(tiny.language_spec(**language)))


def too_many_tokens() -> None:
    batch = tiny.batch()
    batch["input_ids"][2, 0] = tiny.READ
    MimoModel(tiny.mimo_config())(**batch)


def loss_mask() -> None:
    ids = torch.arange(1, 9)[None]
    text_model()(ids, labels=ids, loss_mask=torch.full((1, 8), float("nan")))


def initialised_without_a_run() -> None:
    before, launch._current = launch._current, None
    try:
        launch.current_run()
    finally:
        launch._current = before


def layout(length: int | None = None, experts: int | None = None, **sizes: int) -> None:
    """Refuses one of four ranks."""
    config = tiny.language_config(sequence_parallel=length is not None, num_moe_experts=experts, **sizes)
    check_layout(launch.Layout(4, **sizes), MimoModelConfig(tiny.language_spec(config)), length)


def pair_decoded() -> None:
    model = MimoModel(tiny.mimo_config())
    model.decode(model(**tiny.batch()))


def record(text: str, **columns) -> object:
    return conversation_of({"messages": [{"role": "user", "content": text}], **columns})


IDS = torch.arange(1, 9)[None]
#: Words that name a message of the page -> what raises it.
PROVOKED = {
    "found nothing there": lambda at: read_recipe(str(at / "nowhere.yaml")),
    "did you mean": lambda at: read_recipe("caption", ["data=x", "stagez=1"]),
    "expected key=value": lambda at: read_recipe("caption", ["data"]),
    "takes a multiple of": lambda at: check_processes(SimpleNamespace(tensor=2, pipeline=1, context=1), 1),
    "a name on the hub": lambda at: resolve(f"{at}/no/such/model"),
    "of training data": lambda at: open_source(at / "nowhere"),
    "cannot be opened": lambda at: read_bytes(Medium(path="a.png"), at),
    "leads out of": lambda at: read_bytes(Medium(path="../a.png"), at),
    "in the column": lambda at: record("<image><image>What?", images=["a.png"]),
    "used by two modalities": lambda at: tiny.mimo_config(special_token_ids={"images": -1, "audio": -1}),
    "names modality": lambda at: MimoModelConfig(tiny.language_spec(), special_token_ids={"images": -1}),
    "tokens but": lambda at: too_many_tokens(),
    "[B, S]`": lambda at: text_model()(IDS[0]),
    "has shape": lambda at: text_model()(IDS, labels=IDS[:, 1:]),
    "learned positions": lambda at: text_model(position_embedding_type="learned_absolute")(IDS, IDS + 60),
    "weights in loss_mask": lambda at: loss_mask(),
    "takes a MimoOutput": lambda at: pair_decoded(),
    "found none`": lambda at: initialised_without_a_run(),
    "sequence length that": lambda at: layout(7, tensor_model_parallel_size=2),
    "attention in plain torch": lambda at: layout(context_parallel_size=2),
    "shares out the language": lambda at: layout(experts=3, expert_model_parallel_size=2),
}


@pytest.mark.parametrize("words", PROVOKED)
def test_what_the_page_says_of_a_message_raises_it(words: str, tmp_path: Path, single_process) -> None:
    (quote,) = [quote for quote in QUOTES if words in f"{quote}`"]
    with pytest.raises(Exception) as found:
        PROVOKED[words](tmp_path)
    pattern = ".*".join(re.escape(part.strip()) for part in normal(quote).split("..."))
    assert re.search(pattern, normal(str(found.value))), (quote, found.value)
