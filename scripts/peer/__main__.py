"""Measures the PyTorch peer: what transformers, PEFT and bitsandbytes take.

    python scripts/peer cpu --dtype bf16 --gradient-checkpointing 1 --steps 3
    python scripts/peer gpu train --size 8b --batch 4 --length 2048
    python scripts/peer gpu train --by unsloth --gradient-checkpointing 1
    python scripts/peer gpu decode --batch 1 --context 1024
    python scripts/peer gpu kernels     # answers `bench_gpu kernels`, line by line
    python scripts/peer gpu train --dry-run     # a narrow model, on any device

It runs in a separate environment without jax, and loads torch only when it
measures:

    pip install torch peft bitsandbytes transformers

`cpu` times one QLoRA training step of a random Llama and measures its memory. Times are
seconds, memory is MiB (2**20 bytes). A step is forward, loss, backward, clip to norm 1,
AdamW, zero_grad. All steps see the same batch of random tokens with every label
supervised, so the losses must start near ln(vocab) and fall: a run whose losses do not
fall measured no training.

* `--quant nf4`: the seven projections of every layer are NF4 with double quantization
  (blocks of 64, absmax blocks of 256); embeddings, norms and lm_head stay plain, as
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
widths that are not multiples of 64 are refused. Its AVX512-BF16 path repacks the stored
weights in eval mode: the model stays in train mode from beginning to end.

`gpu train` times the QLoRA step of a random model of a real one's sizes, as `bench_gpu
model train` does: bf16 base, NF4 linears with double quantization, float32 adapters on
all seven under bf16 autocast, torch's own attention (`sdpa`), the loss over full
logits, clipping, and the optimizer. The norms and the head stay in bf16, which
`peft.prepare_model_for_kbit_training` would make float32 and slower. Rows are whole:
without another library's attention, packed documents would be one row here too. Peaks
are those of torch's allocator during the steps. `--by unsloth` builds the model with
`FastLanguageModel` and its gradient checkpointing, where Unsloth is installed.

`gpu decode` generates with a random Llama of the given sizes: NF4 linears with double
quantization, LoRA on each, bf16. `gpu kernels` times `dequantize_4bit`, `matmul_4bit`
(which picks a kernel by the number of rows), and dequantization and product for
the gradient. Times are replays of a CUDA graph of the calls, between device events
(launches in turn where a call cannot be captured), over weights and results that
together exceed any cache.

The last line on standard output is one JSON object; `gpu kernels` prints one for each
request.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository in place of this folder, whose files have common names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.peer import cpu, gpu, training
from scripts.peer.model import BLOCK_SIZE, PACKAGES, why_unavailable


def add_cpu_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of `cpu`; sizes default to those of `bench cpu`."""
    size = p.add_argument_group("model")
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
    step = p.add_argument_group("step")
    step.add_argument("--batch", type=int, default=4, help="sequences per step")
    step.add_argument("--seq", type=int, default=512, help="tokens per sequence")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    step.add_argument("--quant", choices=("nf4", "none"), default="nf4")
    step.add_argument(
        "--gradient-checkpointing", type=int, choices=(0, 1), default=0, help="0 or 1"
    )
    run = p.add_argument_group("measurement")
    run.add_argument("--steps", type=int, default=3, help="timed steps")
    run.add_argument("--warmup", type=int, default=1, help="untimed steps before")
    run.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    run.add_argument("--seed", type=int, default=0, help="weights and tokens")


# Llama 3.1 8B and Qwen3 8B, by their published config.json.
_8B = {"family": "llama", "hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32}
_8B |= {"kv_heads": 8, "vocab": 128256}
SIZES = {
    "8b": _8B,
    "qwen3-8b": _8B | {"family": "qwen3", "ffn": 12288, "layers": 36, "vocab": 151936},
}
# Of the same architectures, in seconds on a CPU.
NARROW = {
    "hidden": 128,
    "ffn": 192,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 64,
}
FEW = {"context": 20, "tokens": 3, "repeats": 1, "length": 64, "steps": 2}


def add_gpu_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of `gpu`; sizes default to those of `--size`."""
    p.add_argument("part", choices=("kernels", "decode", "train"))
    p.add_argument("--size", choices=tuple(SIZES), default="8b", help="default 8b")
    p.add_argument("--family", choices=("llama", "qwen3"))
    p.add_argument("--hidden", type=int, help="width")
    p.add_argument("--ffn", type=int, help="MLP width")
    p.add_argument("--layers", type=int)
    p.add_argument("--heads", type=int)
    p.add_argument("--kv-heads", type=int)
    p.add_argument("--vocab", type=int)
    p.add_argument("--rank", type=int, default=16, help="LoRA rank")
    p.add_argument("--batch", type=int, help="rows; default 1, in training 4")
    step = p.add_argument_group("decode")
    step.add_argument("--context", type=int, default=1024, help="prompt (tokens)")
    step.add_argument("--tokens", type=int, default=64, help="new tokens timed")
    step.add_argument("--repeats", type=int, default=2, help="generations timed")
    step = p.add_argument_group("train")
    step.add_argument(
        "--by", choices=("transformers", "unsloth"), default="transformers"
    )
    step.add_argument("--length", type=int, default=2048, help="tokens a row")
    step.add_argument("--accumulation", type=int, default=1, help="micro-batches")
    step.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw")
    step.add_argument(
        "--gradient-checkpointing", type=int, choices=(0, 1), default=0, help="0 or 1"
    )
    step.add_argument("--steps", type=int, default=10, help="timed steps")
    step.add_argument("--warmup", type=int, default=2, help="untimed steps before")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument(
        "--dry-run", action="store_true", help="a narrow model, on any device"
    )


def fill_sizes(args: argparse.Namespace) -> None:
    """Sets the sizes that were not given, and those of a dry run."""
    args.batch = args.batch or (4 if args.part == "train" else 1)
    for name, value in SIZES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dry_run:
        vars(args).update(NARROW | FEW)
        args.device = "cpu" if why_unavailable("torch") else "cuda"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        prog="peer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    on_cpu = commands.add_parser("cpu", help="one training step on a CPU")
    add_cpu_options(on_cpu)
    add_gpu_options(commands.add_parser("gpu", help="training and more on a GPU"))
    args = parser.parse_args(argv)
    if args.command == "gpu":
        fill_sizes(args)
        return args
    if args.steps < 1 or args.warmup < 0:
        on_cpu.error(
            f"`--steps` must be >= 1 and `--warmup` >= 0, got {args.steps} and "
            f"{args.warmup}."
        )
    if args.hidden % args.heads or args.heads % args.kv_heads:
        on_cpu.error(
            f"`--heads` ({args.heads}) must divide `--hidden` ({args.hidden}) and be "
            f"a multiple of `--kv-heads` ({args.kv_heads})."
        )
    if args.quant == "nf4" and (args.hidden % BLOCK_SIZE or args.ffn % BLOCK_SIZE):
        on_cpu.error(
            f"`--hidden` ({args.hidden}) and `--ffn` ({args.ffn}) must be multiples of "
            f"{BLOCK_SIZE}: bitsandbytes dequantizes other widths wrongly on CPU. "
            "Change the size or pass `--quant none`."
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = parse_args(argv)
    if args.command == "cpu":
        result = cpu.measure_step(args)
    elif args.part == "kernels":
        return gpu.serve()
    elif reason := why_unavailable(*PACKAGES, on=args.device):
        result = {"unavailable": reason}
    else:
        measure = training.train if args.part == "train" else gpu.decode
        result = measure(args, args.device)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
