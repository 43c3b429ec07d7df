"""bitsandbytes and transformers on a GPU, as yardsticks of the GPU benchmarks.

    python scripts/peer_gpu.py kernels    # answers bench_kernels.py, line by line
    python scripts/peer_gpu.py decode --batch 1 --context 1024

Needs torch with CUDA, bitsandbytes and, for `decode`, transformers and PEFT; never jax.

`kernels` answers the requests of scripts/bench_kernels.py at the same sizes:
`dequantize_4bit`, `matmul_4bit` (which picks its own kernel by the number of rows), and
dequantization and product for the gradient. Times are replays of a CUDA graph of the
calls, between device events (launches in turn where a call cannot be captured), over
weights and results that together exceed any cache.

`decode` generates with a random Llama of the sizes given: NF4 linears with double
quantization, LoRA on each, bf16. One JSON object is the last line of output.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
PROJECTIONS += ("down_proj",)


def prepare(request: dict[str, Any], device: str) -> Callable[[int], Any]:
    """Returns call(i) for a request, over its copies in turn."""
    import bitsandbytes as bnb
    import torch

    out_features, in_features = request["shape"]
    make = {"device": device, "dtype": torch.bfloat16}
    packed = []
    for _ in range(request["copies"]):
        weight = torch.randn(out_features, in_features, **make) * 0.02
        packed.append(
            bnb.functional.quantize_4bit(
                weight,
                blocksize=64,
                quant_type="nf4",
                compress_statistics=request["double_quant"],
            )
        )
    dequantize = bnb.functional.dequantize_4bit
    kind, rows = request["kind"], request["rows"]
    if kind == "dequantize":
        return lambda i: dequantize(*packed[i % len(packed)])
    if kind == "matmul":
        x = torch.randn(rows, in_features, **make)

        def product(i: int) -> Any:
            codes, state = packed[i % len(packed)]
            return bnb.matmul_4bit(x, codes.t(), quant_state=state)

        return product
    dy = torch.randn(rows, out_features, **make)
    return lambda i: dy @ dequantize(*packed[i % len(packed)])


def measure(call: Callable[[int], Any], copies: int, traces: int) -> dict[str, Any]:
    """Times the calls on the GPU; as `measure` of time_kernels.py."""
    import torch

    def events(run: Callable[[], Any], calls: int) -> float:
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
    by_launch = statistics.median(events(launch, copies) for _ in range(3))
    method, run = "launches", launch
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = launch()
        method, run = "graph", graph.replay
        events(run, copies)
    except RuntimeError:
        held = []
    times = [
        statistics.median(events(run, copies) for _ in range(5)) for _ in range(traces)
    ]
    del held
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

    if missing := absent("torch", "bitsandbytes"):
        say({"error": missing})
        return 1
    import torch

    peer = ", ".join(f"{k} {v}" for k, v in versions("torch", "bitsandbytes").items())
    say({"device": torch.cuda.get_device_name(), "peer": peer})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            call = prepare(request, "cuda")
            found = {"timing": measure(call, request["copies"], request["traces"])}
        except Exception as error:  # said of this row, and the next one is tried
            found = {"failed": f"{type(error).__name__}: {error}"[:1000]}
        say(found)
    return 0


def build(args: argparse.Namespace, device: str) -> Any:
    """Makes the random model with NF4 linears and adapters on the device."""
    import bitsandbytes as bnb
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
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name not in PROJECTIONS:
                continue
            linear = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            linear.weight = bnb.nn.Params4bit(
                child.weight.data.cpu(),  # moving it to the device is what quantizes
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=linear,
            )
            setattr(parent, name, linear.to(device))
    model.is_loaded_in_4bit = True  # what PEFT asks before it wraps Linear4bit
    lora = LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules=list(PROJECTIONS)
    )
    return get_peft_model(model, lora).to(device).eval()


def decode(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Times greedy generation; as `decode` of bench_gpu.py."""
    import torch

    model = build(args, device)
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
    prefill, whole = (min(times[1:]) for times in seconds.values())
    return {
        "tokens_per_s": args.batch * args.tokens / (whole - prefill),
        "ms_per_step": 1e3 * (whole - prefill) / args.tokens,
        "prefill_ms": 1e3 * prefill,
        "seconds": list(seconds.values()),
        "versions": versions("torch", "transformers", "peft", "bitsandbytes"),
    }


def absent(*names: str) -> str | None:
    """Says what is not there of some packages and the GPU; None if all is."""
    try:
        for name in names:
            importlib.import_module(name)
    except Exception as error:  # a library that cannot be loaded raises what it likes
        return f"{type(error).__name__}: {error}"[:500]
    import torch

    return None if torch.cuda.is_available() else "torch finds no GPU"


def versions(*names: str) -> dict[str, str]:
    """Versions of installed packages."""
    return {name: importlib.metadata.version(name) for name in names}


def parser() -> argparse.ArgumentParser:
    """Builds the command line; sizes default to Llama 3.1 8B."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("command", choices=("kernels", "decode"))
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
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    args = parser().parse_args(argv)
    if args.command == "kernels":
        return serve()
    if missing := absent("torch", "bitsandbytes", "transformers", "peft"):
        print(json.dumps({"unavailable": missing}))
        return 0
    print(json.dumps(decode(args, "cuda")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
