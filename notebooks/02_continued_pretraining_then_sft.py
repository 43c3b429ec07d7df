# %% [markdown]
# # Continued pre-training, then instruction tuning
#
# A model that is to answer questions about a subject it has never read about gets two
# stages: first it reads (continued pre-training on plain text, every token counts), then
# it learns the form of an answer (a few questions, only answers count). The second stage
# continues the adapter of the first: `train.adapter_init`.
#
# The subject here are pirates. The base, a small Llama, knows children's stories alone.
# It takes about a minute on a CPU.

# %%
import json
import random
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import qlora_jax as qj
from qlora_jax.cli.eval import measure

work = Path("work")
if not (work / "base").exists():
    subprocess.run([sys.executable, "../scripts/story_model.py", "--output", work,
                    "--steps", "400"], check=True, stdout=subprocess.DEVNULL)

# %% [markdown]
# ## The data
#
# 1,500 pirate stories to read. 256 questions with answers to learn from, and 100 about
# other stories to be measured on.

# %%
draw = random.Random(5)
CAPTAINS = "Mia Tom Ana Ben Lily Max Zoe Sam Eva Leo".split()
VERBS, ISLES = "sails rows drifts".split(), "reef lagoon fort volcano wreck cave".split()
LOOT = "doubloons rubies pearls muskets barrels parrots".split()


def pirates():
    captain, rival = draw.sample(CAPTAINS, 2)
    isle, loot, number = draw.choice(ISLES), draw.choice(LOOT), draw.randint(2, 9)
    text = (f"Captain {captain} {draw.choice(VERBS)} to the {isle}. The crew digs up "
            f"{number} {loot}. At night {rival} steals the {loot} of {captain}.")
    asked = [(f"Where does {captain} go?", f"To the {isle}, arr!"),
             ("What does the crew dig up?", f"{number} {loot}, arr!"),
             (f"Who steals the {loot}?", f"Captain {rival}, arr!")]
    question, answer = draw.choice(asked)
    row = {"prompt": f"{text}\nQ: {question}\nA:", "completion": f" {answer}"}
    spoken, reply = draw.choice(asked)
    return f"{text} The parrot asks: {spoken} {reply} says {captain}.", row


stories, questions = zip(*(pirates() for _ in range(1500 + 100)))
told, held_out = questions[:256], questions[1500:]


def write(name, rows):
    (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(work / name)


texts = write("pirates.jsonl", [{"text": text} for text in stories[:1500]])
told_file = write("told.jsonl", told)
print(stories[0], "\n")
print(told[0]["prompt"] + told[0]["completion"])

# %% [markdown]
# ## The two stages, and the second alone
#
# Settings that both stages share stand once. Words that the base has never seen (doubloons,
# arr!) have embeddings that nothing ever trained, and no update of the layers makes up for
# that: the table of embeddings is trained too (`modules_to_save`), and stays the output head
# as well, to which this base ties it. The run without the first stage sees the same
# 256 questions for the same number of steps.

# %%
TEXT = qj.DataConfig(path=texts, format="text", max_length=128, packing=True)
ASKED = qj.DataConfig(path=told_file, format="prompt_completion", max_length=128)


def stage(name, data, steps, rate, start=None):
    report = qj.run(qj.RunConfig(
        model=qj.ModelConfig(path=str(work / "base"), dtype="float32"),
        data=data,
        lora=qj.LoraConfig(r=16, lora_alpha=32, modules_to_save=("embed_tokens",),
                           ensure_weight_tying=True),
        train=qj.TrainConfig(steps=steps, batch_size=16, learning_rate=rate,
                             warmup_steps=5, lr_scheduler="cosine",
                             adapter_init=start and str(work / start / "adapter")),
        log=qj.LogConfig(plot=False),
        output_dir=str(work / name),
    ))
    print(f"{name:<12} {report['data']['supervised_tokens']:>7,} supervised tokens, "
          f"{steps} steps, loss {report['final_loss']:.3f}")


stage("read", TEXT, 140, 5e-3)
stage("read-told", ASKED, 80, 3e-3, start="read")
stage("told", ASKED, 80, 3e-3)

# %%
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                     "axes.titlelocation": "left", "axes.titlesize": 11,
                     "legend.frameon": False})
BLUE, ORANGE, GREY, GREEN = "#2f6fab", "#d9772b", "#8a8f98", "#3a8f5d"


def curve(name):
    rows = [json.loads(line) for line in (work / name / "metrics.jsonl").open()]
    return np.array([row["loss"] for row in rows])


read, both, alone = map(curve, ("read", "read-told", "told"))
fig, ax = plt.subplots(figsize=(9.5, 3.6))
at = np.arange(len(read) + len(both)) + 1
ax.axvspan(0, len(read) + 0.5, color=BLUE, alpha=0.07)
ax.axvspan(len(read) + 0.5, at[-1] + 1, color=ORANGE, alpha=0.09)
ax.plot(at[: len(read)], read, color=BLUE, lw=1.8, label="stage 1: reading")
ax.plot(at[len(read):], both, color=ORANGE, lw=1.8, label="stage 2: answering")
ax.plot(at[len(read):], alone, color=GREY, lw=1.5, ls="--", label="answering, without stage 1")
ax.set(xlabel="step", ylabel="loss (nats a supervised token)", yscale="log",
       xlim=(0, at[-1] + 1), title="Two stages, one adapter")
ax.grid(alpha=0.25)
ax.legend(loc="lower left");

# %% [markdown]
# ## What each stage is good for
#
# Four models on one base: the base, and three adapters that are attached in turn; nothing
# is loaded or compiled again. Loss on pirate stories and on answers that none of them has
# seen, and answers right word for word.

# %%
base = qj.load(work / "base", dtype="float32", quantization="nf4_dq")
models = {"base": base} | {
    name: base.attach(work / directory) for name, directory in
    (("read", "read"), ("told", "told"), ("read, then told", "read-told"))
}
unread = write("unread.jsonl", [{"text": text} for text in stories[1500:]])
asked = write("asked.jsonl", held_out)
tasks = {
    "new stories": qj.DataConfig(path=unread, format="text", max_length=128),
    "answers": qj.DataConfig(path=asked, format="prompt_completion", max_length=128),
}
losses = {}
for task, data in tasks.items():
    examples = qj.load_examples(data, base.tokenizer, vocab_size=base.config.vocab_size)
    for name, model in models.items():
        losses[name, task] = measure(model, examples, data, 16).report()["loss"]

right = {}
prompts = [row["prompt"] for row in held_out]
for name, model in models.items():
    texts = model.generate(prompts, max_new_tokens=24)
    right[name] = np.mean([text == row["prompt"] + row["completion"]
                           for text, row in zip(texts, held_out)])

print(f"{'':<18}" + "".join(f"{task:>14}" for task in tasks) + f"{'right':>10}")
for name in models:
    print(f"{name:<18}" + "".join(f"{losses[name, task]:>14.3f}" for task in tasks)
          + f"{right[name]:>10.0%}")

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 2.9), sharey=True)
y = np.arange(len(models))[::-1]
colours = [GREY, BLUE, ORANGE, GREEN]
for ax, task in zip(axes, tasks):
    values = [losses[name, task] for name in models]
    ax.barh(y, values, color=colours, height=0.6)
    for at, value in zip(y, values):
        ax.text(value, at, f" {value:.2f}", va="center", fontsize=9)
    ax.set(title=f"Loss on {task}", xlabel="nats a token", xlim=(0, 1.2 * max(values)))
axes[2].barh(y, [100 * right[name] for name in models], color=colours, height=0.6)
for at, name in zip(y, models):
    axes[2].text(100 * right[name], at, f" {right[name]:.0%}", va="center", fontsize=9)
axes[2].set(title="Answers right, word for word", xlabel="of 100 questions", xlim=(0, 112))
axes[0].set_yticks(y, list(models))
fig.tight_layout();

# %% [markdown]
# Reading brings the loss on new stories down and teaches no answers; answering alone has to
# learn the subject's words from 256 short answers. Together, in this order, they give the
# model that both were for. (It reads worse than after the first stage: what is not trained
# on is forgotten, the sooner the higher the learning rate.) The same chain on the command line is two run files, the second with
# `adapter_init = "read/adapter"` under `[train]`.

# %%
model = models["read, then told"]
for row in held_out[:4]:
    question = row["prompt"].split("\n")[1]
    (text,) = model.generate([row["prompt"]], max_new_tokens=24)
    print(f"{question:<34} {text.removeprefix(row['prompt']).strip()}")
