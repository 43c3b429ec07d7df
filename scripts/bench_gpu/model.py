r"""Measures decoding and training speed of a QLoRA model on this machine's GPU.

    python scripts/bench_gpu model decode --size 8b --batch 1 --context 1024
    python scripts/bench_gpu model train --size 8b --batch 4 --length 2048 --remat full
    python scripts/bench_gpu model train --length 262144 --remat offload --steps 1
    python scripts/bench_gpu model train --size qwen3-8b --batch 2 --accumulation 4 \
        --optimizer adamw_8bit --packed --attention pallas
    python scripts/bench_gpu model train --checkpoint path/to/hf-llama --length 512

Random weights of a real model's sizes are made on the device (`--size`; NF4 with double
quantization, LoRA on every projection), so no checkpoint is needed; `--checkpoint`
trains a real one on the README's text. One JSON object is the last line of output.

`decode`: tokens/s after the prefill, as the time of a generation of 1 + `--tokens` new
tokens less that of one; best of `--repeats`. The floor is the packed weights and the
output head read once a step at the bandwidth of `COPY`.

`train`: the step of a run, planned and compiled before the weights are placed on the
device; the median step after the first, and the peak of memory with the planned one (as
the allocator counts, so without the CUDA context). MFU counts what the mathematics
needs: 4 operations a frozen weight and token (no gradient of it is taken), 6 a trained
one, attention forward 1 and backward 2.5 times; recomputation counts as time, not as
work.

Without a GPU it prints why and ends with 1: these figures mean nothing elsewhere.
`--dry-run` runs the same code there on a model of two narrow layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
from convert.tokenizer import load_tokenizer
from pallas_kernels.nf4 import shapes
from qlora_jax import nf4
from qlora_jax import tree as trees
from qlora_jax.choices import LoraProducts
from qlora_jax.errors import UserError
from qlora_jax.inference.decode import generate_tokens
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.params import tree_bytes, tree_size
from qlora_jax.models.sharding import put_base
from qlora_jax.planning.estimate import abstract_base
from qlora_jax.runs.compiled_step import StepInputs, compile_step
from qlora_jax.runs.config import ModelConfig
from qlora_jax.runs.environment import versions
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.step import init_state
from scripts.bench_gpu.worker import ROOT

# Device -> bytes/s that a large copy reaches, read and written: of an H200 a copy of
# 8.6 GB by PyTorch, measured; of an H100 (SXM) the best published kernel, Liger's
# SwiGLU. Both are 0.90 of the data sheet.
COPY = {"NVIDIA H200": 4.3e12, "NVIDIA H100 80GB HBM3": 3.0e12}
# Device -> bf16 operations/s of NVIDIA's data sheets of the SXM modules, dense.
PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}

_QWEN3 = {
    "model_type": "qwen3",
    **{"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8},
    **{"rope_theta": 1e6, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6},
}
# Sizes -> config.json, of the published models.
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: model.hf_config for name, model in shapes.MODELS.items()},
    "qwen3-0.6b": {
        **_QWEN3,
        **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "tie_word_embeddings": True},
    },
    "qwen3-1.7b": {
        **_QWEN3,
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "tie_word_embeddings": True},
    },
    "qwen3-8b": {
        **_QWEN3,
        **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "tie_word_embeddings": False},
    },
}
# Of the same architecture, in a second on a CPU.
_NARROW = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "vocab_size": 128,
}


def config_of(size: str, *, narrow: bool = False) -> LlamaConfig:
    """Returns the configuration of a model in `CONFIGS`, or of a narrow one like it."""
    return LlamaConfig.from_hf(CONFIGS[size] | (_NARROW if narrow else {}))


def random_base(
    config: LlamaConfig, seed: int = 0, *, quantize_lm_head: bool = False
) -> Any:
    """Makes a base on the device, projections in NF4 with weights around 0.03."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 64)
    base: dict[str, Any] = {}
    shapes = abstract_base(
        config,
        quantization="nf4_dq",
        quantize_lm_head=quantize_lm_head,
        dtype="bfloat16",
    )
    for key, (path, leaf) in zip(keys, trees.walk(shapes), strict=False):
        first, second = jax.random.split(key)
        if isinstance(leaf, nf4.NF4Tensor):
            value: Any = dataclasses.replace(
                leaf,
                codes=jax.random.bits(first, leaf.codes.shape, jnp.uint8),
                absmax=jax.random.bits(second, leaf.absmax.shape, jnp.uint8),
                nested_absmax=jnp.full(leaf.nested_absmax.shape, 0.01, jnp.float32),
                nested_offset=jnp.full(leaf.nested_offset.shape, 0.05, jnp.float32),
                nested_quant_map=jnp.broadcast_to(
                    jnp.asarray(nf4.DYNAMIC_MAP), leaf.nested_quant_map.shape
                ),
            )
        elif "norm" in path[-2]:
            value = jnp.ones(leaf.shape, jnp.bfloat16)
        else:
            value = jax.random.normal(first, leaf.shape, jnp.bfloat16)
            value = value * jnp.bfloat16(0.02)
        trees.put(base, path, value)
    return base


def adapters_for(base: Any, rank: int) -> tuple[LoraConfig, Any]:
    """Makes LoRA on every projection, with an update that is not zero."""
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    adapters = init_adapters(jax.random.key(1), base, lora)
    return lora, jax.tree.map(lambda a: a + jnp.float32(1e-3), adapters)


def read_bytes(config: LlamaConfig, batch: int, context: int, rank: int) -> dict:
    """Counts the bytes that decoding one token in each row reads.

    Returns:
      weights: packed projections and the bf16 head; adapters: float32 LoRA factors;
      cache: bf16 keys and values of `context` tokens in `batch` rows.
    """
    projections = shapes.Model(
        "",
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    ).projections
    packed = sum(
        p.layers * shapes.packed_bytes(p.shape, double_quant=True) for p in projections
    )
    head = 2 * config.vocab_size * config.hidden_size
    heads = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return {
        "weights": packed + head,
        "adapters": sum(4 * rank * sum(p.shape) * p.layers for p in projections),
        "cache": 2 * 2 * heads * context * batch,
    }


def step_flops(config: LlamaConfig, base: Any, adapters: Any, length: int) -> float:
    """Counts the operations of a training step for one token; see the module."""
    leaves = jax.tree.leaves(
        base["model"]["layers"], is_leaf=lambda x: isinstance(x, nf4.NF4Tensor)
    )
    frozen = sum(
        leaf.codes.shape[0] * math.prod(leaf.shape)
        for leaf in leaves
        if isinstance(leaf, nf4.NF4Tensor)
    )
    frozen += config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim
    attention = 2.0 * length * width * config.num_hidden_layers  # causal: half
    return 4.0 * frozen + 6.0 * tree_size(adapters) + 3.5 * attention


def peak_bytes() -> int | None:
    """Returns the most memory used on the device, None where it is not counted."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to decode."""

    kernels: Any
    batch: int
    context: int
    """Tokens of a prompt."""
    tokens: int
    """New tokens timed."""
    repeats: int = 3
    rank: int = 16
    dtype: Any = "bfloat16"


def decode(config: LlamaConfig, base: Any, how: Decoding) -> dict[str, Any]:
    """Times `generate_tokens` on random prompts."""
    lora, adapters = adapters_for(base, how.rank)
    variables = {"params": base, "lora": bind(adapters, base, lora)}
    model = Llama(config, Compute(dtype=how.dtype, kernels=how.kernels))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (how.batch, how.context)).tolist()
    seconds: dict[int, list[float]] = {}
    generated = []
    for new in (1, 1 + how.tokens):
        for _ in range(1 + how.repeats):
            started = time.perf_counter()
            generated = generate_tokens(model, variables, prompts, max_new_tokens=new)
            seconds.setdefault(new, []).append(time.perf_counter() - started)
    prefill, total = (min(times[1:]) for times in seconds.values())
    assert all(len(row) == how.context + 1 + how.tokens for row in generated)
    reads = read_bytes(config, how.batch, how.context, how.rank)
    device = jax.devices()[0].device_kind
    floor = None
    if device in COPY:
        floor = how.batch * COPY[device] / reads["weights"]
    return {
        "tokens_per_s": how.batch * how.tokens / (total - prefill),
        "ms_per_step": 1e3 * (total - prefill) / how.tokens,
        "prefill_ms": 1e3 * prefill,
        "prefill_tokens_per_s": how.batch * how.context / prefill,
        "compile_s": [times[0] - min(times[1:]) for times in seconds.values()],
        "seconds": list(seconds.values()),
        "read_bytes": reads,
        "floor_tokens_per_s": floor,
        "peak_bytes": peak_bytes(),
    }


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train."""

    settings: ModelConfig
    steps: int
    rank: int = 16
    learning_rate: float = 1e-4
    accumulation: int = 1
    """Micro-batches; a step takes the rows of all of them."""
    optimizer: Any = "adamw"
    packed: bool = False
    """Four documents in a row."""
    lora_products: LoraProducts = "auto"
    """Of `Compute`, which a run file does not have."""


def train(
    config: LlamaConfig, base: Any, tokens: np.ndarray, how: Training
) -> dict[str, Any]:
    """Times `train_step`; `tokens` int32 [N, rows, T] are the batches, taken in turn.

    The step is planned, compiled and placed as in a run
    (`qlora_jax.runs.compiled_step`).
    """
    lora, adapters = adapters_for(base, how.rank)
    settings, steps = how.settings, how.steps
    compute = Compute(
        dtype=settings.dtype,
        kernels=settings.kernels,
        norms=settings.fusion,
        activation=settings.fusion,
        lora_products=how.lora_products,
        lora=lora,
    )
    number, rows, length = tokens.shape
    shape = (number, how.accumulation, rows // how.accumulation, length)
    batches = [{"tokens": t, "labels": t} for t in jnp.asarray(tokens).reshape(shape)]
    document = length // 4 if how.packed else length
    if how.packed:
        place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape[1:])
        ids = {"positions": place % document, "segment_ids": 1 + place // document}
        batches = [batch | ids for batch in batches]
    flops = step_flops(config, base, adapters, document)
    train_config = TrainConfig(
        steps=steps,
        batch_size=shape[2],
        gradient_accumulation_steps=how.accumulation,
        optimizer=how.optimizer,
        learning_rate=how.learning_rate,
        lr_scheduler="constant",
        warmup_steps=0,
    )
    started = time.perf_counter()
    model, shapes = Llama(config, compute), jax.tree.map(_shape, base)
    inputs = StepInputs(shapes, batches[0])
    compiled = compile_step(model, inputs, settings, train_config, steps)
    compile_s = time.perf_counter() - started
    policy = compiled.plan.policy
    base = put_base(base, embed_tokens=policy.embed_tokens, lm_head=policy.lm_head)
    state = init_state(adapters, compiled.optimizer, jax.random.key(2))
    # The step donates the state's buffers, and two of its leaves may share one.
    state = jax.tree.map(jnp.array, state)
    del adapters
    seconds, losses = [], []
    for i in range(steps):
        started = time.perf_counter()
        state, metrics = compiled.step(state, base, batches[i % len(batches)])
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - started)
    middle = statistics.median(seconds[1:] or seconds)
    per_second = math.prod(tokens.shape[1:]) / middle
    peak = PEAK.get(jax.devices()[0].device_kind)
    used, planned = peak_bytes(), compiled.plan.memory.device_bytes
    return {
        "tokens_per_s": per_second,
        "step_s": middle,
        "seconds": seconds,
        "losses": losses,
        "finite": bool(np.isfinite(losses).all()),
        "compile_s": compile_s,
        "flops_per_token": flops,
        "mfu": per_second * flops / peak if peak else None,
        "policy": policy.name,
        "plan": compiled.report(),
        "planned_bytes": planned,
        "peak_bytes": used,
        "peak_over_planned": used / planned if used else None,
        "base_bytes": tree_bytes(base),
    }


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def text_batches(
    directory: Path, text: str, batches: int, batch: int, length: int
) -> np.ndarray:
    """Tokenizes a text with a checkpoint's tokenizer, repeated to [N, B, T]."""
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise SystemExit(f"bench_gpu model: `{directory}` has no tokenizer")
    ids = np.asarray(tokenizer(text)["input_ids"], np.int32)
    return np.resize(ids, (batches, batch, length))


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(
        prog="bench_gpu model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=("decode", "train"))
    p.add_argument("--size", choices=tuple(CONFIGS), default="8b")
    p.add_argument("--checkpoint", type=Path, help="HF directory, in place of --size")
    p.add_argument("--batch", type=int, default=1, help="rows")
    p.add_argument("--context", type=int, default=1024, help="decode: prompt (tokens)")
    p.add_argument("--tokens", type=int, default=128, help="decode: new tokens timed")
    p.add_argument("--repeats", type=int, default=3, help="decode: generations timed")
    p.add_argument("--length", type=int, default=2048, help="train: tokens a row")
    p.add_argument(
        "--steps", type=int, default=24, help="train: steps, the first apart"
    )
    for name in (
        *("remat", "attention", "embed_tokens", "lm_head", "kernels", "fusion"),
    ):
        hint = typing.get_type_hints(ModelConfig)[name]
        p.add_argument(
            f"--{name.replace('_', '-')}",
            choices=typing.get_args(hint),
            default=getattr(ModelConfig, name),
            help="as in [model] of a run file"
            + ("" if name == "kernels" else "; train"),
        )
    p.add_argument(
        "--scan-layers",
        choices=("auto", "true", "false"),
        default="auto",
        help="train: as in [model] of a run file",
    )
    p.add_argument(
        "--lora-products",
        choices=typing.get_args(LoraProducts),
        default="auto",
        help="train: of adapters, joined with those of the weights or separate",
    )
    p.add_argument("--rank", type=int, default=16, help="of the adapters")
    p.add_argument("--accumulation", type=int, default=1, help="train: micro-batches")
    p.add_argument(
        "--optimizer",
        choices=typing.get_args(typing.get_type_hints(TrainConfig)["optimizer"]),
        default=TrainConfig.optimizer,
        help="train",
    )
    p.add_argument(
        "--packed", action="store_true", help="train: four documents in a row"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="a narrow model, on any device"
    )
    return p


def _narrow(args: argparse.Namespace) -> argparse.Namespace:
    """Returns the options of a dry run: the same paths, on few tokens."""
    small = {"context": 16, "tokens": 4, "repeats": 1, "length": 64, "steps": 2}
    args = argparse.Namespace(**vars(args) | small)
    if jax.default_backend() != "gpu":
        # Offloading, and kernels of a GPU, exist there alone.
        args.attention = "auto" if args.attention != "xla" else "xla"
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Makes or loads the model and measures it."""
    head = args.lm_head == "nf4"
    if args.checkpoint:
        config, base = convert.load_llama(
            args.checkpoint, quantization="nf4_dq", quantize_lm_head=head
        )
        base = jax.tree.map(jnp.asarray, base)
    else:
        config = config_of(args.size, narrow=args.dry_run)
        base = random_base(config, quantize_lm_head=head)
    if args.command == "decode":
        names = ("kernels", "batch", "context", "tokens", "repeats", "rank")
        how = Decoding(**{name: getattr(args, name) for name in names})
        return decode(config, base, how)
    if args.checkpoint:
        text = (ROOT / "README.md").read_text()
        tokens = text_batches(args.checkpoint, text, 4, args.batch, args.length)
    else:
        rng = np.random.default_rng(0)
        size = (2, args.batch * args.accumulation, args.length)
        tokens = rng.integers(0, config.vocab_size, size).astype(np.int32)
    settings = ModelConfig(
        path=str(args.checkpoint or args.size),
        attention=args.attention,
        remat=args.remat,
        embed_tokens=args.embed_tokens,
        lm_head=args.lm_head,
        kernels=args.kernels,
        fusion=args.fusion,
        scan_layers={"true": True, "false": False}.get(args.scan_layers, "auto"),
    )
    names = ("steps", "rank", "accumulation", "optimizer", "packed", "lora_products")
    how = Training(settings=settings, **{name: getattr(args, name) for name in names})
    return train(config, base, tokens, how)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one measurement and prints it."""
    args = parser().parse_args(argv)
    try:
        device = jax.devices()[0]
        usable = device.platform == "gpu" or args.dry_run
        missing = "" if usable else f"only {device.platform}"
    except Exception as error:  # jax raises as many kinds as there are drivers
        device, missing = None, repr(error)
    if missing or device is None:
        print(f"bench_gpu model: jax finds no GPU ({missing}).", file=sys.stderr)
        return 1
    args = _narrow(args) if args.dry_run else args
    try:
        result = run(args)
    except (ValueError, UserError) as error:
        if args.kernels != "pallas":
            raise
        result = {"unavailable": str(error)[:1000]}
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record = {"device": device.device_kind, "options": options, **result}
    print(json.dumps(record | {"versions": versions()}))
    return 0
