"""A prompt as the dataset has it -> the text that the model reads; chats through the tokenizer's template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raygrpo.imports import describe_exception

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raygrpo.config import DataConfig


class BadRow(Exception):
    """What is wrong with one row."""


def render_prompt(prompt: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """The prompt's text, and whether a chat template wrote it."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow("the prompt is empty")
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = _messages(prompt)
    is_chat = not isinstance(prompt, str) or config.system_prompt is not None
    if config.system_prompt is not None:
        if messages[0]["role"] == "system":
            raise BadRow("the prompt has a system message of its own, and data.system_prompt is set too")
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    if config.chat_template_kwargs and not is_chat:
        raise ValueError(
            f"data.chat_template_kwargs ({config.chat_template_kwargs}) is set, but the prompts are plain texts, which "
            "no template renders: give chat messages, or set data.system_prompt"
        )
    text = _apply_template(messages, config, tokenizer) if is_chat else str(prompt)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"the prompt is no valid Unicode: {error.reason}") from None
    return text, is_chat


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """Chat messages, checked. Fields that are None are left out: in columnar files every message has every field."""
    if not isinstance(prompt, list | tuple) or not prompt:
        kind = "an empty list" if prompt == [] else type(prompt).__name__
        raise BadRow(f"the prompt must be a text or a list of chat messages, not {kind}")
    messages = []
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise BadRow(f"a chat message must be {{role, content}}, got {str(message)[:200]}")
        messages.append({key: value for key, value in message.items() if value is not None})
    last = messages[-1]
    if last["role"] == "assistant":
        raise BadRow(
            "the last message is the assistant's, which is for the policy to write: leave it out of the prompt"
        )
    content = last.get("content")
    if not content or (isinstance(content, str) and not content.strip()):
        raise BadRow("the prompt is empty: its last message has no content")
    return messages


def _apply_template(messages: list[dict[str, Any]], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        cause = "data.system_prompt is set" if config.system_prompt is not None else "prompts are chat messages"
        raise ValueError(
            f"{cause}, but the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template: use a model "
            "with one (most '-Instruct' models), put a chat_template.jinja beside the tokenizer, or give plain texts"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
        )
    except Exception as error:  # templates raise what their authors chose, for messages they do not support
        raise BadRow(f"the chat template refuses the prompt: {describe_exception(error)}") from error
    assert isinstance(text, str)
    return text
