"""Trains a Llama with a custom attention layer, adapted like any other.

An extra linear layer gates the output of attention. Only its class is written for it:
LoRA reaches it by its name, with its rank and alpha, and what is trained is saved under
its path, loaded again, and merged.

    python scripts/custom_attention.py --model HF_LLAMA --data text.txt --output OUT

prints what the layer costs: parameters, and the time of a step with it and without.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import convert
import qlora_jax as qj
from convert.atomic import check_new_directory
from qlora_jax.lora.targets import select
from qlora_jax.models.block import Attention
from qlora_jax.models.layers import Linear


# --- 1. The layer: a subclass, with an extra projection built of our Linear ----------
class GatedAttention(Attention):
    """Attention whose output is scaled, feature by feature, by a gate of the input."""

    @nn.compact
    def __call__(
        self, x: Any, rope: Any, segments: Any, kv: Any = None, cached: Any = None
    ) -> tuple[Any, Any]:
        """Computes attention(x) * (1 + tanh(W x)); W starts at zero."""
        out, kv = super().__call__(x, rope, segments, kv, cached)
        gate = Linear(
            x.shape[-1], self.compute, initializer_range=0.0, name="gate_attn"
        )(x)
        return out * (1 + jnp.tanh(gate)), kv


@dataclass
class Args:
    """Train a Llama with a gate in its attention, and without one."""

    model: Path
    """Hugging Face directory of a Llama."""
    data: Path
    """Text file."""
    output: Path
    """New directory for the base with the gate, the adapter and the merged model."""
    steps: int = 60
    """Optimizer steps."""
    batch_size: int = 8
    max_length: int = 128
    """Tokens of a row."""


def main(args: Args) -> dict[str, Any]:
    """Trains, saves, reloads and merges; returns what it printed.

    Raises:
      UserError: arguments that cannot be used; before any training.
    """
    check_new_directory(args.output)
    if args.steps < 2:
        raise qj.UserError(
            f"--steps must be at least 2, one to compile and one to time, got "
            f"{args.steps}."
        )
    # --- 2. Load the standard part; draw what the checkpoint does not have -----------
    loaded = qj.load(args.model, quantization="nf4_dq", dtype="float32")
    lora = qj.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=("q_proj", "v_proj", "gate_attn"),
        rank_pattern={"gate_attn": 4},
        alpha_pattern={"gate_attn": 4},
    )
    compute = qj.Compute(dtype="float32", lora=lora)
    plain = qj.Llama(loaded.config, compute)
    gated, base = qj.add_parameters(
        qj.Llama(loaded.config, compute, attention_cls=GatedAttention),
        loaded.base,
        jax.random.key(0),
    )
    # --- 3. Train both on the same batches -------------------------------------------
    batches = make_batches(args, loaded)
    # The plain model has no gate_attn: a target that selects nothing is not an error.
    without_gate = train(plain, loaded.base, lora, args, batches)
    with_gate = train(gated, base, lora, args, batches)
    # --- 4. Save, reload, merge ------------------------------------------------------
    save(args, lora, gated.config, base, with_gate["adapters"])
    options = {"dtype": "float32", "attention_cls": GatedAttention}
    reloaded = qj.load(args.output / "adapter", quantization="nf4_dq", **options)
    merged = qj.load(args.output / "merged", quantization=None, **options)
    tokens = jnp.asarray(batches[0]["tokens"][0])
    trained = {"params": base, "lora": qj.bind(with_gate["adapters"], base, lora)}
    logits = gated.apply(trained, tokens)
    gate = base["model"]["layers"]["self_attn"]["gate_attn"]["weight"]
    report = {
        "trained_parameters_plain": without_gate["parameters"],
        "trained_parameters_gated": with_gate["parameters"],
        "of_which_gate_attn": with_gate["groups"]["gate_attn"],
        "frozen_parameters_of_the_gate": int(np.prod(gate.shape)),
        "loss_plain": without_gate["loss"],
        "loss_gated": with_gate["loss"],
        "step_ms_plain": without_gate["step_ms"],
        "step_ms_gated": with_gate["step_ms"],
        "reloaded_max_abs_difference": _difference(reloaded.logits(tokens), logits),
        "merged_max_abs_difference": _difference(merged.logits(tokens), logits),
    }
    for name, value in report.items():
        print(f"{name:<32}{value:>12,.6g}")
    return report


def make_batches(args: Args, loaded: qj.Model) -> qj.Batches:
    """Reads the text into batches for all steps."""
    data = qj.DataConfig(path=str(args.data), format="text", max_length=args.max_length)
    vocabulary = loaded.config.vocab_size
    examples = qj.load_examples(data, loaded.tokenizer, vocab_size=vocabulary)
    return qj.Batches(
        examples,
        data,
        batch_size=args.batch_size,
        accumulation_steps=1,
        pad_token_id=0,
        steps=args.steps,
        epochs=None,
    )


def train(model: Any, base: Any, lora: Any, args: Args, batches: Any) -> dict:
    """Trains fresh adapters; returns them with their counts and the median step."""
    settings = qj.TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=3e-3,
        warmup_steps=0,
    )
    adapters = qj.init_adapters(jax.random.key(0), base, lora)
    optimizer = qj.make_optimizer(settings, len(batches))
    state = qj.init_state(adapters, optimizer, jax.random.key(1))
    step = jax.jit(
        partial(qj.train_step, model=model, optimizer=optimizer), donate_argnums=0
    )
    losses, times = [], []
    for batch in qj.prefetch(batches, 0, len(batches)):
        began = time.perf_counter()
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - began)
    groups = select(base, lora).groups()
    return {
        "adapters": state.adapters,
        "groups": groups,
        "parameters": sum(groups.values()),
        "loss": float(np.mean(losses[-10:])),
        "step_ms": 1e3 * float(np.median(times[1:])),
    }


def save(args: Args, lora: Any, config: Any, base: Any, adapters: Any) -> None:
    """Writes the base with the gate, the adapter, and both merged."""
    convert.save_llama(args.output / "base", config, base, tokenizer_from=args.model)
    convert.save_adapter(
        args.output / "adapter",
        dataclasses.replace(lora, base_model_name_or_path="../base"),
        jax.device_get(adapters),
        config,
        base_fingerprint=qj.fingerprint_tree(base),
    )
    convert.merge(
        args.output / "base",
        args.output / "adapter",
        args.output / "merged",
        onto="dequantized",
    )


def _difference(a: Any, b: Any) -> float:
    return float(jnp.abs(a - b).max())


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except qj.UserError as error:
        sys.exit(f"custom_attention.py: {error}")
