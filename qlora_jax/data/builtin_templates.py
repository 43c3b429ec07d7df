"""Chat templates that come with this library, by name."""

from pathlib import Path
from typing import Any

_DIRECTORY = Path(__file__).with_name("templates")
# The special tokens that each template writes. The others write ordinary text, and
# BOS and EOS of the tokenizer.
_TOKENS = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "vicuna": (),
    "zephyr": (),
}
_ENDS_WITH_EOS = ("alpaca", "mistral", "vicuna", "zephyr")
BUILTIN_TEMPLATES = tuple(_TOKENS)
"""Names that `data.chat_template` may have instead of a path."""


def template_file(name: str) -> Path:
    """Returns the file of a chat template: one that is built in, or that of a path."""
    return _DIRECTORY / f"{name}.jinja" if name in _TOKENS else Path(name)


def template_note(name: str, tokenizer: Any) -> str | None:
    """Says which tokens a built-in template needs and a tokenizer lacks, if any.

    Args:
      name: of the template, or a path, of which nothing is known.
      tokenizer: a `transformers` tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in _TOKENS.get(name, ()) if token not in vocabulary]
    if missing:
        added = " ".join(f"'{token}'" for token in missing)
        return (
            f"the chat template {name} ends and begins turns with special tokens that "
            f"this tokenizer does not have ({', '.join(missing)}), so each is written "
            "as several tokens of text. Add them to the model with `qlora-jax tokens "
            f"MODEL --add {added} --output-dir NEW` and train their rows "
            "(`lora.trainable_token_indices`), or take a template of ordinary text "
            "(alpaca, vicuna, zephyr)."
        )
    if name in _ENDS_WITH_EOS and getattr(tokenizer, "eos_token", None) is None:
        return (
            f"the chat template {name} ends an answer with the tokenizer's EOS, and "
            "this tokenizer has none, so that the model does not learn to stop. Set "
            "its `eos_token`."
        )
    return None
