"""Measure one QLoRA training step of the PyTorch peer stack on CPU.

The peer is what most people run today: transformers' Llama, bitsandbytes NF4 linears,
PEFT LoRA adapters, torch AdamW. This program times it, and weighs it, on a random model
so that `qlora-jax` has a number to beat on the same machine. It needs torch, peft,
bitsandbytes and transformers, and never jax; keep them in an environment of their own:

    pip install torch peft bitsandbytes transformers
    python scripts/peer_step.py --dtype bf16 --gradient-checkpointing 1 --steps 3

One JSON object goes to stdout (everything else to stderr). Times are seconds, memory is
MiB (2**20 bytes). A step is forward, loss, backward, clip to norm 1, AdamW, zero_grad.
All steps see the same batch of random tokens with every label supervised, so the losses
must start near ln(vocab) and fall: a run whose losses do not fall measured no training.

What is measured:
* `--quant nf4`: the seven projections of every layer are NF4 with double quant (blocks
  of 64, absmax blocks of 256); embeddings, norms and lm_head stay plain, as
  `BitsAndBytesConfig` leaves them. `--quant none`: LoRA on plain frozen weights.
* `--dtype fp32`: everything fp32. `--dtype bf16`: base in bf16, bf16 autocast, and fp32
  adapters (PEFT's `autocast_adapter_dtype`).
* `--gradient-checkpointing 1`: every decoder layer recomputed in the backward pass, the
  default of TRL's SFTTrainer; 0 is the default of plain PEFT.
* The loss is transformers' own, over the full fp32 logits of all positions at once; a
  trainer that computes head and loss in chunks peaks lower at a large vocabulary.
* `peak_step_mib` is the high-water mark of resident memory since the model was built:
  `VmHWM` is reset between building and the first step, so building does not count.

bitsandbytes 0.50.2 has two CPU faults that would spoil a comparison. Its AVX-512
dequantize reads wrong block scales when in_features is a multiple of 16 but not of 64:
widths that are no multiple of 64 are refused. Its AVX512-BF16 path repacks the stored
weights in eval mode: the model stays in train mode from beginning to end.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
BLOCK_SIZE = 64
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; sizes default to the project's CPU benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_argument_group("model")
    size.add_argument("--hidden", type=int, default=512, help="hidden size")
    size.add_argument("--ffn", type=int, default=1408, help="MLP inner size")
    size.add_argument("--layers", type=int, default=8, help="decoder layers")
    size.add_argument("--heads", type=int, default=8, help="query heads")
    size.add_argument("--kv-heads", type=int, default=4, help="key/value heads")
    size.add_argument("--vocab", type=int, default=32000, help="vocabulary (tokens)")
    size.add_argument(
        "--rank", type=int, default=16, help="LoRA rank; alpha is set to 16"
    )
    size.add_argument("--dora", type=int, choices=(0, 1), default=0, help="0 or 1")
    step = parser.add_argument_group("step")
    step.add_argument("--batch", type=int, default=4, help="sequences per step")
    step.add_argument("--seq", type=int, default=512, help="tokens per sequence")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    step.add_argument("--quant", choices=("nf4", "none"), default="nf4")
    step.add_argument(
        "--gradient-checkpointing", type=int, choices=(0, 1), default=0, help="0 or 1"
    )
    run = parser.add_argument_group("measurement")
    run.add_argument("--steps", type=int, default=3, help="timed steps")
    run.add_argument("--warmup", type=int, default=1, help="untimed steps before")
    run.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    run.add_argument("--seed", type=int, default=0, help="weights and tokens")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.warmup < 0:
        parser.error(
            f"`--steps` must be >= 1 and `--warmup` >= 0, got {args.steps} and "
            f"{args.warmup}."
        )
    if args.hidden % args.heads or args.heads % args.kv_heads:
        parser.error(
            f"`--heads` ({args.heads}) must divide `--hidden` ({args.hidden}) and be "
            f"a multiple of `--kv-heads` ({args.kv_heads})."
        )
    if args.quant == "nf4" and (args.hidden % BLOCK_SIZE or args.ffn % BLOCK_SIZE):
        parser.error(
            f"`--hidden` ({args.hidden}) and `--ffn` ({args.ffn}) must be multiples of "
            f"{BLOCK_SIZE}: bitsandbytes dequantizes other widths wrongly on CPU. "
            "Change the size or pass `--quant none`."
        )
    return args


def memory_mib(field: str) -> float:
    """Returns `VmRSS` (now) or `VmHWM` (peak) of this process in MiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no `{field}`; this program needs Linux.")


def reset_peak_memory() -> None:
    """Sets `VmHWM` back to the resident memory of this moment."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
        refs.write("5")
    peak, now = memory_mib("VmHWM"), memory_mib("VmRSS")
    if peak > now + 16:
        raise RuntimeError(
            f"`VmHWM` is {peak:.0f} MiB with {now:.0f} MiB resident: this kernel did "
            "not reset it, so the peak of the steps cannot be told from the build's."
        )


def quantize_linears(model: torch.nn.Module, compute_dtype: torch.dtype) -> int:
    """Replaces the projections by double-quantized NF4 linears; returns how many."""
    import bitsandbytes as bnb
    import torch

    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name not in PROJECTIONS or not isinstance(child, torch.nn.Linear):
                continue
            linear = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=compute_dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            linear.weight = bnb.nn.Params4bit(
                child.weight.data,
                requires_grad=False,
                blocksize=BLOCK_SIZE,
                compress_statistics=True,
                quant_type="nf4",
                module=linear,
            )
            setattr(parent, name, linear.to("cpu"))  # moving is what quantizes
            if (
                linear.weight.quant_state is None
                or not linear.weight.quant_state.nested
            ):
                raise RuntimeError(f"`{name}` was not quantized with double quant.")
            count += 1
    return count


def build_model(args: argparse.Namespace) -> torch.nn.Module:
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
        count = quantize_linears(model, dtype)
        expected = len(PROJECTIONS) * args.layers
        if count != expected:
            raise RuntimeError(f"quantized {count} linears, expected {expected}.")
        model.is_loaded_in_4bit = True  # what PEFT asks before it wraps Linear4bit
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
        raise RuntimeError(f"adapters should be fp32, found {sorted(map(str, wrong))}.")
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Builds, trains and returns the record that `main` prints."""
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
    model = build_model(args)
    build_s = time.perf_counter() - start
    gc.collect()
    rss_built = memory_mib("VmRSS")
    reset_peak_memory()
    walls, cpus, losses = train_steps(model, args)
    peak = memory_mib("VmHWM")

    timed, timed_cpu = walls[args.warmup :], cpus[args.warmup :]
    median = statistics.median(timed)
    tokens_per_step = args.batch * args.seq
    return {
        "program": "peer_step",
        "config": vars(args),
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
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main(argv: list[str] | None = None) -> int:
    """Command-line entry: prints one JSON object."""
    json.dump(measure(parse_args(argv)), sys.stdout)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
