"""A Llama with an attention layer of your own, adapted like any other.

An extra linear layer gates the output of attention. Its class is all that is written
for it: LoRA reaches it by its name, with a rank and alpha of its own, and what is
trained is saved under its path, loaded again, and merged.

    python scripts/custom_attention.py --model HF_LLAMA --data text.txt --output OUT

prints what the layer costs: parameters, and the time of a step beside that of the same
model without it.
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
from convert.output import check_new_directory
from qlora_jax.lora.targets import select
from qlora_jax.models.layers import Linear
from qlora_jax.models.llama import Attention


# --- 1. The layer: a subclass, with an extra projection built of our Linear ----------
class GatedAttention(Attention):
    """Attention whose output is scaled, feature by feature, by what the input says."""

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
    """Train a Llama with a gate in its attention, and without one beside it."""

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
    """Runs all of it; returns what it printed.

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
    loaded = qj.load(args.model, dtype="float32")
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
    data = qj.DataConfig(path=str(args.data), format="text", max_length=args.max_length)
    vocabulary = loaded.config.vocab_size
    examples = qj.load_examples(data, loaded.tokenizer, vocab_size=vocabulary)
    settings = qj.TrainConfig(
        steps=args.steps, batch_size=args.batch_size, learning_rate=3e-3
    )
    batches = qj.Batches(
        examples,
        data,
        batch_size=args.batch_size,
        accumulation_steps=1,
        pad_token_id=0,
        steps=args.steps,
        epochs=None,
    )
    # The plain model has no gate_attn: a target that selects nothing, no error.
    without = train(plain, loaded.base, lora, settings, batches)
    with_gate = train(gated, base, lora, settings, batches)

    # --- 4. Save, reload, merge -------------------------------------------------------
    convert.save_llama(
        args.output / "base", gated.config, base, tokenizer_from=args.model
    )
    convert.save_adapter(
        args.output / "adapter",
        dataclasses.replace(lora, base_model_name_or_path="../base"),
        jax.device_get(with_gate["adapters"]),
        gated.config,
        base_fingerprint=qj.fingerprint_tree(base),
    )
    convert.merge(
        args.output / "base",
        args.output / "adapter",
        args.output / "merged",
        onto="dequantized",
    )
    again = qj.load(
        args.output / "adapter", dtype="float32", attention_cls=GatedAttention
    )
    merged = qj.load(
        args.output / "merged",
        quantization=None,
        dtype="float32",
        attention_cls=GatedAttention,
    )
    tokens = jnp.asarray(batches[0]["tokens"][0])
    trained = {"params": base, "lora": qj.bind(with_gate["adapters"], base, lora)}
    logits = gated.apply(trained, tokens)

    report = {
        "trained_parameters_plain": without["parameters"],
        "trained_parameters_gated": with_gate["parameters"],
        "of_which_gate_attn": with_gate["groups"]["gate_attn"],
        "frozen_parameters_of_the_gate": int(
            np.prod(base["model"]["layers"]["self_attn"]["gate_attn"]["weight"].shape)
        ),
        "loss_plain": without["loss"],
        "loss_gated": with_gate["loss"],
        "step_ms_plain": without["step_ms"],
        "step_ms_gated": with_gate["step_ms"],
        "reloaded_max_abs_difference": _difference(again.logits(tokens), logits),
        "merged_max_abs_difference": _difference(merged.logits(tokens), logits),
    }
    for name, value in report.items():
        print(f"{name:<32}{value:>12,.6g}")
    return report


def train(model: Any, base: Any, lora: Any, settings: Any, batches: Any) -> dict:
    """Trains fresh adapters; returns them with their counts and the median step."""
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


def _difference(a: Any, b: Any) -> float:
    return float(jnp.abs(a - b).max())


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except qj.UserError as error:
        sys.exit(f"custom_attention.py: {error}")
