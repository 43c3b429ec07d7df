# %% [markdown]
# # QLoRA in ten cells
#
# From a checkpoint to a trained adapter: load a model in 4 bits, generate, fine-tune, generate
# again, export the adapter. Everything runs on a CPU in about a minute, with a small Llama
# that the first cell trains on generated stories. To use another model, replace `work/base`
# by its directory; nothing else changes.

# %%
# 1. A model and a task: short stories, and questions that the model was not trained on.
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import convert
import qlora_jax as qj

work = Path("work")
if not (work / "held_out.jsonl").exists():
    subprocess.run([sys.executable, "../scripts/demo/story_model.py", "--output", work,
                    "--steps", "400"], check=True, stdout=subprocess.DEVNULL)
held_out = [json.loads(line) for line in (work / "held_out.jsonl").open()]
print(held_out[0]["prompt"] + held_out[0]["completion"])

# %%
# 2. Load the model; the linear layers are quantized to NF4 while loading.
model = qj.load(work / "base", quantization="nf4_dq", dtype="float32")
weight = model.base["model"]["layers"]["mlp"]["up_proj"]["weight"]
print(model.description)
print(f"up_proj of {weight.codes.shape[0]} layers, each {weight.shape}: "
      f"{8 * weight.nbytes / weight.size:.2f} bits a weight")

# %%
# 3. Generate. The base model tells stories and cannot answer questions.
prompts = [row["prompt"] for row in held_out]


def answers(model):
    texts = model.generate(prompts, max_new_tokens=16)
    return [text.removeprefix(p) for text, p in zip(texts, prompts)]


before = answers(model)
print(model.generate(["Sam walks to the mill."], max_new_tokens=40)[0], "\n")
print(held_out[0]["prompt"].split("\n")[1], "->", before[0].strip())

# %%
# 4. Configure the run. (`qlora-jax train` reads the same settings from a file.)
config = qj.RunConfig(
    model=qj.ModelConfig(path=str(work / "base"), quantization="nf4_dq", dtype="float32"),
    data=qj.DataConfig(path=str(work / "train.jsonl"), format="prompt_completion",
                       max_length=64),
    lora=qj.LoraConfig(r=16, lora_alpha=32),
    train=qj.TrainConfig(steps=120, batch_size=16, learning_rate=5e-3, warmup_steps=10,
                         lr_scheduler="cosine"),
    log=qj.LogConfig(plot=False),
    output_dir=str(work / "run"),
)

# %%
# 5. Train. After an interruption, the same call continues from the newest checkpoint.
report = qj.run(config)
print(f"{report['trainable_parameters']:,} of {report['base_parameters']:,} parameters, "
      f"loss {report['final_loss']:.3f}")

# %%
# 6. Plot the run.
rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").open()]
steps, loss, rate = (np.array([row[name] for row in rows])
                     for name in ("step", "loss", "learning_rate"))
smooth = np.convolve(loss, np.ones(15) / 15, "valid")

plt.rcParams.update({"axes.spines.top": False, "axes.titlelocation": "left",
                     "axes.titlesize": 11, "legend.frameon": False})
BLUE, ORANGE, GREY = "#2f6fab", "#d9772b", "#8a8f98"
fig, ax = plt.subplots(figsize=(9, 3.6))
ax.plot(steps, loss, color=BLUE, alpha=0.3, lw=1)
ax.plot(steps[7:-7], smooth, color=BLUE, lw=2, label="loss (mean of 15 steps)")
ax.set(xlabel="step", ylabel="loss (nats a token)", yscale="log", title="The run")
ax.grid(alpha=0.25)
rate_ax = ax.twinx()
rate_ax.plot(steps, rate, color=GREY, ls="--", lw=1.2, label="learning rate")
rate_ax.set(ylabel="learning rate", ylim=(0, None))
lines = [*ax.get_lines()[1:], *rate_ax.get_lines()]
ax.legend(lines, [line.get_label() for line in lines], loc="upper right");

# %%
# 7. Generate again: a run directory loads with the quantization it was trained with.
tuned = qj.load(work / "run")
after = answers(tuned)
expected = [row["completion"] for row in held_out]
for i in range(4):
    print(held_out[i]["prompt"].split("\n")[1], "->", after[i].strip())


def accuracy(texts):
    return np.mean([text == correct for text, correct in zip(texts, expected)])


print(f"\ncorrect word for word: {accuracy(before):.0%} before, {accuracy(after):.0%} after, "
      f"of {len(expected)} held-out questions")

# %%
# 8. The probability of every token of a correct answer, before and after.
row = held_out[1]
tokenizer = tuned.tokenizer
ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
start = len(tokenizer(row["prompt"])["input_ids"])


def probabilities(model):
    logits = np.asarray(model.logits([ids]))[0, start - 1 : -1]
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    softmax = weights / weights.sum(axis=-1, keepdims=True)
    return softmax[np.arange(len(logits)), ids[start:]]


fig, ax = plt.subplots(figsize=(9, 3))
x = np.arange(len(ids) - start)
ax.bar(x - 0.2, 100 * probabilities(model), 0.38, color=GREY, label="before")
ax.bar(x + 0.2, 100 * probabilities(tuned), 0.38, color=BLUE, label="after")
words = [repr(tokenizer.decode([i]))[1:-1] for i in ids[start:]]
ax.set_xticks(x, words, fontsize=10)
ax.set(ylabel="probability (%)", ylim=(0, 105),
       title=row["prompt"].split("\n")[1].removeprefix("Q: "))
ax.grid(axis="y", alpha=0.25)
ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2);

# %%
# 9. The adapter is a PEFT directory; PEFT, vLLM and other libraries load it.
adapter = work / "run" / "adapter"
for file in sorted(adapter.iterdir()):
    print(f"{file.stat().st_size:>9,} bytes  {file.name}")
settings = json.loads((adapter / "adapter_config.json").read_text())
print({name: settings[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")})

# %%
# 10. Or merge it into the weights: a checkpoint that needs no adapter.
if not (work / "merged").exists():
    merge = convert.merge(work / "base", adapter, work / "merged", onto="original")
merged = qj.load(work / "merged", quantization="none", dtype="float32")
print(f"merged, correct: {accuracy(answers(merged)):.0%}")
for piece in merged.stream(prompts[1], max_new_tokens=16):  # streaming
    print(piece, end="")
