# %% [markdown]
# # A custom attention layer with LoRA
#
# There is no list of modules that can be adapted. A layer built from `qj.Linear`
# is adapted, saved, loaded and merged by its name. Here attention gets a gate and the gate a
# LoRA with a separate rank; the result is compared with plain LoRA of as many parameters.
# (`scripts/custom_attention.py` does the same as a script.)

# %%
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import convert
import qlora_jax as qj
from qlora_jax.lora.targets import select

work = Path("work")
if not (work / "base").exists():
    subprocess.run([sys.executable, "../scripts/demo/story_model.py", "--output", work,
                    "--steps", "400"], check=True, stdout=subprocess.DEVNULL)

# %% [markdown]
# ## The layer
#
# A subclass with one more projection. It starts at zero, so the model starts unchanged.

# %%
class GatedAttention(qj.Attention):
    @nn.compact
    def __call__(self, x, rope, segments, kv=None, cached=None):
        out, kv = super().__call__(x, rope, segments, kv, cached)
        gate = qj.Linear(x.shape[-1], self.compute, initializer_range=0.0, name="gate_attn")(x)
        return out * (1 + jnp.tanh(gate)), kv


loaded = qj.load(work / "base", quantization="nf4_dq", dtype="float32")


def build(lora, attention_cls=None):
    """Returns a model, its base with the parameters of the class, and new adapters."""
    compute = qj.Compute(dtype="float32", lora=lora)
    model = qj.Llama(loaded.config, compute, attention_cls=attention_cls)
    model, base = qj.add_parameters(model, loaded.base, jax.random.key(0))
    return model, base, qj.init_adapters(jax.random.key(1), base, lora)


# The gate is named like any other module; patterns set its rank and scaling, as in PEFT.
gated = qj.LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "gate_attn"),
                      rank_pattern={"gate_attn": 8}, alpha_pattern={"gate_attn": 16})
plain = qj.LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
wider = qj.LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"))
variants = {"q, v (r=4)": (plain, None), "q, v (r=8)": (wider, None),
            "q, v (r=4) and the gate (r=8)": (gated, GatedAttention)}
for name, (lora, attention) in variants.items():
    model, base, adapters = build(lora, attention)
    groups = select(base, lora).groups()
    print(f"{name:<32}{sum(groups.values()):>8,} trained: {dict(groups)}")

# %%
model, base, adapters = build(gated, GatedAttention)
tokens = jnp.asarray([loaded.tokenizer("Mia goes to the river. There Mia finds")["input_ids"]])
bound = qj.bind(adapters, base, gated)
logits = model.apply({"params": base, "lora": bound}, tokens)
print("largest difference to the model without the gate:",
      float(jnp.abs(logits - loaded.logits(tokens)).max()))

# %% [markdown]
# ## Training
#
# The same batches for all three variants, with the jitted step of the library.

# %%
STEPS, ROWS = 70, 16
data = qj.DataConfig(path=str(work / "train.jsonl"), format="prompt_completion", max_length=64)
examples = qj.load_examples(data, loaded.tokenizer, vocab_size=loaded.config.vocab_size)
batches = qj.Batches(examples, data, batch_size=ROWS, accumulation_steps=1, pad_token_id=0,
                     steps=STEPS, epochs=None)
settings = qj.TrainConfig(steps=STEPS, batch_size=ROWS, learning_rate=5e-3, warmup_steps=5)


def train(model, base, adapters):
    optimizer = qj.make_optimizer(settings, STEPS)
    state = qj.init_state(adapters, optimizer, jax.random.key(2))
    step = jax.jit(partial(qj.train_step, model=model, optimizer=optimizer), donate_argnums=0)
    losses = []
    for batch in qj.prefetch(batches, 0, STEPS):
        state, metrics = step(state, base, batch)
        losses.append(metrics["loss"])
    return state.adapters, np.array(losses)


results = {name: train(*build(lora, attention)) for name, (lora, attention) in variants.items()}
for name, (_, losses) in results.items():
    print(f"{name:<32} loss of the last ten steps {losses[-10:].mean():.3f}")

# %%
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                     "axes.titlelocation": "left", "axes.titlesize": 11,
                     "legend.frameon": False})
COLOURS = {"q, v (r=4)": "#8a8f98", "q, v (r=8)": "#2f6fab",
           "q, v (r=4) and the gate (r=8)": "#d9772b"}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), gridspec_kw={"width_ratios": [1.6, 1]})
for name, (_, losses) in results.items():
    left.plot(losses, color=COLOURS[name], alpha=0.25, lw=1)
    smooth = np.convolve(losses, np.ones(7) / 7, "valid")
    left.plot(np.arange(3, STEPS - 3), smooth, color=COLOURS[name], lw=2, label=name)
left.set(xlabel="step", ylabel="loss", yscale="log", title="Training (means of 7 steps)")
left.grid(alpha=0.25, which="both")
left.legend()

trained = results["q, v (r=4) and the gate (r=8)"][0]
layers = trained["model"]["layers"]["self_attn"]
gate = 2.0 * np.asarray(layers["gate_attn"]["lora_B"] @ layers["gate_attn"]["lora_A"])
bins = np.linspace(-0.2, 0.2, 81)
for layer, colour in enumerate(("#3a8f5d", "#d9772b")):
    right.hist(gate[layer].ravel(), bins=bins, histtype="step", lw=1.8, color=colour,
               label=f"layer {layer}")
right.set(title="Learned weights of the gate (from zero)", xlabel="weight", yscale="log")
right.legend()
fig.tight_layout();

# %% [markdown]
# ## Saving, loading, merging
#
# The gate is saved under its path. Loading needs the class, because files store shapes, not
# code.

# %%
convert.save_llama(work / "gated-base", model.config, base, tokenizer_from=work / "base")
convert.save_adapter(work / "gated-adapter", gated, jax.device_get(trained), model.config,
                     base_model_name_or_path="../gated-base",
                     base_fingerprint=qj.fingerprint_tree(base))
again = qj.load(work / "gated-adapter", dtype="float32", attention_cls=GatedAttention)
convert.merge(work / "gated-base", work / "gated-adapter", work / "gated-merged", onto="dequantized")
merged = qj.load(work / "gated-merged", quantization="none", dtype="float32",
                 attention_cls=GatedAttention)

logits = model.apply({"params": base, "lora": qj.bind(trained, base, gated)}, tokens)
print("reloaded, largest difference:", float(jnp.abs(again.logits(tokens) - logits).max()))
print("merged, largest difference:  ", float(jnp.abs(merged.logits(tokens) - logits).max()))
try:
    qj.load(work / "gated-adapter", dtype="float32")
except qj.UserError as error:
    print("\nwithout the class:", error)

# %%
text = ("Tom goes to the park. There Tom finds a gold cup and 3 nuts. Then Eva brings 4 nuts "
        "for Tom.\nQ: What is at the park?\nA:")
for piece in again.stream(text, max_new_tokens=16):
    print(piece, end="")
