"""The code in docs/shared_prefix.md runs as it stands."""

import re
from pathlib import Path

import torch


def test_the_documented_code_runs():
    text = (Path(__file__).parents[2] / "docs" / "shared_prefix.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["result"].logprobs.shape == (9,)
    assert torch.isfinite(names["result"].logprobs).all()
