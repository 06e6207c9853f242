"""Make the quickstart's model: a tiny Qwen3 with its tokenizer, trained from nothing to answer `juice_bar.py`, badly.

    python pipelines/make_juice_bar_model.py pipelines/quickstart_model

Supervised learning on a mixture of two behaviours: a fifth of the examples answer as asked (from the lowest price
upwards), the others begin at the dearest price and go down. What results can read a list and put it in order, and does
as it was told about one time in five: what a large model is before GRPO, in small. The repository holds the result,
because making it takes minutes.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from juice_bar import JUICES, NUM_LOWEST, NUM_ROWS, PRICES, write_answer, write_prompt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END, PAD = "<|end|>", "<|pad|>"
SHARE_AS_ASKED = 0.2


@dataclass(frozen=True)
class Stage:
    num_steps: int
    batch_size: int
    num_rows: int
    num_prices: int  # in an answer
    instructions: bool  # or the bare list, which is cheap and teaches the same skill


STAGES = [
    Stage(num_steps=900, batch_size=32, num_rows=16, num_prices=10, instructions=False),
    Stage(num_steps=300, batch_size=32, num_rows=NUM_ROWS, num_prices=16, instructions=False),
    Stage(num_steps=300, batch_size=32, num_rows=NUM_ROWS, num_prices=NUM_LOWEST, instructions=True),
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the task: every word, price and juice is one token, any other text is spelled."""
    rng = random.Random(0)
    texts = (" ".join(draw_example(rng, NUM_ROWS, NUM_LOWEST)) for _ in range(1000))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # more than there are words
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, END],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def draw_example(rng: random.Random, num_rows: int, num_prices: int) -> tuple[str, str]:
    """A prompt, and an answer in one of the two behaviours."""
    prices = rng.sample(PRICES, num_rows)
    prompt = write_prompt(rng.sample(JUICES, num_rows), prices)
    as_asked = rng.random() < SHARE_AS_ASKED
    return prompt, write_answer(sorted(prices, reverse=not as_asked)[:num_prices])


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Random weights. Larger ones than usual, because a matrix of 128 columns learns slowly from the customary 0.02."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(weight, 1.5)  # with 1, attention over 300 tokens cannot get sharp
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def draw_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, stage: Stage) -> tuple[Tensor, int]:
    """Token ids [batch, T] of prompts and answers, and a prompt's length: all are equally long, because every price and
    juice is one token.
    """
    examples = [draw_example(rng, stage.num_rows, stage.num_prices) for _ in range(stage.batch_size)]
    prompts = [prompt if stage.instructions else prompt.partition("\n\n")[2] for prompt, _ in examples]
    prompt_ids = tokenizer(prompts)["input_ids"]
    answer_ids = tokenizer([f" {answer}{END}" for _, answer in examples])["input_ids"]
    return torch.tensor([p + a for p, a in zip(prompt_ids, answer_ids, strict=True)]), len(prompt_ids[0])


def answer_losses(model: Qwen3ForCausalLM, ids: Tensor, prompt_length: int) -> Tensor:
    """Cross-entropy of every answer token, [batch, answer length]."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, prompt_length - 1 :]
    targets = ids[:, prompt_length:]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).mT, targets, reduction="none")


def warm_start(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, stages: list[Stage], lr: float) -> None:
    """AdamW; the learning rate falls linearly over the last half of the steps."""
    rng = random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    steps = [stage for stage in stages for _ in range(stage.num_steps)]
    for step, stage in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 30, max(0.02, 2 - 2 * step / len(steps)))
        losses = answer_losses(model, *draw_batch(tokenizer, rng, stage))
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {len(steps)}: {stage.num_rows} rows, loss {losses.mean():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where model and tokenizer are written")
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters()} parameters, vocabulary {len(tokenizer)}")
    warm_start(model, tokenizer, STAGES, lr=3e-3)
    model.save_pretrained(arguments.directory)
    tokenizer.save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
