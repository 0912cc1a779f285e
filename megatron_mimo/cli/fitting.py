"""Whether a model and a layout fit, asked before any rank is started, or any weight is read."""

from __future__ import annotations

from megatron_mimo.axes import Layout
from megatron_mimo.cli import recipe
from megatron_mimo.cli.building import model_config
from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.model_recipe import Model
from megatron_mimo.cli.settings import Settings
from megatron_mimo.launch import Run, pretended
from megatron_mimo.layout import check_layout
from megatron_mimo.specs import choose_backend


def check_fits(model: Model, layout: recipe.Layout, processes: int, settings: Settings = Settings()) -> None:
    """Refuses a layout that does not share a model out. No GPU is touched.

    Args:
        model: of a recipe.
        layout: of the recipe, or asked for.
        processes: that there will be.
        settings: of Megatron.

    Raises:
        Refused: naming what does not divide, and what would.
        FileNotFoundError, ValueError: as `model_config`.
    """
    if processes == 1:  # which has all of it
        return
    try:
        sizes = Layout(processes, **layout.sizes)
    except ValueError as error:
        raise Refused(str(error)) from error
    # Chosen here: a run that is pretended has no GPU, and so no TransformerEngine.
    model = model.model_copy(update={"backend": choose_backend(model.backend)})
    with pretended(sizes) as run:
        check_run_fits(model, run, settings, sequence_parallel=layout.sequence_parallel)


def check_run_fits(model: Model, run: Run, settings: Settings = Settings(), *, sequence_parallel: bool = False) -> None:
    """As `check_fits`, on a rank of the run in progress; all of them find the same."""
    model = model.model_copy(update={"dtype": model.dtype or "bfloat16"})  # no word about rounding, which loading says
    try:
        check_layout(run.layout, model_config(model, settings, sequence_parallel=sequence_parallel))
    except ValueError as error:
        raise Refused(str(error)) from error
