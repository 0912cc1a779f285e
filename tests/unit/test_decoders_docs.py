"""The example of docs/outputs.md runs as written."""

import re
from pathlib import Path

OUTPUTS = Path(__file__).parents[2] / "docs" / "outputs.md"


def test_the_example_of_the_outputs_page_runs(single_process, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", OUTPUTS.read_text(), flags=re.DOTALL)
    exec(code, {})
    assert "torch.Size([2, 1, 4, 4])" in capsys.readouterr().out
