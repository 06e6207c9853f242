"""Datasets -> prompts.

sources.py reads rows and says where each came from; render.py turns a prompt into text; prompts.py checks and tokenises
all into a PromptSet; order.py says which prompt and which seeds a ticket stands for.
"""

from raygrpo.data.order import evaluation_seed, prompt_index, sample_seed
from raygrpo.data.prompts import DataReport, PromptSet, load_prompts

__all__ = ["DataReport", "PromptSet", "evaluation_seed", "load_prompts", "prompt_index", "sample_seed"]
