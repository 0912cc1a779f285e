"""Train a recipe with Megatron's own training loop:

    torchrun --nproc-per-node 2 -m examples.pretrain_mimo --recipe any_to_any_small <Megatron's arguments>

Everything that Megatron has an argument for is that argument: sizes, layout, precision, optimizer,
checkpoints, logging. `python -m examples.pretrain_mimo --recipe any_to_any_small --help` lists all of
them; the scripts beside the recipes are whole command lines.
"""

import sys
from argparse import ArgumentParser
from importlib import import_module

from megatron_mimo.training.pretraining import pretrain


def main() -> None:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="name of a module in examples/recipes")
    chosen, rest = parser.parse_known_args()
    sys.argv[1:] = rest  # Megatron parses what is left
    pretrain(import_module(f"examples.recipes.{chosen.recipe}"))


if __name__ == "__main__":
    main()
