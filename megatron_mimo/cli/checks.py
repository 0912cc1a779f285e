"""What of a recipe can be refused before any rank is started."""

from __future__ import annotations

import logging

from megatron_mimo.cli.building import names_of
from megatron_mimo.cli.fitting import check_fits
from megatron_mimo.cli.judges import found_judge
from megatron_mimo.cli.kept import check_kept
from megatron_mimo.cli.recipe import Recipe
from megatron_mimo.cli.settings import settings_of
from megatron_mimo.cli.training import opened, pack_shape
from megatron_mimo.hf.source import resolve

logger = logging.getLogger(__name__)


def check(recipe: Recipe, processes: int | None) -> None:
    """Refuses what can be refused before any rank is started; tells of media without a text.

    Args:
        recipe: that is asked for.
        processes: that will train it; None where its data is looked at alone.

    Raises:
        Refused: settings that Megatron does not have, a recipe that the directory's run did not have.
        FileNotFoundError, ValueError: data or a model that is not there, a layout that does not share them out.
    """
    settings = settings_of(recipe.megatron)
    pack_shape(recipe)
    if recipe.evaluation.judge is not None:
        found_judge(recipe.evaluation.judge)
    if processes is not None:
        check_kept(recipe)
    for source in {one.path: one for one in recipe.sources()}.values():
        if alone := opened(source).alone:
            told = "1 file has" if len(alone) == 1 else f"{len(alone)} files have"
            logger.warning("%s: %s no .txt beside and no part in the data, such as %s", source.path, told, alone[0])
    for name in names_of(recipe.model):
        resolve(name)
    if processes is not None:
        check_fits(recipe.model, recipe.layout, processes, settings)
