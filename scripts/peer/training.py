"""The training step of transformers, PEFT and bitsandbytes, or of Unsloth, on a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.peer.model import PACKAGES, PROJECTIONS, quantize_linears, versions

if TYPE_CHECKING:
    import torch


def make_config(args: argparse.Namespace, dtype: str | None = None) -> Any:
    """Returns the configuration of the model in transformers."""
    from transformers import LlamaConfig, Qwen3Config

    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[args.family]
    return kind(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        vocab_size=args.vocab,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
        **({"dtype": dtype} if dtype else {}),
    )


def build_base(args: argparse.Namespace, device: str) -> torch.nn.Module:
    """Builds the random frozen model in bf16 with its projections in NF4."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(make_config(args))
    finally:
        torch.set_default_dtype(default)
    model = model.to(torch.bfloat16)
    model.train()
    model.requires_grad_(False)
    count = quantize_linears(model, torch.bfloat16, device)
    if count != len(PROJECTIONS) * args.layers:
        raise RuntimeError(f"quantized {count} linears of {args.layers} layers.")
    model.is_loaded_in_4bit = True  # PEFT checks it before it wraps Linear4bit
    return model


def build_peft(args: argparse.Namespace, device: str) -> torch.nn.Module:
    """Builds the model of transformers with PEFT's adapters, float32, in train mode."""
    from peft import LoraConfig, get_peft_model

    model = build_base(args, device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank,
        lora_dropout=0.0,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora).to(device)
    model.train()
    return model


def build_unsloth(args: argparse.Namespace, device: str) -> torch.nn.Module:
    """Builds the same model with Unsloth, which loads it from a directory."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with torch.device(device):
            config = make_config(args, "bfloat16")
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        words = WordLevel({"<unk>": 0}, unk_token="<unk>")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), unk_token="<unk>", pad_token="<unk>"
        )
        tokenizer.save_pretrained(folder)
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            str(Path(folder)),
            max_seq_length=args.length,
            dtype=torch.bfloat16,
            load_in_4bit=True,
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=args.rank,
        lora_dropout=0,
        bias="none",
        target_modules=list(PROJECTIONS),
        use_gradient_checkpointing="unsloth" if args.gradient_checkpointing else False,
    )


def make_optimizer(name: str, trainable: list[Any]) -> torch.optim.Optimizer:
    """Returns AdamW of torch, or of bitsandbytes with a state of 8 bits."""
    import torch

    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0}
    if name == "adamw_8bit":
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(trainable, **options)
    return torch.optim.AdamW(trainable, fused=True, **options)


def train_steps(
    model: torch.nn.Module, args: argparse.Namespace, device: str
) -> tuple[list[float], list[float]]:
    """Trains on random tokens; returns the seconds and the loss of every step."""
    import torch

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(args.optimizer, trainable)
    generator = torch.Generator().manual_seed(0)
    size = (2, args.accumulation, args.batch, args.length)
    tokens = torch.randint(0, args.vocab, size, generator=generator).to(device)
    seconds, losses = [], []
    for _, rows in zip(
        range(args.warmup + args.steps), itertools.cycle(tokens), strict=False
    ):
        wait()
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for row in rows:
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=row, labels=row, use_cache=False).loss
            (loss / args.accumulation).backward()
            total += loss.detach() / args.accumulation
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item())
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds, losses


def train(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Times training steps; the keys are those of `bench_gpu model train`."""
    if args.by == "unsloth" and importlib.util.find_spec("unsloth") is None:
        return {"unavailable": "unsloth is not installed"}
    packages = [*PACKAGES]
    if args.by == "unsloth":  # before transformers, which it changes
        import unsloth  # noqa: F401

        packages.append("unsloth")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    build = build_unsloth if args.by == "unsloth" else build_peft
    started = time.perf_counter()
    model = build(args, device)
    build_s = time.perf_counter() - started
    peaks: dict[str, int | None] = {"peak_bytes": None, "reserved_bytes": None}
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()  # of the steps, not of building
    seconds, losses = train_steps(model, args, device)
    if device != "cpu":
        peaks["peak_bytes"] = torch.cuda.max_memory_allocated()
        peaks["reserved_bytes"] = torch.cuda.max_memory_reserved()
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"the losses are {losses}")
    middle = statistics.median(seconds[args.warmup :])
    return {
        "tokens_per_s": args.batch * args.accumulation * args.length / middle,
        "step_s": middle,
        "seconds": seconds,
        "losses": losses,
        "build_s": build_s,
        **peaks,
        "trainable_parameters": sum(
            p.numel() for p in model.parameters() if p.requires_grad
        ),
        "options": {k: v for k, v in vars(args).items() if k != "command"},
        "versions": versions(*packages),
    }
