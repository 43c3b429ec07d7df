"""Makes a small model that tells stories, and questions about held-out stories.

    python scripts/demo/story_model.py --output path/to/new
    python scripts/demo/story_model.py --output path/to/new --family qwen3

writes `base/`, a Hugging Face directory (a Llama of 390,656 parameters, or a Qwen3 of
358,016 with norms of queries and keys and shared key-value heads, trained here on
generated stories), and `train.jsonl` and `held_out.jsonl`, prompts and completions in
one fixed style that the base has never seen. The demo fine-tunes the base on the
questions. Equal arguments give equal files.
"""

import argparse
import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import convert
from qlora_jax import Llama, LlamaConfig
from qlora_jax.models.layers import Compute

STORIES = 12_800
# `model_type` -> its name, and the fields of config.json that differ from a Llama's.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
}

# --- The words of task 1 (stories) and task 2 (questions about them) ---

NAMES = "Mia Tom Ana Ben Lily Max Zoe Sam Eva Leo Ida Jon Kim Ned Ola Pia".split()
COLOURS = "red blue green white black brown pink gold".split()
THINGS = "ball kite hat book drum boat bell cup lamp coin rope ring".split()
COUNTED = "shells apples stones leaves nuts cards".split()
LOCATIONS = "park river market school garden bridge harbour mill".split()


class Scene:
    """One who finds a thing somewhere, and things counted together."""

    def __init__(self, draw: random.Random) -> None:
        self.name, self.friend = draw.sample(NAMES, 2)
        self.colour, self.thing = draw.choice(COLOURS), draw.choice(THINGS)
        self.counted, self.location = draw.choice(COUNTED), draw.choice(LOCATIONS)
        self.first, self.more = draw.randint(1, 9), draw.randint(1, 9)
        goes = draw.choice(["goes", "walks"])
        finds = draw.choice(["finds", "sees"])
        self.text = (
            f"{self.name} {goes} to the {self.location}. There {self.name} {finds} a "
            f"{self.colour} {self.thing} and {self.first} {self.counted}. Then "
            f"{self.friend} brings {self.more} {self.counted} for {self.name}."
        )


def story(draw: random.Random) -> str:
    """Returns a scene and how it continues: what the base learns.

    Every word of the answers below occurs here. A token that training never showed has
    next to no output embedding, and no adapter can give it one.
    """
    s = Scene(draw)
    ends = [
        f"Now {s.name} has {s.first + s.more} {s.counted}.",
        f"The {s.colour} {s.thing} is at the {s.location}.",
        f"Zoe asks: Who gave {s.name} the {s.counted}? It was {s.friend}, of course.",
    ]
    draw.shuffle(ends)
    return " ".join([s.text, *ends])


def question(draw: random.Random) -> dict[str, str]:
    """Returns a scene with a question, and the answer in one fixed style: task 2."""
    s = Scene(draw)
    text, answer = draw.choice(
        [
            (f"Where is {s.name}?", f"{s.name} is at the {s.location}"),
            (
                f"What is at the {s.location}?",
                f"The {s.colour} {s.thing} is at the {s.location}",
            ),
            (
                f"How many {s.counted} does {s.name} have?",
                f"{s.name} has {s.first + s.more} {s.counted}",
            ),
            (f"Who gave {s.name} the {s.counted}?", f"It was {s.friend}"),
        ]
    )
    return {
        "prompt": f"{s.text}\nQ: {text}\nA:",
        "completion": f" {answer}, of course.",
    }


def distinct_questions(draw: random.Random, count: int) -> list[dict[str, str]]:
    """Returns questions about scenes that are all different."""
    by_scene: dict[str, dict[str, str]] = {}
    while len(by_scene) < count:
        row = question(draw)
        by_scene.setdefault(row["prompt"].split("\n")[0], row)
    return list(by_scene.values())


# --- The base: a model trained on stories, in Hugging Face form ---


def make_tokenizer(texts: list[str], path: Path) -> Tokenizer:
    """Trains a byte-level BPE (the kind Llama 3 has) and writes its two files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens, each row padded with its end [N, T], and their numbers [N]."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    counts = np.array([len(row) for row in rows])
    tokens = np.full(
        (len(rows), counts.max() + 1), tokenizer.token_to_id("</s>"), np.int32
    )
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, counts


def make_config(tokenizer: Tokenizer, family: str) -> LlamaConfig:
    """Returns the configuration of the small model."""
    return LlamaConfig.from_hf(
        {
            "model_type": family,
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.05,  # 0.02 suits wider models; this learns faster
            "bos_token_id": tokenizer.token_to_id("<s>"),
            "eos_token_id": tokenizer.token_to_id("</s>"),
            **FAMILIES[family][1],
        }
    )


def make_base(
    directory: Path, *, steps: int, family: str = "llama", batch_size: int = 16
) -> str:
    """Trains all parameters of a small model on stories; returns a summary."""
    draw = random.Random(1)
    texts = [story(draw) for _ in range(STORIES)]
    tokenizer = make_tokenizer(texts[:2000], directory / "tokenizer")
    tokens, counts = tokenize(tokenizer, texts)
    config = make_config(tokenizer, family)
    model = Llama(config, Compute(dtype="float32", remat="none"))
    params: Any = model.init(jax.random.key(0), tokens[:1, :4])["params"]
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))

    def mean_loss(params: Any, tokens: jax.Array, counts: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], tokens[:, 1:]
        )
        # The end of the text is learned, what pads the row behind it is not.
        real = jnp.arange(1, tokens.shape[1])[None] <= counts[:, None]
        return jnp.where(real, losses, 0.0).sum() / real.sum()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, tokens: jax.Array, counts: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(mean_loss)(params, tokens, counts)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    moments = optimizer.init(params)
    losses = []
    for index in range(steps):
        start = index * batch_size % (len(tokens) - batch_size + 1)
        batch = slice(start, start + batch_size)
        params, moments, loss = step(params, moments, tokens[batch], counts[batch])
        losses.append(loss)
    params = jax.device_get(params)
    convert.save_llama(
        directory / "base", config, params, tokenizer_from=directory / "tokenizer"
    )
    shutil.rmtree(directory / "tokenizer")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (
        f"{FAMILIES[family][0]} of {size:,} parameters, {steps} steps on generated "
        f"stories, loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}"
    )


def main() -> None:
    """Writes the model and the questions."""
    parser = argparse.ArgumentParser(description="Make a story model and questions.")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="directory to write them to")
    add("--family", choices=FAMILIES, default="llama", help="`model_type` of the base")
    add("--steps", type=int, default=800, help="training of the base (steps)")
    add("--questions", type=int, default=3000, help="in train.jsonl (rows)")
    add("--held-out", type=int, default=100, help="in held_out.jsonl (rows)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    print(make_base(args.output, steps=args.steps, family=args.family))
    rows = distinct_questions(random.Random(2), args.questions + args.held_out)
    for name, part in (
        ("train", rows[: args.questions]),
        ("held_out", rows[args.questions :]),
    ):
        lines = [json.dumps(row) + "\n" for row in part]
        (args.output / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
