"""Measures the PyTorch peer: what transformers, PEFT and bitsandbytes take.

    python scripts/peer.py cpu --dtype bf16 --gradient-checkpointing 1 --steps 3
    python scripts/peer.py gpu decode --batch 1 --context 1024
    python scripts/peer.py gpu kernels     # answers `bench_gpu kernels`, line by line

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
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
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


def versions(*names: str) -> dict[str, str]:
    """Returns the versions of installed packages."""
    return {name: importlib.metadata.version(name) for name in names}


def quantize_linears(
    model: torch.nn.Module, compute_dtype: torch.dtype, device: str
) -> int:
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
                child.weight.data.cpu(),
                requires_grad=False,
                blocksize=BLOCK_SIZE,
                compress_statistics=True,
                quant_type="nf4",
                module=linear,
            )
            setattr(parent, name, linear.to(device))  # moving is what quantizes
            if (
                linear.weight.quant_state is None
                or not linear.weight.quant_state.nested
            ):
                raise RuntimeError(f"`{name}` was not quantized with double quant.")
            count += 1
    return count


# --- The training step on a CPU ---


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


# --- The kernels on a GPU ---


def prepare(request: dict[str, Any], device: str) -> Callable[[int], Any]:
    """Returns call(i) for a request, over its copies in turn."""
    import bitsandbytes as bnb
    import torch

    out_features, in_features = request["shape"]
    options = {"device": device, "dtype": torch.bfloat16}
    packed = []
    for _ in range(request["copies"]):
        weight = torch.randn(out_features, in_features, **options) * 0.02
        packed.append(
            bnb.functional.quantize_4bit(
                weight,
                blocksize=BLOCK_SIZE,
                quant_type="nf4",
                compress_statistics=request["double_quant"],
            )
        )
    dequantize = bnb.functional.dequantize_4bit
    kind, rows = request["kind"], request["rows"]
    if kind == "dequantize":
        return lambda i: dequantize(*packed[i % len(packed)])
    if kind == "matmul":
        x = torch.randn(rows, in_features, **options)

        def product(i: int) -> Any:
            codes, state = packed[i % len(packed)]
            return bnb.matmul_4bit(x, codes.t(), quant_state=state)

        return product
    dy = torch.randn(rows, out_features, **options)
    return lambda i: dy @ dequantize(*packed[i % len(packed)])


def measure_calls(
    call: Callable[[int], Any], copies: int, traces: int
) -> dict[str, Any]:
    """Times the calls on the GPU; the keys are those of bench_gpu's timing.py."""
    import torch

    def time_events(run: Callable[[], Any], calls: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) * 1e3 / calls

    def launch() -> list[Any]:
        return [call(i) for i in range(copies)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm: nothing is set up while capturing
        launch()
    torch.cuda.synchronize()
    by_launch = statistics.median(time_events(launch, copies) for _ in range(3))
    method, run = "launches", launch
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = launch()  # kept: the graph writes into their memory
        method, run = "graph", graph.replay
        time_events(run, copies)
    except RuntimeError:
        results = []
    times = [
        statistics.median(time_events(run, copies) for _ in range(5))
        for _ in range(traces)
    ]
    del results
    middle = statistics.median(times)
    return {
        "device_us": middle,
        "spread": (max(times) - min(times)) / middle,
        "call_us": by_launch,
        "calls": copies,
        "method": method,
    }


def serve() -> int:
    """Answers requests until standard input ends; 1 without the GPU or the library."""
    out = os.fdopen(os.dup(1), "w")  # what a library prints stays out of the answers
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    if reason := why_unavailable("torch", "bitsandbytes"):
        say({"error": reason})
        return 1
    import torch

    peer = ", ".join(f"{k} {v}" for k, v in versions("torch", "bitsandbytes").items())
    say({"device": torch.cuda.get_device_name(), "peer": peer})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            call = prepare(request, "cuda")
            timing = measure_calls(call, request["copies"], request["traces"])
            answer: dict[str, Any] = {"timing": timing}
        except Exception as error:  # reported for this row; the next is still tried
            answer = {"failed": f"{type(error).__name__}: {error}"[:1000]}
        say(answer)
    return 0


def why_unavailable(*names: str) -> str | None:
    """Says which package or GPU is missing; None if nothing is."""
    try:
        for name in names:
            importlib.import_module(name)
    except Exception as error:  # a library that cannot be loaded raises what it likes
        return f"{type(error).__name__}: {error}"[:500]
    import torch

    return None if torch.cuda.is_available() else "torch finds no GPU"


# --- Generation on a GPU ---


def build_for_decoding(args: argparse.Namespace, device: str) -> Any:
    """Builds the random model with NF4 linears and adapters on the device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=131072,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    quantize_linears(model, torch.bfloat16, device)
    model.is_loaded_in_4bit = True  # PEFT checks it before it wraps Linear4bit
    lora = LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules=list(PROJECTIONS)
    )
    return get_peft_model(model, lora).to(device).eval()


def decode(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Times greedy generation, as `bench_gpu model decode` does."""
    import torch

    model = build_for_decoding(args, device)
    generator = torch.Generator().manual_seed(0)
    size = (args.batch, args.context)
    prompts = torch.randint(0, args.vocab, size, generator=generator).to(device)
    seconds: dict[int, list[float]] = {}
    for new in (1, 1 + args.tokens):
        for _ in range(1 + args.repeats):
            started = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    input_ids=prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                )
            out.tolist()  # waits for the device
            seconds.setdefault(new, []).append(time.perf_counter() - started)
            if out.shape[1] != args.context + new:
                raise RuntimeError(f"generated {out.shape[1] - args.context} of {new}")
    prefill, total = (min(times[1:]) for times in seconds.values())
    return {
        "tokens_per_s": args.batch * args.tokens / (total - prefill),
        "ms_per_step": 1e3 * (total - prefill) / args.tokens,
        "prefill_ms": 1e3 * prefill,
        "seconds": list(seconds.values()),
        "versions": versions(*PACKAGES),
    }


# --- The command line ---


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


def add_gpu_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of `gpu`; sizes default to Llama 3.1 8B."""
    p.add_argument("part", choices=("kernels", "decode"))
    p.add_argument("--hidden", type=int, default=4096, help="width")
    p.add_argument("--ffn", type=int, default=14336, help="MLP width")
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--heads", type=int, default=32)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--vocab", type=int, default=128256)
    p.add_argument("--rank", type=int, default=16, help="LoRA rank")
    p.add_argument("--batch", type=int, default=1, help="rows")
    p.add_argument("--context", type=int, default=1024, help="prompt (tokens)")
    p.add_argument("--tokens", type=int, default=64, help="new tokens timed")
    p.add_argument("--repeats", type=int, default=2, help="generations timed")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="one training step on a CPU")
    add_cpu_options(cpu)
    add_gpu_options(commands.add_parser("gpu", help="kernels and generation on a GPU"))
    args = parser.parse_args(argv)
    if args.command == "gpu":
        return args
    if args.steps < 1 or args.warmup < 0:
        cpu.error(
            f"`--steps` must be >= 1 and `--warmup` >= 0, got {args.steps} and "
            f"{args.warmup}."
        )
    if args.hidden % args.heads or args.heads % args.kv_heads:
        cpu.error(
            f"`--heads` ({args.heads}) must divide `--hidden` ({args.hidden}) and be "
            f"a multiple of `--kv-heads` ({args.kv_heads})."
        )
    if args.quant == "nf4" and (args.hidden % BLOCK_SIZE or args.ffn % BLOCK_SIZE):
        cpu.error(
            f"`--hidden` ({args.hidden}) and `--ffn` ({args.ffn}) must be multiples of "
            f"{BLOCK_SIZE}: bitsandbytes dequantizes other widths wrongly on CPU. "
            "Change the size or pass `--quant none`."
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = parse_args(argv)
    if args.command == "cpu":
        result = measure_step(args)
    elif args.part == "kernels":
        return serve()
    elif reason := why_unavailable(*PACKAGES):
        result = {"unavailable": reason}
    else:
        result = decode(args, "cuda")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
