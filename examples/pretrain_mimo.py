"""Train a recipe with Megatron's own training loop:

    torchrun --nproc-per-node 2 -m examples.pretrain_mimo --recipe any_to_any_small <Megatron's arguments>

Sizes, layout, precision, optimizer, checkpoints and logging are Megatron's arguments; the model's other
parts and the data are the recipe's, and what Megatron would read data by is refused.
`python -m examples.pretrain_mimo --recipe any_to_any_small --help` lists the arguments; the scripts beside
the recipes are whole command lines. A recipe of one's own is named by its module, importable from the
working directory: `--recipe my_recipe`; docs/training.md has one.
"""

import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from types import ModuleType

OURS = sorted(path.stem for path in Path(__file__).with_name("recipes").glob("[!_]*.py"))


def main() -> None:
    parser = ArgumentParser(
        prog="python -m examples.pretrain_mimo",
        description="Trains a recipe with Megatron's own loop.",
        epilog="All further arguments are Megatron's: --recipe NAME --help lists them.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME",
        help=f"one of {', '.join(OURS)}, or a module importable from the working directory, such as my.recipe",
    )
    named = any(argument.startswith("--recipe") for argument in sys.argv)
    if not named and {"-h", "--help"} & set(sys.argv):
        parser.print_help()
        return
    chosen, rest = parser.parse_known_args()
    sys.argv[1:] = rest  # Megatron parses what is left
    recipe = recipe_module(chosen.recipe, parser)
    from megatron_mimo.training import pretrain  # it takes seconds, which a wrong name need not

    pretrain(recipe)


def recipe_module(name: str, parser: ArgumentParser) -> ModuleType:
    """The module that `name` means; what it lacks of a recipe `pretrain` says. Ends the program where there is none."""
    module = f"examples.recipes.{name}" if name in OURS else name
    if not all(part.isidentifier() for part in module.split(".")):
        parser.error(f"argument --recipe: {name!r} is no module's name. Give my.recipe for my/recipe.py.")
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and imports something that is not
        parser.error(
            f"argument --recipe: there is no module {error.name!r} to import from {Path.cwd()}. Give one of {OURS}, or "
            "the dotted name of a module, such as my.recipe for my/recipe.py."
        )


if __name__ == "__main__":
    main()
