"""Fields of adapter_config.json that PEFT passes over or that need a reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Methods that describe only how the factors started -> the `init_lora_weights` that
# uses them.
_STARTS = {"corda_config": "corda", "lora_ga_config": "lora_ga"}
# What starts from the weights of the base and subtracts itself from them.
_CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga")


def passed_over(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Takes out the fields of a Llama's adapter that PEFT reads and does not use.

    Args:
      raw: content of adapter_config.json.

    Returns:
      The other fields, and a note on each one that is set.
    """
    out, notes = dict(raw), []
    if raw.get("fan_in_fan_out") is True:
        notes.append(
            "`fan_in_fan_out`=True: PEFT sets it to false for the linear layers of a "
            "Llama"
        )
        out["fan_in_fan_out"] = False
    if raw.get("runtime_config"):
        notes.append(
            f"`runtime_config`={raw['runtime_config']!r:.80}: PEFT ignores it in a file"
        )
        out["runtime_config"] = None
    start = raw.get("init_lora_weights", True)
    for name, method in _STARTS.items():
        if raw.get(name) and not str(start).startswith(method):
            notes.append(
                f"`{name}`={raw[name]!r:.80}: `init_lora_weights` is {start!r:.80}"
            )
            out[name] = None
    task = raw.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        notes.append(
            f"`task_type`={task!r:.80}: the adapter is used in a causal language model"
        )
    return out, notes


def other_method(raw: Mapping[str, Any]) -> str:
    """Returns what to do with an adapter of another method than LoRA; may be "".

    Args:
      raw: content of adapter_config.json.
    """
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        return ""
    rows = ""
    if kind == "TRAINABLE_TOKENS":
        rows = (
            " This one is rows of an embedding without low-rank updates "
            f"(`token_indices`={raw.get('token_indices')!r:.80}). Such rows are read, "
            "and trained, as a part of a LoRA adapter (`trainable_token_indices`)."
        )
    return (
        f"{rows} Where PEFT can merge it into its base (`merge_and_unload()`), the "
        "merged model is read."
    )


def start_reason(init: Any) -> str:
    """Returns why an adapter with this `init_lora_weights` cannot be read."""
    if str(init).startswith(_CONVERTIBLE):
        return (
            "it was trained on a changed base; save it with PEFT's "
            "`path_initial_model_for_weight_conversion`, which makes a plain LoRA of it"
        )
    if init == "loftq":
        return (
            "it was trained on a base that LoftQ changed. If the base that was saved "
            "with it is used, as in PEFT's LoftQ example, write true instead"
        )
    return (
        "no PEFT has this initialization. It only says how training started: write "
        "true if the base was left as it is"
    )
