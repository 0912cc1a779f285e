"""Train a recipe with Megatron's own training loop:

    torchrun --nproc-per-node 2 -m examples.pretrain_mimo --recipe any_to_any_small <Megatron's arguments>

Sizes, layout, precision, optimizer, checkpoints and logging are Megatron's arguments; the model's other
parts and the data are the recipe's, and what Megatron would read data by is refused.
`python -m examples.pretrain_mimo --recipe any_to_any_small --help` lists the arguments; the scripts beside
the recipes are whole command lines.
"""

import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

NO_RECIPES = ("__init__", "parts")


def main() -> None:
    found = sorted(path.stem for path in Path(__file__).with_name("recipes").glob("*.py"))
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
        choices=[name for name in found if name not in NO_RECIPES],
        help="a module in examples/recipes",
    )
    named = any(argument.startswith("--recipe") for argument in sys.argv)
    if not named and {"-h", "--help"} & set(sys.argv):
        parser.print_help()
        return
    chosen, rest = parser.parse_known_args()
    sys.argv[1:] = rest  # Megatron parses what is left
    from megatron_mimo.training.pretraining import pretrain  # it takes seconds, which a wrong name need not

    pretrain(import_module(f"examples.recipes.{chosen.recipe}"))


if __name__ == "__main__":
    main()
