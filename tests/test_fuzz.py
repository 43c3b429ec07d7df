"""Damaged and hostile files of every kind: one clear error, or a correct result.

Each kind has sound files, which are mutated from a seed, and a reader. The law knows
nothing of what a reader supports: it ends in time and memory, with its result or with
a `UserError` whose text a terminal can show, and writes nowhere. (Adapter directories
are in convert/test_fuzz.py.) `make fuzz` tries 20,000 cases.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

from convert import bnb, checkpoint_keys, load_llama, read_json
from qlora_jax.data import bounded_templates
from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import UserError, visible
from qlora_jax.models import shapes
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.runs.report import read_run, render_run
from qlora_jax.runs.toml import read_config
from tests.byte_tokenizers import byte_tokenizer
from tests.convert.test_fuzz import (
    MODEL,
    NUMBERS,
    SECONDS,
    TABLES,
    TEXTS,
    Rng,
    bounded,
    change_bytes,
    change_json,
    change_the_text,
    kind_of,
    pick,
    watched,
)
from tests.packed_checkpoints import CONFIG as PACKED_MODEL
from tests.packed_checkpoints import damaged_file, expected_weight

CASES = 1_000
MANY = 20_000
# The largest messages list a hundred rows.
MESSAGE = 60_000

RUN_FILE = """output_dir = "run"
[model]
path = "base"
[data]
path = ["a.jsonl", "b.jsonl"]
format = "messages"
max_length = 64
[train]
steps = 5
learning_rate = 1e-3
[lora]
r = 4
target_modules = ["q_proj"]
rank_pattern = { q_proj = 8 }
[eval]
fraction = 0.1
"""
TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes", "tool_calls": [{"name": "f"}]},
]
ROWS = {
    "messages": {"messages": TURNS[1:], "tools": []},
    "text": {"text": "some words"},
    "tokens": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    "prompt_completion": {"prompt": "a ", "completion": "b"},
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STATE = {
    **{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]},
    **{"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.01},
}
QUANTIZATION = {
    **{"quant_method": "bitsandbytes", "load_in_4bit": True},
    **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"},
    "llm_int8_skip_modules": ["lm_head", "model.layers.0"],
}
FACTS = {
    **{"planned_steps": 9, "trainable_parameters": 12, "groups": {"q_proj": 12}},
    "optimizer_groups": [{"name": "rest", "parameters": 12, "learning_rate": 0.1}],
    "data": {"rows_read": 3, "dropped": {"empty": 1}, "fingerprint": "f" * 64},
    **{"plan": {"policy": "none", "device_bytes": {"base": 9}}, "device": "cpu"},
}
STEP = {
    **{"step": 1, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 0.1},
    **{"tokens_per_second": 9.0, "seconds": 1.0, "peak_memory_bytes": 99},
}
EVALUATION = {"step": 1, "eval_loss": 2.0, "eval_perplexity": 7.4, "eval_data": "f"}
SAMPLE = {"step": 1, "prompt": "a", "text": " b"}
PIECES = [
    *(
        "{{ ",
        " }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if m %}",
        "{% endif %}",
    ),
    *("{% set a = 'x' ~ a %}", "{% set n = namespace(s='ab') %}", "{% else %}"),
    *(
        "{% set n.s = n.s ~ n.s %}",
        "{{ messages }}",
        "{{ m.content * 3 }}",
        "{% raw %}",
    ),
    *("{{ messages[0].content }}", "{{ m.role }}", "{{ 1 / 0 }}"),
    *("{{ 9 ** 9 ** 4 }}", "{% raw %}"),
    *("{{ x.y.z }}", "{{ 'a' * 9999999999 }}", "{% for i in range(9000) %}", "|tojson"),
    *(
        "{{ raise_exception('\x1b[31m\u202e') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}",
    ),
    *("{{ f() }}", "{% generation %}", "{% endgeneration %}", "{{ m|upper|trim }}"),
    *(
        "{{ '%99999999d' % 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
        "{#",
    ),
    *("{{ m.content.split('a')[3] }}", "{{ [1, 2][9] }}", "{{ strftime_now('%9d') }}"),
    *("{{ m.content|center(99999999999) }}", "{{ -'a' }}", "{% break %}", "\x00"),
]


# --- Mutations ---


def mutate(rng: Rng, data: bytes) -> bytes:
    """Damages bytes, text or, of JSON, a key or a value."""
    kind = int(rng.integers(10))
    if kind < 5:
        try:
            return change_json(rng, data)
        except (ValueError, RecursionError):  # it is not JSON, or not any longer
            return change_bytes(rng, data)
    return change_bytes(rng, data) if kind < 9 else change_the_text(rng, data)


def mutated(rng: Rng, value: Any) -> bytes:
    data = json.dumps(value).encode()
    for _ in range(pick(rng, (0, 1, 1, 1, 2, 3))):
        data = mutate(rng, data)
    return data


def mutate_toml(rng: Rng) -> bytes:
    lines = RUN_FILE.splitlines()
    for _ in range(pick(rng, (1, 1, 2, 4))):
        index = int(rng.integers(len(lines)))
        value = json.dumps(pick(rng, pick(rng, (TEXTS, NUMBERS, TABLES))))
        key = lines[index].partition(" = ")[0]
        lines[index] = pick(rng, (f"{key} = {value}", f"{value} = 1", "", value, key))
    data = "\n".join(lines).encode("utf-8", "replace")
    return change_bytes(rng, data) if rng.random() < 0.4 else data


# --- Kinds: directory, generator -> reads a case ---


def run_file(directory: Path, rng: Rng) -> None:
    (directory / "run.toml").write_bytes(mutate_toml(rng))
    read_config(directory / "run.toml")


def rows(directory: Path, rng: Rng) -> None:
    name = pick(rng, list(ROWS))
    sound = json.dumps(ROWS[name]).encode()
    lines = [sound, mutated(rng, ROWS[name]), sound]
    suffix = pick(rng, ("jsonl", "json", "txt", "jsonl.gz"))
    file = directory / f"rows.{suffix}"
    file.write_bytes(b"\n".join(lines))
    config: Any = {"path": str(file), "format": name, "max_length": 64}
    load_examples(DataConfig(**config), TOKENIZER, vocab_size=300)


def run_directory(directory: Path, rng: Rng) -> None:
    metrics = b"\n".join([mutated(rng, STEP), mutated(rng, EVALUATION)])
    (directory / "metrics.jsonl").write_bytes(metrics + pick(rng, (b"", b"\n")))
    (directory / "samples.jsonl").write_bytes(mutated(rng, SAMPLE))
    (directory / "started.json").write_bytes(mutated(rng, FACTS))
    if rng.random() < 0.5:
        (directory / "report.json").write_bytes(mutated(rng, {**FACTS, "steps": 9}))
    (directory / "config.toml").write_bytes(mutate_toml(rng))
    page = render_run(read_run(directory))
    page.encode()
    assert page == visible(page) and page.startswith("<!doctype html>")


def quantization_state(directory: Path, rng: Rng) -> None:
    data = np.frombuffer(mutated(rng, STATE), np.uint8)
    infos = {"state": SimpleNamespace(nbytes=data.size)}

    class Files(SimpleNamespace):
        def __getitem__(self, name: str) -> Any:
            return infos[name]

    files: Any = Files(read_bytes=lambda name: data)
    try:
        state = bnb._read_state(files, "state", True)
    except ValueError as error:
        raise UserError(f"an unusable state: {error}") from None
    np.float32(state.nested_offset)
    assert all(type(size) is int for size in state.shape)


def packed_checkpoint(directory: Path, rng: Rng) -> None:
    """Weights are those of the file, dequantized to the end, and none is NaN."""
    data = damaged_file(rng)
    (directory / "config.json").write_text(json.dumps(PACKED_MODEL))
    (directory / "model.safetensors").write_bytes(data)
    config, base = load_llama(directory)
    for key, (path, layer) in checkpoint_keys(config).items():
        leaf = base
        for name in path:
            leaf = leaf[name]
        if isinstance(leaf, NF4Tensor):
            weight = bnb.dequantize(leaf[layer])
            assert np.isfinite(weight.astype(np.float32)).all(), f"{key} is not finite"
            expected = expected_weight(data, key).astype(np.float32)
            # XLA may fuse the nested scale's product and sum (one rounding less), and
            # what is rounded to 16 bits may then be the next number. It flushes
            # subnormal numbers to zero.
            tolerance = {"float32": 1e-6, "float16": 1e-3}.get(leaf.dtype, 8e-3)
            got = weight.astype(np.float32)
            tiny = float(np.finfo(np.float32).tiny)
            atol = tolerance * float(np.abs(expected).max()) + tiny
            np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=key)


def model_configuration(directory: Path, rng: Rng) -> None:
    model = {**MODEL, "quantization_config": QUANTIZATION}
    (directory / "config.json").write_bytes(mutated(rng, model))
    config = LlamaConfig.from_hf(read_json(directory / "config.json"))
    packed = ["model.layers.1.mlp.up_proj"]
    skip = (config.quantization_config or {}).get("llm_int8_skip_modules")
    names = bnb.skip_modules(
        skip, dense=["model.layers.0.mlp.gate_proj"], packed=packed
    )
    assert names is None or not any(packed[0].endswith(name) for name in names)


def template(directory: Path, rng: Rng) -> None:
    text = "".join(pick(rng, PIECES) for _ in range(int(rng.integers(1, 7))))
    if rng.random() < 0.5:
        text = change_bytes(rng, TEMPLATE.encode()).decode("utf-8", "replace")
    file = directory / "chat.jinja"
    file.write_bytes(text.encode("utf-8", "replace"))
    renderer = ChatRenderer(TOKENIZER, str(file))
    renderer.examples(TURNS)


TOKENIZER: Any = byte_tokenizer()
KINDS: dict[str, Callable[[Path, Rng], None]] = {
    "a run file": run_file,
    "rows": rows,
    "a run directory": run_directory,
    "a quantization state": quantization_state,
    "a packed checkpoint": packed_checkpoint,
    "a model configuration": model_configuration,
    "a template": template,
}


# --- The law ---


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """Types are not checked, so that wrong ones reach the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def try_cases(kind: str, seeds: range, directory: Path) -> Counter[str]:
    """Reads cases; fails at the end with all that broke the law."""
    ended: Counter[str] = Counter()
    broken: dict[str, list[int]] = {}
    read = KINDS[kind]
    with bounded() as limit:
        for seed in seeds:
            folder = directory / f"{seed}"
            folder.mkdir()
            rng = np.random.default_rng([seed, len(kind)])
            limit(SECONDS)
            try:
                with watched(folder):
                    read(folder, rng)
                end = "read"
            except UserError as error:
                end = "refused"
                if not 10 < len(str(error)) < MESSAGE:
                    broken.setdefault(f"a message of {len(str(error))}", []).append(
                        seed
                    )
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                end = "broken"
                broken.setdefault(kind_of(error), []).append(seed)
            limit(0)
            ended[end] += 1
    report = "\n".join(
        f"{len(seeds)} times, first with seed {seeds[0]}: {what}"
        for what, seeds in broken.items()
    )
    assert not broken, f"{ended} of {kind} broke the law:\n{report}"
    return ended


@pytest.fixture(scope="module", autouse=True)
def _compiled(_as_users_run_it: None) -> None:
    """XLA compiles before memory is bounded, in which it would end the process."""
    all_shapes = shapes(LlamaConfig.from_hf(PACKED_MODEL)).values()
    matrices = {shape for shape in all_shapes if len(shape) == 2}
    forms = itertools.product(
        sorted(matrices), ("float32", "float16", "bfloat16"), (False, True)
    )
    for shape, dtype, double_quant in forms:
        tensor = bnb.empty(shape, double_quant=double_quant, dtype=dtype)
        bnb.dequantize(jax.tree.map(np.zeros_like, tensor))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused_clearly(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_templates, "SECONDS", 1)
    ended = try_cases(kind, range(CASES // len(KINDS)), tmp_path)
    assert ended["read"] >= 3 and ended["refused"] >= 3 or kind == "a run directory"


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_templates, "SECONDS", 1)
    try_cases(kind, range(CASES, CASES + MANY // len(KINDS)), tmp_path)
