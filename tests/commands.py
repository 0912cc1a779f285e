"""What the commands' tests run on: tiny parts, a folder of captioned pictures, and a recipe's changes for them."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from PIL import Image

from examples.llava.tiny import COLOURS, SIZE, make_parts
from tests import warm


@cache
def parts() -> tuple[Path, Path]:
    """Directories of a language model and of a tower that reads images, made once a session."""
    return make_parts(Path(mkdtemp(prefix="mimo-commands-")))


@cache
def pictures(count: int = 60) -> Path:
    """A folder of pictures of one colour, each with its caption beside it."""
    folder = Path(mkdtemp(prefix="mimo-commands-")) / "pictures"
    folder.mkdir()
    for number in range(count):
        colour, shade = list(COLOURS.items())[number % len(COLOURS)]
        Image.new("RGB", (SIZE, SIZE), shade).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"It is {colour}.")
    return folder


def caption(directory: Path, *changes: str, steps: int = 6) -> list[str]:
    """`train caption` at tiny size, as words of the command line."""
    language_model, tower = parts()
    rates = "{images/input_projections: 3e-3, language_model: 3e-3}"
    return [
        "train", "caption", f"directory={directory}", f"data={pictures()}", f"model.language_model={language_model}",
        f"model.modalities.images.reads={tower}", "model.dtype=float32", "packing.length=128", "stages.0.steps=2",
        f"stages.1.steps={steps}", "stages.0.microbatches=1", "stages.1.microbatches=2", f"stages.1.trains={rates}",
        "checkpoints.every=2", "loggers.progress=false", *changes,
    ]  # fmt: skip


def command(*words: object, **options) -> warm.Done:
    """`megatron-mimo words` in a process of its own."""
    return warm.python("-m", "megatron_mimo.cli", *words, **options)
