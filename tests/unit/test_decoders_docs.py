"""The examples of docs/outputs.md run as written, and its sampling loops sample what they claim."""

import re
from pathlib import Path

import pytest
import torch

OUTPUTS = Path(__file__).parents[2] / "docs" / "outputs.md"


@pytest.fixture(scope="module")
def page(single_process) -> dict:
    """What the page's code defines, all of it run in order, and what it printed."""
    printed = []
    names = {"print": lambda *values: printed.append(" ".join(map(str, values))), "printed": printed}
    blocks = re.findall(r"```python\n(.*?)```", OUTPUTS.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    return names


def test_the_examples_of_the_outputs_page_print_what_it_says(page):
    shapes = re.findall(r"print\(.*\)  # (\[.*\])", OUTPUTS.read_text())
    assert [line for line in page["printed"] if "Size" in line] == [
        f"torch.Size({shape})" for shape in shapes
    ]


def test_codes_sampled_one_by_one_are_those_that_teacher_forcing_finds_likeliest(page):
    model, ids = page["codes_model"], page["prompts"].new_tensor([[1, 2] + [99] * 16, [3, 4] + [99] * 16])
    spread(model)
    with torch.no_grad():
        codes = page["sample_codes"](model, ids, temperature=0)
        rows = page["rows_at"](model, ids, "codes", {"codes": codes})
    (logits,) = model.modality_submodules["images"].decoders["codes"].logits(rows)
    assert torch.equal(logits.argmax(1), codes)
    assert len(codes.unique()) > 1


def test_a_solver_step_sees_what_training_sees_at_that_point_of_the_path(page):
    model, ids = page["flow_model"], page["prompts"]
    spread(model)
    clean, noise, half = torch.randn(8, 12), torch.randn(8, 12), torch.full((2,), 0.5)
    decoder = model.modality_submodules["images"].decoders["patches"]
    given = {"target": clean, "noise": noise, "time": torch.ones(2)}
    with torch.no_grad():
        drawn = page["sample_patches"](model, ids, noise, steps=2)
        rows = page["rows_at"](model, ids, "patches", given)
        middle = noise - decoder.velocity(rows, noise, torch.ones(2)) / 2
        # A target and noise whose midpoint is the state after the first step.
        given = {"target": 2 * middle - noise, "noise": noise, "time": half}
        rows = page["rows_at"](model, ids, "patches", given)
        wanted = middle - decoder.velocity(rows, middle, half) / 2
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=1e-4)  # float32 through two model runs
    assert not torch.allclose(drawn, noise, atol=0.1)


def spread(model: torch.nn.Module) -> None:
    """Weights of a size at which what the model sees changes what it gives."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
