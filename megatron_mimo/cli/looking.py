"""`data show` and `data prepare`: a recipe's data before it trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_mimo.cli.building import model_config
from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.laying_out import processor_of
from megatron_mimo.cli.nearest import unknown
from megatron_mimo.cli.recipe import Recipe
from megatron_mimo.cli.settings import Settings
from megatron_mimo.cli.training import opened, pack_shape, packs_of
from megatron_mimo.data import SampleProcessor, show
from megatron_mimo.data import prepare as measure


def show_packs(recipe: Recipe, stage: str | None, output: Path, packs: int) -> Path:
    """Writes a page with the first packs of a stage, and gives its path.

    Args:
        recipe: whose data it is.
        stage: its name; None for the first.
        output: the page.
        packs: how many.

    Raises:
        Refused: there is no such stage.
    """
    stages = {one.name: one for one in recipe.stages}
    if stage is not None and stage not in stages:
        raise Refused(f"--stage: {unknown('stage', stage, stages)}")
    chosen = recipe.stages[0] if stage is None else stages[stage]
    data = packs_of(recipe, recipe.data_of(chosen), _process(recipe), None)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        return show(data, output, packs=packs)
    finally:
        data.close()


def measured(recipe: Recipe) -> Iterator[str]:
    """A line a source: its records, the packs of an epoch, what stays empty, what cannot be used, and why.

    Lengths are kept beside each source, as `megatron_mimo.data.prepare` does.
    """
    process = _process(recipe)
    shape = pack_shape(recipe)
    for path, source in {str(source.path): source for source in recipe.sources()}.items():
        lengths = measure(opened(source), process, workers=recipe.processor.workers)
        expected = lengths.expected(shape)
        left = ", ".join(f"{count} {kind}" for kind, count in sorted(expected.skipped.items())) or "none"
        packs = f"{expected.packs} pack{'' if expected.packs == 1 else 's'}"
        yield (
            f"{path}: {len(lengths.tokens)} records, {int(lengths.tokens.sum())} tokens, {packs} of {shape.length} an "
            f"epoch, {expected.waste:.1%} empty, left out: {left}"
        )
        for kind, reason in sorted(lengths.reasons.items()):
            yield f"    {kind}: {reason}"


def _process(recipe: Recipe) -> SampleProcessor:
    config = model_config(recipe.model, Settings())
    return processor_of(config, recipe.model, recipe.processor.template)
