"""The third-party machinery inside roles: vLLM or transformers inside a generator, DeepSpeed inside a learner."""
