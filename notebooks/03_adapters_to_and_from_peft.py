# %% [markdown]
# # Adapters to and from PEFT
#
# An adapter is a value: a configuration with PEFT's field names and a tree of arrays. This
# notebook writes one, inspects the file, reads one as PEFT writes it, shows which files are
# refused, and scales an adapter up and down. It needs neither torch nor PEFT.

# %%
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import safetensors.numpy

import convert
import qlora_jax as qj

work = Path("work")
if not (work / "base").exists():
    subprocess.run([sys.executable, "../scripts/demo/story_model.py", "--output", work,
                    "--steps", "400"], check=True, stdout=subprocess.DEVNULL)
run = work / "short"  # a short run that teaches the model to answer
qj.run(qj.RunConfig(
    model=qj.ModelConfig(path=str(work / "base"), dtype="float32"),
    data=qj.DataConfig(path=str(work / "train.jsonl"), format="prompt_completion",
                       max_length=64),
    lora=qj.LoraConfig(r=8, lora_alpha=16),
    train=qj.TrainConfig(steps=60, batch_size=16, learning_rate=5e-3),
    log=qj.LogConfig(plot=False),
    output_dir=str(run),
))
model = qj.load(run)
print(model.description)

# %% [markdown]
# ## To PEFT
#
# `run/adapter` already is a PEFT directory: its `adapter_config.json` has PEFT's fields, and
# its tensors have PEFT's names. `convert.save_adapter` writes one from any trained tree.
#
# ```python
# base = transformers.AutoModelForCausalLM.from_pretrained("work/base")
# tuned = peft.PeftModel.from_pretrained(base, "work/saved")   # like any other
# ```

# %%
shutil.rmtree(work / "saved", ignore_errors=True)
convert.save_adapter(work / "saved", model.lora_config, model.adapters, model.config,
                     base_model_name_or_path=str(work / "base"))
tensors = safetensors.numpy.load_file(work / "saved" / "adapter_model.safetensors")
print(f"{len(tensors)} tensors, for example:")
for name in list(tensors)[:4]:
    print(f"  {name:<66} {str(tensors[name].shape):<10} {tensors[name].dtype}")

settings = json.loads((work / "saved" / "adapter_config.json").read_text())
shown = ("peft_type", "task_type", "r", "lora_alpha", "target_modules")
print({name: settings[name] for name in shown})

again = model.attach(work / "saved")
difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), again.adapters, model.adapters)
print("largest difference after saving and loading:", max(jax.tree.leaves(difference)))

# %% [markdown]
# ## From PEFT
#
# A directory as PEFT writes it after training in half precision, made here with only the
# safetensors library: three modules in the first layer. It attaches to the same base.

# %%
rng = np.random.default_rng(0)
foreign_dir = work / "from-peft"
shutil.rmtree(foreign_dir, ignore_errors=True)
foreign_dir.mkdir()
hidden, intermediate = model.config.hidden_size, model.config.intermediate_size
shapes = {"self_attn.q_proj": (hidden, hidden), "mlp.up_proj": (intermediate, hidden),
          "mlp.down_proj": (hidden, intermediate)}
state_dict = {}
for module, (outputs, inputs) in shapes.items():
    prefix = f"base_model.model.model.layers.0.{module}"
    state_dict[f"{prefix}.lora_A.weight"] = rng.normal(0, 0.1, (4, inputs)).astype(np.float16)
    state_dict[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.1, (outputs, 4)).astype(np.float16)
safetensors.numpy.save_file(state_dict, foreign_dir / "adapter_model.safetensors", {"format": "pt"})
(foreign_dir / "adapter_config.json").write_text(json.dumps({
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
    "target_modules": ["q_proj", "up_proj", "down_proj"], "layers_to_transform": [0],
    "base_model_name_or_path": "../base",
}))

foreign = qj.load(foreign_dir, dtype="float32")  # the configuration names its base
for path, leaf in jax.tree_util.tree_leaves_with_path(foreign.adapters):
    print(f"{jax.tree_util.keystr(path, simple=True, separator='.'):<48} {leaf.shape} {leaf.dtype}")

# %% [markdown]
# Files are read strictly. PEFT warns about a tensor with a wrong name and leaves the update
# at zero. The loss would not reveal that, so here it is an error that lists all such tensors.

# %%
broken = dict(state_dict)
name = next(iter(broken))
broken[name.replace("q_proj", "query")] = broken.pop(name)
safetensors.numpy.save_file(broken, foreign_dir / "adapter_model.safetensors", {"format": "pt"})
try:
    qj.load(foreign_dir, dtype="float32")
except qj.CheckpointError as error:
    print(error)

# %% [markdown]
# ## The trained update
#
# The update of a weight is `scaling * B @ A`. Its singular values show how much of the rank
# is used; its norm relative to the weight's shows where the training changed the model.

# %%
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                     "axes.titlelocation": "left", "axes.titlesize": 11,
                     "legend.frameon": False})
BLUE, ORANGE, GREY = "#2f6fab", "#d9772b", "#8a8f98"
base = qj.load(work / "base", quantization="none", dtype="float32").base
modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
layers = model.config.num_hidden_layers
sizes, spectra = np.zeros((layers, len(modules))), {}
for column, name in enumerate(modules):
    part = "self_attn" if column < 4 else "mlp"
    pair = model.adapters["model"]["layers"][part][name]
    weight = np.asarray(base["model"]["layers"][part][name]["weight"])
    update = model.lora_config.scaling * np.asarray(pair["lora_B"] @ pair["lora_A"])
    sizes[:, column] = np.linalg.norm(update, axis=(1, 2)) / np.linalg.norm(weight, axis=(1, 2))
    spectra[name] = np.linalg.svd(update, compute_uv=False)[:, :8].mean(axis=0)

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), gridspec_kw={"width_ratios": [1.4, 1]})
image = left.imshow(100 * sizes, cmap="Blues", vmin=0, aspect="auto")
for row in range(layers):
    for column in range(len(modules)):
        value = 100 * sizes[row, column]
        left.text(column, row, f"{value:.0f}", ha="center", va="center",
                  color="white" if value > 60 * sizes.max() else "black")
left.set_xticks(range(len(modules)), modules, rotation=25)
left.set_yticks(range(layers), [f"layer {i}" for i in range(layers)])
left.set_title("Norm of the update, % of the weight's")
left.spines[:].set_visible(False)
shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(modules)))
for (name, values), colour in zip(spectra.items(), shades):
    right.plot(np.arange(1, 9), values / values[0], "o-", ms=3, lw=1.5, color=colour, label=name)
right.set(title="Singular values of the updates", xlabel="number (of r = 8)",
          ylabel="share of the largest", ylim=(0, 1.05))
right.grid(alpha=0.25)
right.legend(fontsize=8, ncols=2, loc="upper right")
fig.tight_layout();

# %% [markdown]
# ## Scaling an adapter
#
# `combine_adapters` computes the weighted sum of several adapters exactly, as one adapter.
# With a single adapter the weight scales it: 0 is the base, 1 the trained model. The models
# share the base and the compiled programs.

# %%
held_out = [json.loads(line) for line in (work / "held_out.jsonl").open()]
data = qj.DataConfig(path=str(work / "held_out.jsonl"), format="prompt_completion", max_length=64)
examples = qj.load_examples(data, model.tokenizer, vocab_size=model.config.vocab_size)
prompts = [row["prompt"] for row in held_out]
weights = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
loss, accuracy = [], []
for weight in weights:
    scaled = model.attach(None)
    if weight:
        part = (model.lora_config, model.adapters, float(weight))
        lora, adapters = qj.combine_adapters([part], model.base)
        scaled = dataclasses.replace(model, lora_config=lora, adapters=adapters)
    loss.append(qj.measure_loss(scaled, examples, data, 25).report()["loss"])
    texts = scaled.generate(prompts, max_new_tokens=16)
    accuracy.append(np.mean([text == row["prompt"] + row["completion"]
                             for text, row in zip(texts, held_out)]))

fig, ax = plt.subplots(figsize=(8, 3.3))
ax.plot(weights, loss, "o-", color=BLUE)
ax.set(xlabel="weight of the adapter", yscale="log", title="From the base to the tuned model, and beyond")
ax.set_ylabel("loss on held-out answers", color=BLUE)
ax.grid(alpha=0.25)
other = ax.twinx()
other.spines["right"].set_visible(True)
other.bar(weights, 100 * np.array(accuracy), 0.1, color=ORANGE, alpha=0.35)
other.set_ylabel("correct answers (%)", color=ORANGE)
other.set_ylim(0, 105)
ax.set_zorder(other.get_zorder() + 1)  # the line in front of the bars
ax.patch.set_visible(False);

# %% [markdown]
# On the command line, `qlora-convert adapter` checks and rewrites a directory, `verify`
# compares two of them tensor by tensor, `combine` adds adapters, and `merge` adds one to its
# base.
