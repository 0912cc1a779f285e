"""The examples of docs/outputs.md run as written and print what it says."""

import re
from pathlib import Path

OUTPUTS = Path(__file__).parents[2] / "docs" / "outputs.md"


def test_the_examples_of_the_outputs_page_print_what_it_says(single_process):
    text, printed = OUTPUTS.read_text(), []
    names = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    shapes = re.findall(r"print\(.*\)  # (\[.*\])", text)
    assert [line for line in printed if "Size" in line] == [f"torch.Size({shape})" for shape in shapes]
    assert len(shapes) == 6
