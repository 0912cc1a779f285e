"""The commands and their options."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mimo.cli.errors import STOPPED, Refused, told
from megatron_mimo.cli.ranks import check_processes, end_with_starter, run_ranks, started_here, under_torchrun
from megatron_mimo.cli.reading import read_recipe, shipped, written
from megatron_mimo.compat.notices import Answered

if TYPE_CHECKING:
    from megatron_mimo.cli.models import Place
    from megatron_mimo.cli.recipe import Layout
    from megatron_mimo.launch import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Multimodal in/out models on Megatron-Core, from a folder to a model that is trained, evaluated and exported.",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Nproc = Annotated[int, typer.Option(min=1, help="Processes to start on this host, one a GPU.")]
RecipeFile = Annotated[str, typer.Argument(help="A recipe's file, or one that ships: " + ", ".join(shipped()) + ".")]
Changes = Annotated[
    list[str] | None, typer.Argument(help="Changes of the recipe: key=value, such as stages.0.steps=100.")
]


@contextmanager
def command(debug: bool) -> Iterator[None]:
    """Within it, errors are one line and Megatron's notices are answered."""
    end_with_starter()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)  # Megatron sets one up too
    if not debug:  # what its loaders say of weights that are left out on purpose
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not debug:  # of parts that Megatron and torch will rename or miss, which a user can do nothing about
        warnings.filterwarnings("ignore", module=r"(megatron\.core|torch)\b")
    with told(debug), Answered():
        yield


@contextmanager
def running(layout: Layout | None, seed: int = 1234, *, graph_safe_rng: bool = False) -> Iterator[Run]:
    """Within it, a run is in progress on a layout; None for one process alone."""
    import megatron_mimo

    said, sizes = sys.excepthook, layout.sizes if layout is not None else {}
    run = megatron_mimo.initialize(**sizes, seed=seed, graph_safe_rng=graph_safe_rng)
    sys.excepthook = said  # torch's would say the rank once more
    yield run
    megatron_mimo.shutdown()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"megatron-mimo {installed('megatron-mimo')}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version  # which its callback has told


@app.command()
def train(
    recipe: RecipeFile,
    changes: Changes = None,
    nproc: Nproc = 1,
    show: Annotated[bool, typer.Option("--print", help="Print the resolved recipe, and train nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Train a recipe; the same command goes on where it was stopped.

    It starts the processes itself with --nproc, and runs as it is under torchrun.
    """
    with command(debug):
        found = read_recipe(recipe, changes or ())
        if show:
            from megatron_mimo.cli.settings import settings_of

            settings_of(found.megatron)
            print(written(found), end="")
            return
        check_processes(found.layout, nproc)
        if not under_torchrun():
            from megatron_mimo.cli.checks import check

            check(found, nproc)
            if nproc > 1:
                sys.exit(run_ranks(nproc, sys.argv[1:]))
        with running(found.layout, found.seed, graph_safe_rng=found.graphs is not None) as run:
            from megatron_mimo.cli.kept import settled
            from megatron_mimo.cli.training import MODEL
            from megatron_mimo.cli.training import train as train_recipe

            if not train_recipe(settled(found), run):
                if run.rank == 0:
                    print("megatron-mimo: stopped; the same command goes on from here", file=sys.stderr)
                sys.exit(STOPPED)
            if run.rank == 0:
                print(found.directory / MODEL)


ModelName = Annotated[
    str,
    typer.Argument(help="A directory, a name on the hub, a run's directory or its checkpoint, or what convert wrote."),
]
Tensor = Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")]
Pipeline = Annotated[int, typer.Option(min=1, help="Pipeline stages.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Positions that an answer may add; by default 128, and those of an image or clip."),
]
Averages = Annotated[
    bool, typer.Option("--ema", help="Take the averages of the weights, of a run or checkpoint with ema_decay.")
]
MediaRoot = Annotated[
    Path | None, typer.Option(help="A directory that holds the media which records name; by default the data's own.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the model's own.")]


@contextmanager
def ranks(place: Place, nproc: int, tensor: int, pipeline: int, dtype: str | None = None) -> Iterator[Run]:
    """Within it, a run is in progress on ranks for a model, which are started first where that is to be done."""
    from megatron_mimo.cli.fitting import check_fits, check_run_fits
    from megatron_mimo.cli.models import model_of
    from megatron_mimo.cli.recipe import Layout

    check_dtype(dtype)
    layout = Layout(tensor=tensor, pipeline=pipeline)
    check_processes(layout, nproc)
    if not under_torchrun() and nproc > 1:
        check_fits(model_of(place), layout, nproc)
        sys.exit(run_ranks(nproc, sys.argv[1:]))
    with running(layout) as run:
        if run.world_size > 1 and not started_here():
            check_run_fits(model_of(place), run)
        yield run


@app.command()
def generate(
    model: ModelName,
    data: Annotated[Path, typer.Argument(help="Records to answer: .jsonl or any other data, as docs/data.md lists.")],
    output: Annotated[Path, typer.Option(help="Directory of answers.jsonl and media/.")],
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of the likeliest tokens.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws; record i has seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Records that are answered together.")] = 8,
    columns: Annotated[str, typer.Option(help="Media beside a text: read, or write to have them drawn.")] = "read",
    media_root: MediaRoot = None,
    ema: Averages = False,
    dtype: Dtype = None,
    nproc: Nproc = 1,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    debug: Debug = False,
) -> None:
    """Answer records: JSON lines in, JSON lines and media out; the same command goes on where it was stopped.

    What stands before a record's last answer is asked. Data-parallel ranks share the records out.
    """
    with command(debug):
        from megatron_mimo.cli.answering import generate as answer
        from megatron_mimo.cli.models import find, open_model
        from megatron_mimo.data import open_source

        place = find(model, ema=ema)
        where = {"media_root": media_root, "columns": columns}  # which it checks
        source = open_source(data, unanswered=True, **where)  # type: ignore[arg-type]
        with ranks(place, nproc, tensor, pipeline, dtype) as run:
            asked = {
                "model": str(place.directory.resolve()), "ema": place.ema, "max_new_tokens": max_new_tokens,
                "temperature": temperature, "top_p": top_p, "seed": seed,
            }  # fmt: skip
            written = answer(open_model(place, run, dtype), source, output, run, asked=asked, batch_size=batch_size)
            if run.rank == 0:
                print(written)


@app.command()
def evaluate(
    model: ModelName,
    data: Annotated[list[Path], typer.Argument(help="Data sets whose records end with the right answer.")],
    output: Annotated[Path, typer.Option(help="Directory of scores.json, samples.html and the answers.")],
    max_new_tokens: MaxNewTokens = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records that are answered together.")] = 8,
    samples: Annotated[int, typer.Option(min=0, help="Records of each data set on the page.")] = 32,
    columns: Annotated[str, typer.Option(help="Media beside a text: read, or write to have them drawn.")] = "read",
    judge: Annotated[
        str | None, typer.Option(help="module:function or module:Class that scores drawn pictures; else the recipe's.")
    ] = None,
    media_root: MediaRoot = None,
    ema: Averages = False,
    dtype: Dtype = None,
    nproc: Nproc = 1,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    debug: Debug = False,
) -> None:
    """Score a model on data sets: exact match, VQA accuracy, BLEU, ROUGE-L, CIDEr; with a page of samples.

    A judge is called with the drawn picture, the record's own or None, and the prompt's text, and gives a score or a
    dict of scores. Answers are the likeliest tokens; those of an earlier attempt are kept.
    """
    with command(debug):
        from megatron_mimo.cli.judges import Judge, found_judge
        from megatron_mimo.cli.judging import evaluate as score
        from megatron_mimo.cli.judging import try_judge
        from megatron_mimo.cli.models import find, open_model
        from megatron_mimo.data import open_source

        place = find(model, ema=ema)
        where = {"media_root": media_root, "columns": columns}  # which it checks
        sources = {path.stem: open_source(path, **where) for path in data}  # type: ignore[arg-type]
        if len(sources) < len(data):
            raise Refused(f"expected data sets of different names, found {[path.stem for path in data]}")
        given = judge or place.judge
        if given is not None:
            found_judge(given)  # before any rank is started
        with ranks(place, nproc, tensor, pipeline, dtype) as run:
            directory = str(place.directory.resolve())
            asked = {"model": directory, "ema": place.ema, "max_new_tokens": max_new_tokens, "seed": 0}
            made = None if given is None else Judge(given)
            if made is not None:
                try_judge(made, sources)
            opened = open_model(place, run, dtype)
            options = {"asked": asked, "batch_size": batch_size, "samples": samples, "judge": made}
            found = score(opened, sources, output, run, **options)  # type: ignore[arg-type]
            if run.rank == 0:
                for name, values in found.items():
                    print(f"{name}: " + ", ".join(f"{score} {value:.4g}" for score, value in values.items()))


@app.command()
def convert(
    model: ModelName,
    target: Annotated[Path, typer.Argument(help="A directory, or with --to safetensors a file.")],
    to: Annotated[str, typer.Option(help="hf (transformers), megatron (a checkpoint), safetensors (one file).")] = "hf",
    ema: Averages = False,
    dtype: Dtype = None,
    nproc: Nproc = 1,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    debug: Debug = False,
) -> None:
    """Write a model in another form: Hugging Face's, a Megatron checkpoint, or one file of safetensors."""
    with command(debug):
        from megatron_mimo.cli.converting import FORMS
        from megatron_mimo.cli.converting import convert as write
        from megatron_mimo.cli.models import find

        if to not in FORMS:
            raise Refused(f"--to: expected one of {list(FORMS)}, found {to!r}")
        place = find(model, ema=ema)
        with ranks(place, nproc, tensor, pipeline, dtype) as run:
            write(place, target, to, run, dtype)
            if run.rank == 0:
                print(target)


@app.command()
def inspect(
    model: ModelName,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    data: Annotated[int, typer.Option(min=1, help="Data-parallel ranks.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Context-parallel ranks.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option(help="Tensor-parallel ranks share the sequence out.")] = False,
    distributed_optimizer: Annotated[bool, typer.Option(help="Data-parallel ranks share Adam's states out.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    frozen: Annotated[list[str] | None, typer.Option(help="A part that does not train; may be repeated.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Positions of a pack.")] = 4096,
    microbatches: Annotated[int, typer.Option(min=1, help="Packs of a step on each data-parallel rank.")] = 1,
    recompute: Annotated[str | None, typer.Option(help="Activations in the language model: selective or full.")] = None,
    example: Annotated[
        Path | None, typer.Option(help="Data whose first pack is counted; by default one is made up.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Of layers: transformer_engine, apex, torch or auto; by default the recipe's."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Tell a model's parts, parameters and layouts, and a step's memory on a rank and operations; no weight is read.

    The memory is torch's allocated peak on a GPU: weights, gradients, Adam's states and activations.
    """
    with command(debug):
        from megatron_mimo.cli.counting import BACKENDS, Step
        from megatron_mimo.cli.inspecting import sizes_of
        from megatron_mimo.cli.inspecting import told as lines_of
        from megatron_mimo.cli.models import find

        check_dtype(dtype)
        if recompute not in (None, "selective", "full"):
            raise Refused(f"--recompute: expected selective or full, found {recompute!r}")
        if backend not in (None, *BACKENDS):
            raise Refused(f"--backend: expected one of {list(BACKENDS)}, found {backend!r}")
        place = find(model)
        step = Step(
            tensor, pipeline, context, data, sequence_parallel, dtype, tuple(frozen or ()), length, microbatches,
            recompute, distributed_optimizer, example, backend or place.backend,
        )  # fmt: skip
        for line in lines_of(sizes_of(place), place, step):
            print(line)


def check_dtype(dtype: str | None) -> None:
    """Refuses what is no dtype of weights.

    Raises:
        Refused: naming those that are.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise Refused(f"--dtype: expected float32, bfloat16 or float16, found {dtype!r}")


data_app = typer.Typer(no_args_is_help=True, help="Look at a recipe's data before it trains.", rich_markup_mode=None)
app.add_typer(data_app, name="data")


@data_app.command()
def show(
    recipe: RecipeFile,
    changes: Changes = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("packs.html"),
    packs: Annotated[int, typer.Option(min=1, help="How many.")] = 4,
    stage: Annotated[str | None, typer.Option(help="Whose data; the first one's by default.")] = None,
    debug: Debug = False,
) -> None:
    """Write a page with a recipe's first packs, as the model sees them."""
    with command(debug):
        from megatron_mimo.cli.checks import check
        from megatron_mimo.cli.looking import show_packs

        found = read_recipe(recipe, changes or ())
        check(found, None)
        with running(None, found.seed):
            print(show_packs(found, stage, output, packs))


@data_app.command()
def prepare(recipe: RecipeFile, changes: Changes = None, debug: Debug = False) -> None:
    """Measure a recipe's data: records, packs of an epoch, what stays empty, and what cannot be used."""
    with command(debug):
        from megatron_mimo.cli.checks import check
        from megatron_mimo.cli.looking import measured

        found = read_recipe(recipe, changes or ())
        check(found, None)
        with running(None, found.seed):
            for line in measured(found):
                print(line)
