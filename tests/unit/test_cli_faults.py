"""Bad input, each command with each fault: one line that says what to do, the exit status, nothing left behind.

Ctrl-C has a file of its own, `test_cli_interrupted.py`, whose table has every command too.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from megatron_mimo.cli import app, entry
from megatron_mimo.cli.errors import FAILED, REFUSED, UNREAD, Refused
from megatron_mimo.cli.fitting import check_fits
from megatron_mimo.cli.model_recipe import Model
from megatron_mimo.cli.ranks import check_processes
from megatron_mimo.cli.recipe import Layout
from tests import warm
from tests.commands import caption, command, pictures
from tests.unit.test_cli_interrupted import COMMANDS

pytestmark = pytest.mark.process

FAULTS = (
    "an option misspelt", "an option's type", "a key misspelt", "a key's type", "no recipe or model",
    "no data or weights",
    "a layout that does not divide", "four GPUs on one", "a full disk",
)  # fmt: skip

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
from megatron_mimo.cli.entry import main
sys.argv[1:] = {words!r}
main()
"""
FULL_OUTPUT = """
import os, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
sys.stdout.reconfigure(line_buffering=False)  # which keeps what is printed until the end, as of any file
from megatron_mimo.cli.entry import main
sys.argv[1:] = {words!r}
main()
"""
FULL = "the disk is full, or a limit of file sizes is met; free some space, then the same command again"


@cache
def run() -> Path:
    """A run that is done, made once a session."""
    directory = Path(mkdtemp(prefix="mimo-commands-")) / "run"
    done = command(*caption(directory, steps=2))
    assert done.returncode == 0, done.stderr
    return directory


@cache
def model_with(kind: str) -> Path:
    """The run's model with a fault of its files."""
    directory = shutil.copytree(run() / "model", Path(mkdtemp(prefix="mimo-commands-")) / "model")
    recipe, weights = directory / "recipe.yaml", directory / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    else:
        now = {"key": ("packing:", "pakcing:"), "type": ("length: 128", "length: many")}[kind]
        assert now[0] in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(*now))
    return directory


def words_of(name: str, at: Path, *more: object, model: object = None, data: object = None) -> list[str]:
    """A command with what it needs, which writes below `at` alone."""
    recipe = [*caption(at / "run")[2:], *([] if data is None else [f"data={data}"])]
    data = data or pictures()
    first = {
        "train": ["train", model or "caption", *recipe],
        "generate": ["generate", model or run(), data, "--output", at / "out", "--max-new-tokens", 4],
        "evaluate": ["evaluate", model or run(), data, "--output", at / "out", "--max-new-tokens", 4],
        "convert": ["convert", model or run(), at / "out"],
        "inspect": ["inspect", model or run(), "--length", 1024],
        "data show": ["data", "show", model or "caption", *recipe, "--output", at / "out" / "packs.html"],
        "data prepare": ["data", "prepare", model or "caption", *recipe],
    }[name]
    return [str(word) for word in (*first, *more)]


@dataclass(frozen=True)
class Case:
    """A command with a fault.

    Args:
        words: of the command line, of which a function is given the directory to write to.
        told: what its line has; None where this is no fault there, and the command does its work.
        status: it ends with.
        code: that runs it in a process of its own; None for this one, since nothing is begun in it.
    """

    words: Callable[[Path], Sequence[str]]
    told: str | None
    status: int = REFUSED
    code: str | None = None


def cases() -> dict[tuple[str, str], Case]:
    """Every command with every fault."""
    found: dict[tuple[str, str], Case] = {}

    def add(fault: str, told: str | None, *more: object, only: Sequence[str] = tuple(COMMANDS), **options) -> None:
        named = {key: options.pop(key) for key in ("model", "data") if key in options}
        for name in only:
            found[name, fault] = Case(partial(_words, name, more, named), told, **options)

    recipes, models = ("train", "data show", "data prepare"), ("generate", "evaluate", "convert", "inspect")
    ranked = ("generate", "evaluate", "convert")
    add("an option misspelt", r"No such option: --dbug \(Possible options: --debug.*\); see .* --help", "--dbug")
    add("an option's type", "Invalid value for '--tensor'.*integer.*--help", "--tensor", "two", only=models)
    add("an option's type", "Invalid value for '--nproc'.*integer.*--help", "--nproc", "two", only=["train"])
    add("an option's type", "Invalid value for '--packs'.*integer.*--help", "--packs", "two", only=["data show"])
    add("an option's type", "Option '--debug' does not take a value.*--help", "--debug=two", only=["data prepare"])
    add("a key misspelt", "unknown key 'lenght'; did you mean 'length'", "packing.lenght=64", only=recipes)
    add("a key misspelt", "recipe.yaml: unknown key 'pakcing'; did you mean 'packing'", model="key", only=models)
    add("a key's type", "packing.length: expected a valid integer.*'many'", "packing.length=many", only=recipes)
    add("a key's type", "packing.length: expected a valid integer.*'many'", model="type", only=models)
    add(
        "no recipe or model",
        "nowhere.yaml: expected a recipe's file or one of",
        model=Path("nowhere.yaml"),
        only=recipes,
    )
    add(
        "no recipe or model", "nowhere: expected a directory, or a name on the hub", model=Path("/nowhere"), only=models
    )
    add("no data or weights", "nowhere: expected a file or directory", data=Path("nowhere"), only=[*recipes, *ranked])
    add(
        "no data or weights",
        "expected model.safetensors or model.safetensors.index.json",
        model="no weights",
        only=["convert"],
    )
    add("no data or weights", "nowhere: expected a file or directory", "--example", "nowhere", only=["inspect"])
    uneven = (r"size 3: expected one of \[1, 2, 4\].*Lower it to one", "--tensor", 3, "--nproc", 3)
    add("a layout that does not divide", *uneven, only=ranked)
    add("a layout that does not divide", *(uneven[0], "layout.tensor=3", "--nproc", 3), only=["train"])
    add("a layout that does not divide", r"--tensor 3: expected one of \[1, 2, 4\]", "--tensor", 3, only=["inspect"])
    cut = ("layout={tensor: 2, sequence_parallel: true}", "packing.length=127")
    add("a layout that does not divide", "packing.length: .*Take 126 or 128", *cut, only=["data show", "data prepare"])
    gpus = "--nproc 4: expected at most one process a GPU, found 1 GPUs here; lower --nproc"
    add("four GPUs on one", gpus, "--tensor", 4, "--nproc", 4, only=ranked)
    add("four GPUs on one", gpus, "layout.tensor=4", "--nproc", 4, only=["train"])
    # These touch no GPU: data and sizes are looked at anywhere.
    add("four GPUs on one", None, "--tensor", 4, only=["inspect"], status=0)
    add("four GPUs on one", None, "layout.tensor=4", only=["data show", "data prepare"], status=0)
    full = dict(told=FULL, status=FAILED)
    for size, names in (
        (50_000, ("train", "convert")),
        (300, ("generate", "data prepare")),
        (3000, ("evaluate", "data show")),
    ):
        add("a full disk", only=names, **full, code=LIMITED.replace("{size}", str(size)))
    add("a full disk", only=["inspect"], **full, code=FULL_OUTPUT)
    return found


def _words(name: str, more: Sequence[object], named: Mapping[str, object], at: Path) -> list[str]:
    made = {key: model_with(value) if isinstance(value, str) else value for key, value in named.items()}
    return words_of(name, at, *more, **made)


CASES = cases()


def test_every_command_is_tried_with_every_fault() -> None:
    assert CASES.keys() == {(name, fault) for name in COMMANDS for fault in FAULTS}


@pytest.fixture
def in_process(no_run, monkeypatch, capsys) -> Callable[[Sequence[str]], warm.Done]:
    """`megatron-mimo words` in this process, which looks like one with a GPU where it is asked."""

    def invoke(words: Sequence[str]) -> warm.Done:
        capsys.readouterr()
        # What a command sets for the process that is its own.
        monkeypatch.setattr(app.logging, "basicConfig", lambda **options: None)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
        monkeypatch.setattr(sys, "argv", ["megatron-mimo", *words])
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            entry.main()
        return warm.Done(ended.value.code or 0, *capsys.readouterr())

    return invoke


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_fault_is_one_line_that_says_what_to_do_and_leaves_nothing(
    name: str, fault: str, tmp_path: Path, in_process, monkeypatch
) -> None:
    case = CASES[name, fault]
    words = case.words(tmp_path)
    lengths = pictures().with_name("pictures.lengths.npz")
    lengths.unlink(missing_ok=True)
    if fault == "four GPUs on one" and case.told:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    done = in_process(words) if case.code is None else warm.python("-c", case.code.format(words=words))
    assert done.returncode == case.status, done.stderr
    if case.told is None:
        assert not done.stderr and done.stdout
        return
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]  # how far it came
    assert len(lines) == 1 and lines[0].startswith("megatron-mimo: "), done.stderr
    assert re.search(case.told, lines[0]), done.stderr
    if fault != "a full disk":
        assert not done.stdout and list(tmp_path.iterdir()) == []  # nothing was begun
    final = ("out/answers.jsonl", "out/scores.json", "out/packs.html", "out/config.json", "run/model", "run/*/*/step_*")
    assert [path for name in final for path in tmp_path.glob(name)] == []
    assert [path for path in lengths.parent.iterdir() if "lengths" in path.name] == []


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
@pytest.mark.parametrize("name", ["train", "generate", "evaluate", "convert"])
def test_under_torchrun_a_layout_that_does_not_divide_is_one_line_for_all_ranks(axis: str, name: str, tmp_path) -> None:
    words = words_of(name, tmp_path, *([f"layout.{axis}=3"] if name == "train" else [f"--{axis}", 3]))
    done = warm.ranks(3, "-m", "megatron_mimo.cli", *words)
    assert done.returncode == REFUSED
    (line,) = done.stderr.splitlines()
    assert re.search(rf"megatron-mimo: {axis}_model_parallel_size 3.*(Lower it|Change one of them)", line)
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_more_ranks_than_gpus_of_a_host_are_refused_by_all_ranks(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(variable, "4")
    with pytest.raises(Refused, match="--nproc-per-node 4: expected at most one process a GPU, found 1"):
        check_processes(Layout(tensor=4), 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # four hosts
    check_processes(Layout(tensor=4), 1)


def test_who_reads_no_further_ends_a_command_without_a_word() -> None:
    code = """
import os, sys
pipe = os.pipe()
os.close(pipe[0])
os.dup2(pipe[1], 1)
sys.stdout.reconfigure(line_buffering=False)
from megatron_mimo.cli.entry import main
sys.argv[1:] = ["train", "caption", "data=folder", "--print"]
main()
"""
    done = warm.python("-c", code)
    assert (done.returncode, done.stderr) == (UNREAD, "")


def test_a_recipe_that_is_no_text_is_one_line_that_names_it(tmp_path: Path, in_process) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"seed: 1\xff")
    done = in_process(["train", str(tmp_path / "recipe.yaml")])
    assert (done.returncode, len(done.stderr.splitlines())) == (REFUSED, 1)
    assert "recipe.yaml: expected YAML in UTF-8, found byte 7 of something else" in done.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"inspect", "data prepare"}))
def test_a_file_where_a_directory_is_to_be_is_one_line_that_says_what_to_do(name: str, tmp_path: Path) -> None:
    below = tmp_path / "out" if name != "train" else tmp_path / "run"
    below.write_text("mine")
    output = [] if name != "convert" else ["--to", "safetensors"]
    words = words_of(name, tmp_path, *output)
    done = command(*[word.replace(str(tmp_path / "out"), str(below / "deeper")) for word in words])
    assert done.returncode == REFUSED, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search("; name another place, or remove (what is there|the file that stands where)", line)
    assert below.read_text() == "mine"


def test_a_model_without_its_tokenizers_files_is_one_line_that_says_what_to_do(tmp_path: Path, in_process) -> None:
    model = shutil.copytree(run() / "model", tmp_path / "model")
    for file in model.glob("token*"):
        file.unlink()
    done = in_process(["inspect", str(model), "--length", "1024"])
    assert (done.returncode, len(done.stderr.splitlines())) == (REFUSED, 1), done.stderr
    assert f"{model}: expected a processor or tokenizer that transformers loads, found none. Copy" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("name", ["train", "convert"])
def test_a_full_disk_is_one_line_for_all_ranks_that_nproc_starts(name: str, tmp_path: Path) -> None:
    """Cold processes: it is torchrun that ends the ranks which have not said it yet."""
    words = words_of(name, tmp_path, "--nproc", 2, *(["layout.tensor=2"] if name == "train" else []))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mimo.cli", *words],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert done.returncode == FAILED
    (line,) = done.stderr.splitlines()
    assert re.match("megatron-mimo: rank [01]: ", line) and FULL in line


def test_a_layout_is_asked_of_the_backend_that_will_train(no_run, monkeypatch) -> None:
    """Attention over a split sequence is TransformerEngine's, which is there where a GPU is, not in a run pretended."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("megatron_mimo.specs.HAVE_TE", True)
    monkeypatch.setattr("megatron_mimo.cli.fitting.check_layout", lambda layout, config: None)
    monkeypatch.setattr(
        "megatron_mimo.cli.fitting.model_config", lambda model, *rest, **named: asked.append(model.backend)
    )
    check_fits(Model(source=str(run() / "model")), Layout(context=2), 2)
    assert asked == ["transformer_engine"]
