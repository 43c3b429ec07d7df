# %% [markdown]
# # Continued pre-training, then instruction tuning
#
# To answer questions about a new subject, a model is trained in two stages: continued
# pre-training on plain text, where every token counts in the loss, then instruction tuning
# on a few questions, where only the answers count. The second stage continues the adapter
# of the first: `train.adapter_init`.
#
# The subject here is pirates. The base, a small Llama, was trained on children's stories
# only. The notebook takes about a minute on a CPU.

# %%
import json
import random
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import qlora_jax as qj

work = Path("work")
if not (work / "base").exists():
    subprocess.run([sys.executable, "../scripts/demo/story_model.py", "--output", work,
                    "--steps", "400"], check=True, stdout=subprocess.DEVNULL)

# %% [markdown]
# ## The data
#
# 1,500 pirate stories for pre-training, 256 questions with answers for instruction tuning,
# and 100 questions about other stories for evaluation.

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
    pairs = [(f"Where does {captain} go?", f"To the {isle}, arr!"),
             ("What does the crew dig up?", f"{number} {loot}, arr!"),
             (f"Who steals the {loot}?", f"Captain {rival}, arr!")]
    question, answer = draw.choice(pairs)
    row = {"prompt": f"{text}\nQ: {question}\nA:", "completion": f" {answer}"}
    spoken, reply = draw.choice(pairs)
    return f"{text} The parrot asks: {spoken} {reply} says {captain}.", row


stories, questions = zip(*(pirates() for _ in range(1500 + 100)))
instructions, held_out = questions[:256], questions[1500:]


def write(name, rows):
    (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(work / name)


texts = write("pirates.jsonl", [{"text": text} for text in stories[:1500]])
instructions_file = write("instructions.jsonl", instructions)
print(stories[0], "\n")
print(instructions[0]["prompt"] + instructions[0]["completion"])

# %% [markdown]
# ## The two stages, and the second stage alone
#
# Both stages share most settings. Words that the base has never seen (doubloons, arr!) have
# untrained embeddings, and no update of the layers can compensate for that: the embedding
# table is trained too (`modules_to_save`). This base ties it to the output head, and it
# stays tied. The run without the first stage sees the same 256 questions for the same
# number of steps.

# %%
TEXT = qj.DataConfig(path=texts, format="text", max_length=128, packing=True)
QUESTIONS = qj.DataConfig(path=instructions_file, format="prompt_completion", max_length=128)


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


stage("pretrained", TEXT, 140, 5e-3)
stage("both", QUESTIONS, 80, 3e-3, start="pretrained")
stage("tuned", QUESTIONS, 80, 3e-3)

# %%
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                     "axes.titlelocation": "left", "axes.titlesize": 11,
                     "legend.frameon": False})
BLUE, ORANGE, GREY, GREEN = "#2f6fab", "#d9772b", "#8a8f98", "#3a8f5d"


def curve(name):
    rows = [json.loads(line) for line in (work / name / "metrics.jsonl").open()]
    return np.array([row["loss"] for row in rows])


first, second, second_only = map(curve, ("pretrained", "both", "tuned"))
fig, ax = plt.subplots(figsize=(9.5, 3.6))
at = np.arange(len(first) + len(second)) + 1
ax.axvspan(0, len(first) + 0.5, color=BLUE, alpha=0.07)
ax.axvspan(len(first) + 0.5, at[-1] + 1, color=ORANGE, alpha=0.09)
ax.plot(at[: len(first)], first, color=BLUE, lw=1.8, label="stage 1: pre-training")
ax.plot(at[len(first):], second, color=ORANGE, lw=1.8, label="stage 2: instruction tuning")
ax.plot(at[len(first):], second_only, color=GREY, lw=1.5, ls="--",
        label="instruction tuning without stage 1")
ax.set(xlabel="step", ylabel="loss (nats a supervised token)", yscale="log",
       xlim=(0, at[-1] + 1), title="Two stages, one adapter")
ax.grid(alpha=0.25)
ax.legend(loc="lower left");

# %% [markdown]
# ## The effect of each stage
#
# Four models share one base: the base itself, and three adapters attached to it, without
# loading or compiling again. The table has the loss on held-out pirate stories and answers,
# and the share of answers that are correct word for word.

# %%
base = qj.load(work / "base", dtype="float32", quantization="nf4_dq")
models = {"base": base} | {
    name: base.attach(work / directory) for name, directory in
    (("pre-training", "pretrained"), ("instructions", "tuned"), ("both stages", "both"))
}
new_stories = write("new_stories.jsonl", [{"text": text} for text in stories[1500:]])
new_questions = write("new_questions.jsonl", held_out)
tasks = {
    "new stories": qj.DataConfig(path=new_stories, format="text", max_length=128),
    "answers": qj.DataConfig(path=new_questions, format="prompt_completion", max_length=128),
}
losses = {}
for task, data in tasks.items():
    examples = qj.load_examples(data, base.tokenizer, vocab_size=base.config.vocab_size)
    for name, model in models.items():
        losses[name, task] = qj.measure_loss(model, examples, data, 16).report()["loss"]

accuracy = {}
prompts = [row["prompt"] for row in held_out]
for name, model in models.items():
    texts = model.generate(prompts, max_new_tokens=24)
    accuracy[name] = np.mean([text == row["prompt"] + row["completion"]
                              for text, row in zip(texts, held_out)])

print(f"{'':<18}" + "".join(f"{task:>14}" for task in tasks) + f"{'correct':>10}")
for name in models:
    print(f"{name:<18}" + "".join(f"{losses[name, task]:>14.3f}" for task in tasks)
          + f"{accuracy[name]:>10.0%}")

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
axes[2].barh(y, [100 * accuracy[name] for name in models], color=colours, height=0.6)
for at, name in zip(y, models):
    axes[2].text(100 * accuracy[name], at, f" {accuracy[name]:.0%}", va="center", fontsize=9)
axes[2].set(title="Correct answers", xlabel="of 100 questions", xlim=(0, 112))
axes[0].set_yticks(y, list(models))
fig.tight_layout();

# %% [markdown]
# Pre-training lowers the loss on new stories and teaches no answers. Instruction tuning
# alone has to learn the vocabulary of the subject from 256 short answers. Both stages
# together, in this order, give the best answers. (The loss on stories is higher than after
# the first stage: the model forgets what it is no longer trained on, and faster with a
# higher learning rate.) On the command line the same chain is two run files, the second
# with `adapter_init = "pretrained/adapter"` under `[train]`.

# %%
model = models["both stages"]
for row in held_out[:4]:
    question = row["prompt"].split("\n")[1]
    (text,) = model.generate([row["prompt"]], max_new_tokens=24)
    print(f"{question:<34} {text.removeprefix(row['prompt']).strip()}")
