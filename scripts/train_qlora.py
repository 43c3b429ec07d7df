"""Fine-tunes with QLoRA in one file to copy, with every part of the loop in view.

Read it from top to bottom. The base is a tree of frozen arrays, the adapters are a
second tree, and one jitted function takes the state of training to the next one:

    python scripts/train_qlora.py --model path/to/hf-llama --data text.txt --output out

`out` is then a PEFT directory. `qlora-jax train` runs the same step, and adds
checkpoints to continue from, metrics, a plot and a report.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import convert
import qlora_jax as qj
from convert.checkpoint import open_checkpoint
from convert.tokenizer import load_tokenizer

# --- Options, with units ---

parser = argparse.ArgumentParser(description="Fine-tune with QLoRA.")
add = parser.add_argument
add("--model", required=True, help="Hugging Face or bitsandbytes-4bit directory")
add("--data", required=True, help="data file: text, JSON or JSONL")
add("--output", required=True, help="PEFT directory to create")
formats = ("text", "prompt_completion", "alpaca", "messages", "tokens")
add("--format", choices=formats, default="text", help="of the data's rows")
add("--prompt", help='of prompt_completion: a template, e.g. "Q: {question} A: "')
add("--completion", help='of prompt_completion: a template, e.g. "{answer}"')
add("--max-length", type=int, default=256, help="longest example (tokens)")
add("--packing", action="store_true", help="put several examples in one row")
add("--steps", type=int, default=100, help="optimizer steps")
add("--batch-size", type=int, default=8, help="sequences in a micro-batch")
add("--accumulation", type=int, default=1, help="micro-batches in a step")
add("--learning-rate", type=float, default=2e-4, help="peak rate of AdamW")
add("--warmup-steps", type=int, default=0, help="steps in which the rate rises from 0")
add("--r", type=int, default=16, help="rank of the adapters")
add("--lora-alpha", type=int, default=16, help="the update is lora_alpha / r * B A")
dtypes = ("bfloat16", "float16", "float32")
add("--dtype", choices=dtypes, default="bfloat16", help="of the activations")
add("--seed", type=int, default=0, help="of the adapters and the order of the data")
add("--log-every", type=int, default=10, help="steps between printed lines")
args = parser.parse_args()
if Path(args.output).exists():
    parser.error(f"`{args.output}` exists; give a new directory as --output")

# Errors in the options and the data are reported before the base is read.
try:
    # --- The data: rows become tokens and labels, batch i is a function of i ---
    data = qj.DataConfig(
        path=args.data,
        format=args.format,
        prompt=args.prompt,
        completion=args.completion,
        max_length=args.max_length,
        packing=args.packing,
        seed=args.seed,
    )
    settings = qj.TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
    )
    config, tokenizer = open_checkpoint(args.model).config, load_tokenizer(args.model)
    examples = qj.load_examples(data, tokenizer, vocab_size=config.vocab_size)
    print(examples.report.summary())
    batches = qj.Batches(
        examples,
        data,
        batch_size=args.batch_size,
        accumulation_steps=args.accumulation,
        pad_token_id=config.pad_token_id or 0,
        steps=args.steps,
    )

    # --- The base: frozen, its linear layers packed to 4 bits as the file is read ---
    config, base = convert.load_llama(
        args.model, quantization="nf4_dq", dtype=args.dtype, progress=True
    )
    base = jax.tree.map(jnp.asarray, base)

    # --- The adapters: a second tree; nothing else is trained ---
    lora = qj.LoraConfig(r=args.r, lora_alpha=args.lora_alpha)
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    adapters = qj.init_adapters(init_key, base, lora)
    print(f"training {sum(x.size for x in jax.tree.leaves(adapters)):,} parameters")
except qj.UserError as error:
    sys.exit(f"train_qlora: {error}")

# --- The step: state in, state out; compiled once, the old state's memory reused ---

model = qj.Llama(config, qj.Compute(dtype=args.dtype, remat="full", lora=lora))
optimizer = qj.make_optimizer(settings, args.steps)
state = qj.init_state(adapters, optimizer, run_key)
step = jax.jit(
    partial(qj.train_step, model=model, optimizer=optimizer),
    donate_argnums=0,
    compiler_options=qj.compiler_options(),  # as `qlora-jax train` compiles it
)

# --- The loop: a thread makes the next batch while this one is computed ---

began, tokens = time.perf_counter(), 0
for number, batch in enumerate(qj.prefetch(batches, 0, args.steps), 1):
    state, metrics = step(state, base, batch)
    tokens += batch["tokens"].size
    if number in (1, args.steps) or number % args.log_every == 0:
        # Reading a number waits for the device; in between, steps queue up there.
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not metrics["finite"]:
            sys.exit(f"step {number}: loss {loss}, gradient norm {norm}; stopped")
        now = time.perf_counter()
        # The first line's rate includes compilation; padding counts as tokens.
        print(
            f"step {number}/{args.steps}  loss {loss:.4f}  grad norm {norm:.3f}  "
            f"{tokens / (now - began):,.0f} tokens/s",
            flush=True,
        )
        began, tokens = now, 0

# --- The result: a PEFT directory that PEFT, vLLM and `qlora-jax generate` load ---

convert.save_adapter(
    args.output,
    lora,
    jax.device_get(state.adapters),
    config,
    base_model_name_or_path=str(Path(args.model).resolve()),
    base_fingerprint=qj.fingerprint_tree(base),
    extra_files=convert.text_files(args.model),  # its tokenizer
)
print(f"adapter: {args.output}")
