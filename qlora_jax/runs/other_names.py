"""Hints for names of TRL, PEFT and Unsloth, and for ours in another section."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from qlora_jax.runs.config import setting_keys

# Their name -> the key of ours, or a sentence where there is no such setting.
_NAMES = {
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "optim": "train.optimizer",
    "embedding_lr": "train.embedding_learning_rate",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "mask_history": 'Here it is `data.train_on` = "last".',
    "assistant_only_loss": 'Here it is `data.train_on` = "assistant", the default.',
    "train_on_responses_only": 'Here it is `data.train_on` = "assistant", the default, '
    "or, in texts that are rendered already, `data.response_part`.",
    "roles_to_train": "The assistant's turns are trained; `data.answers` chooses some.",
    "train_on_inputs": 'Here it is `data.train_on` = "all".',
    "completion_only_loss": 'Here it is `data.train_on` = "completion", the default.',
    "dataset": "data.path",
    "dataset_name": "data.path",
    "train_file": "data.path",
    "dataset_text_field": 'Here it is `data.text`, e.g. "{body}" for the field `body`.',
    "formatting_func": "Here `data.text`, or `data.prompt` and `data.completion`, are "
    'format strings over the fields of a row, e.g. "Q: {question}\\nA: ".',
    "field_instruction": "Here `data.prompt` and `data.completion` name the fields in "
    'braces, e.g. "{question}".',
    "field_output": "Here `data.prompt` and `data.completion` name the fields in "
    'braces, e.g. "{answer}".',
    "field_messages": "data.messages",
    "type": 'Here it is `data.format`, e.g. "alpaca" or "messages".',
    "chat_template_jinja": "data.chat_template",
    "template": "data.chat_template",
    "mapping": "data.roles",
    "instruction_template": "data.instruction_part",
    "response_template": "data.response_part",
    "per_device_eval_batch_size": "eval.batch_size",
    "eval_steps": "eval.every",
    "eval.steps": "eval.every",
    "logging_steps": "log.every",
    "log.steps": "log.every",
    "save_steps": "checkpoint.every",
    "checkpoint.steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "best_adapter/ of a run has the lowest held-out loss.",
    "trust_remote_code": "No code of a model is ever executed.",
    "hub_token": "HF_TOKEN, or `hf auth login`, gives the token.",
    "push_to_hub": "hub.model_id",
    "hub_model_id": "hub.model_id",
    "hub_private_repo": "hub.private",
    "hub_strategy": "The adapter is published when the run is complete.",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "load_in_4bit": 'Here it is `model.quantization`: "nf4_dq", "nf4" or "none".',
    "load_in_8bit": 'There are 4 bits or none: `model.quantization` = "nf4_dq".',
    "bf16": 'Here it is `model.dtype` = "bfloat16".',
    "fp16": 'Here it is `model.dtype` = "float16".',
    "gradient_checkpointing": "Here it is `model.remat`.",
    "use_gradient_checkpointing": "Here it is `model.remat`.",
    "random_state": "train.seed",
    "dataset_num_proc": "Not needed: `data.cache` keeps the tokens on disk.",
    "eval_strategy": "Here it is `eval.every`, in steps.",
    "evaluation_strategy": "Here it is `eval.every`, in steps.",
    "save_strategy": "Here it is `checkpoint.every`, in steps.",
    "logging_strategy": "Here it is `log.every`, in steps.",
    "peft": "Here it is the table [lora].",
    "peft_config": "Here it is the table [lora].",
    "loftq_config": 'Here it is `lora.init_lora_weights` = "loftq", which has no '
    "further settings.",
    "save_method": "`qlora-jax merge` writes a merged model, in 4 bits with "
    "`--requantize`; adapter/ of a run is the adapter alone.",
    "do_sample": "`qlora-jax generate` samples with a `--temperature` above 0; 0 takes "
    "the most likely token.",
    "warmup_ratio": "Here it is `train.warmup_steps`: a value below 1 is a share.",
    "resume": "The same command continues a run that was stopped.",
    "resume_from_checkpoint": "The same command continues a run that was stopped.",
    "config": "A run file is given without an option: `qlora-jax train run.toml`.",
}
# (key, value of another library) -> what to do.
_VALUES = {
    ("data.format", "sharegpt"): '"messages" reads ShareGPT\'s turns too.',
    ("data.format", "chat"): 'Here it is "messages".',
    ("data.format", "chatml"): 'Here it is "messages".',
    ("data.format", "completion"): 'Here it is "text", or "prompt_completion".',
    **{
        ("train.optimizer", name): 'Here it is "adamw".'
        for name in (
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_hf",
            "paged_adamw_32bit",
        )
    },
    **{
        ("train.optimizer", name): 'Here it is "adamw_8bit".'
        for name in ("adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw")
    },
    ("log.report_to", "none"): "An empty list, [], means no tracker.",
    ("log.report_to", "tensorboard"): 'A list of them: ["tensorboard"].',
    ("log.report_to", "wandb"): 'A list of them: ["wandb"].',
}
_KEY = re.compile(r"`(\w+)\.(\w+)`")


def value_hint(key: str, value: Any) -> str:
    """Returns what another library's value is here, with a space before it, or ""."""
    known = _VALUES.get((key, value)) if isinstance(value, str) else None
    return f" {known}" if known else ""


def option_hint(name: str, options: Collection[str]) -> str:
    """Returns what another library's name is among the options of a command.

    Args:
      name: of an option, without dashes.
      options: those of the command, with dots and "_" ("data.max_length").

    Returns:
      A sentence with a space before it; "" for the command's own and unknown names.
    """
    name = name.replace("-", "_")
    if name in options or name not in _NAMES:
        return ""

    def option(match: re.Match[str]) -> str:
        found = next((n for n in (match[0][1:-1], match[2]) if n in options), None)
        return match[0] if found is None else f"`--{found.replace('_', '-')}`"

    text = _KEY.sub(option, hint(name))
    return (
        text if "`--" in text else text.replace(" Here it is", " In a run file it is")
    )


def hint(name: str) -> str:
    """Returns where a setting is to be found, as a sentence with a space before it.

    Args:
      name: of a setting in another library, or of one of ours without its section;
        behind a section and a dot, if it was given in one.

    Returns:
      "" where the name is known as neither.
    """
    key = name.replace("-", "_")
    name = key.rpartition(".")[2]
    ours = _NAMES.get(key) or _NAMES.get(name, "")
    if " " in ours:
        return f" {ours}"
    keys = [ours] if ours else _keys_of(name)
    return f" Here it is {' or '.join(f'`{key}`' for key in keys)}." if keys else ""


def _keys_of(name: str) -> list[str]:
    """Returns the keys of the settings with a name, in any section."""
    return sorted(key for key in setting_keys() if key.rpartition(".")[2] == name)
