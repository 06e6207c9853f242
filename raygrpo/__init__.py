"""GRPO post-training on Ray."""
