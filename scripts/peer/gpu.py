"""Kernels of bitsandbytes and generation by transformers, on a GPU."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from scripts.peer.model import (
    BLOCK_SIZE,
    PACKAGES,
    PROJECTIONS,
    quantize_linears,
    versions,
    why_unavailable,
)

# --- The kernels ---


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


# --- Generation ---


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
