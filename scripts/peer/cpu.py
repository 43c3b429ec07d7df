"""The training step of transformers, PEFT and bitsandbytes on a CPU."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import time
import warnings
from typing import TYPE_CHECKING, Any

from scripts.peer.model import PACKAGES, PROJECTIONS, quantize_linears, versions

if TYPE_CHECKING:
    import torch


def memory_mib(field: str) -> float:
    """Returns `VmRSS` (now) or `VmHWM` (peak) of this process in MiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no `{field}`; this program needs Linux.")


def reset_peak_memory() -> None:
    """Sets `VmHWM` back to the present resident memory."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
        refs.write("5")
    peak, now = memory_mib("VmHWM"), memory_mib("VmRSS")
    if peak > now + 16:
        raise RuntimeError(
            f"`VmHWM` is {peak:.0f} MiB with {now:.0f} MiB resident: this kernel did "
            "not reset it, so the peak of the steps is unknown."
        )


def build_for_training(args: argparse.Namespace) -> torch.nn.Module:
    """Builds the random Llama, quantizes it, adds the adapters; in train mode."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=args.seq,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.train()
    model.requires_grad_(False)
    if args.quant == "nf4":
        count = quantize_linears(model, dtype, "cpu")
        expected = len(PROJECTIONS) * args.layers
        if count != expected:
            raise RuntimeError(f"quantized {count} linears, expected {expected}.")
        model.is_loaded_in_4bit = True  # PEFT checks it before it wraps Linear4bit
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=list(PROJECTIONS),
        use_dora=bool(args.dora),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    model.train()
    wrong = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32}
    if wrong:
        raise RuntimeError(f"adapters should be fp32, got {sorted(map(str, wrong))}.")
    return model


def train_steps(
    model: torch.nn.Module, args: argparse.Namespace
) -> tuple[list[float], list[float], list[float]]:
    """Runs warmup + timed steps; returns (wall s, CPU s, loss) of every step."""
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.randint(0, args.vocab, (args.batch, args.seq), generator=generator)
    labels = tokens.clone()
    walls, cpus, losses = [], [], []
    for _ in range(args.warmup + args.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return walls, cpus, losses


def measure_step(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the model and trains it; returns times, memory and losses."""
    # bitsandbytes' own OpenMP pool reads the variable when its library is loaded
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # renames due in transformers 6
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    load_before = os.getloadavg()[0]

    gc.collect()
    rss_imported = memory_mib("VmRSS")
    start = time.perf_counter()
    model = build_for_training(args)
    build_s = time.perf_counter() - start
    gc.collect()
    rss_built = memory_mib("VmRSS")
    reset_peak_memory()
    walls, cpus, losses = train_steps(model, args)
    peak = memory_mib("VmHWM")

    timed, timed_cpu = walls[args.warmup :], cpus[args.warmup :]
    median = statistics.median(timed)
    tokens_per_step = args.batch * args.seq
    options = {k: v for k, v in vars(args).items() if k != "command"}
    return {
        "program": "peer cpu",
        "config": options,
        "step_s": [round(t, 4) for t in timed],
        "step_median_s": round(median, 4),
        "step_min_s": round(min(timed), 4),
        "tokens_per_s_median": round(tokens_per_step / median, 1),
        "tokens_per_s_best": round(tokens_per_step / min(timed), 1),
        "first_step_s": round(walls[0], 4),
        "compile_s": 0.0,  # eager mode: nothing is compiled
        "build_s": round(build_s, 3),
        "cpu_s_per_step": round(statistics.median(timed_cpu), 3),
        "utilisation": round(sum(timed_cpu) / (args.threads * sum(timed)), 3),
        "load_average_before": round(load_before, 2),
        "rss_before_build_mib": round(rss_imported, 1),
        "rss_built_mib": round(rss_built, 1),
        "peak_step_mib": round(peak, 1),
        "growth_from_before_build_mib": round(peak - rss_imported, 1),
        "growth_from_built_mib": round(peak - rss_built, 1),
        "losses": [round(value, 5) for value in losses],
        "trainable_parameters": sum(
            p.numel() for p in model.parameters() if p.requires_grad
        ),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version()} | versions(*PACKAGES),
    }
