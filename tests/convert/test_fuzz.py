"""Damaged and hostile adapter directories: one clear error, or a correct load.

Every case is a sound adapter with one to three mutations, made from a seed. The law
(`judge`) knows nothing of what a loader supports: whatever it does, it ends in time and
memory, with a `UserError` in one paragraph or with arrays that are those of the file
and that survive being saved and loaded. Nothing is written but the directory asked for.
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert.names import adapter_keys
from qlora_jax.cli.convert import main
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from tests.convert.reference import WEIGHTS, equal_arrays, ones

CONFIG = "adapter_config.json"
MODEL = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 6},
    **{"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True},
}
TIED = {**MODEL, "tie_word_embeddings": True}
# The bounds of a case; the worst takes a second, or 100 MB (a long JSON of "[]").
SECONDS = 10
BYTES = 300_000_000
MESSAGE = 20_000  # characters
CASES = 10_000
PIECES = 10

Rng = np.random.Generator
Tensors = dict[str, np.ndarray]


# --- Sound adapters, as PEFT writes them ---

# The other fields that PEFT 0.21 writes, with values that change nothing.
FIELDS: dict[str, Any] = {
    **dict.fromkeys(
        "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config "
        "exclude_modules kasa_config layer_replication layers_pattern "
        "layers_to_transform lora_ga_config megatron_config modules_to_save "
        "monteclora_config revision target_parameters trainable_token_indices "
        "use_bdlora velora_config".split()
    ),
    **dict.fromkeys(
        "ensure_weight_tying fan_in_fan_out lora_bias use_dora use_qalora "
        "use_rslora".split(),
        False,
    ),
    **dict.fromkeys(("alpha_pattern", "rank_pattern", "loftq_config"), {}),
    **{"base_model_name_or_path": "some/base", "bias": "none", "inference_mode": True},
    **{"init_lora_weights": True, "lora_alpha": 4, "lora_dropout": 0.0, "r": 2},
    **{"megatron_core": "megatron.core", "peft_type": "LORA", "peft_version": "0.21.2"},
    **{"qalora_group_size": 16, "target_modules": ["down_proj", "q_proj"]},
    "task_type": "CAUSAL_LM",
}
# name -> fields that differ.
STARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.layers\.(0|1)\..*(q_proj|down_proj)"},
    "excluded": {
        "target_modules": ["q_proj", "down_proj", "k_proj"],
        "exclude_modules": r".*\.k_proj",
    },
    "patterns": {
        "rank_pattern": {r"layers\.[1-9]\.mlp\.down_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "down_proj": 40},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "bias": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": [1, 5]},
}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the file; test_peft.py compares them with PEFT's."""
    lora = LoraConfig.from_peft(FIELDS | STARTS[name], strict=True, skipped=[])
    selection = select(model_params.abstract_base(LlamaConfig.from_hf(MODEL)), lora)
    keys = {key: t.shape for key, t in adapter_keys(selection, lora).items()}
    if name == "embedding":  # PEFT's copy of the base's table
        keys["base_model.model.model.embed_tokens.base_layer.weight"] = (6, 8)
    return keys


SHAPES_OF = {name: shapes_of(name) for name in STARTS}


@dataclass
class Case:
    """An adapter on its way to a damaged directory."""

    fields: dict[str, Any]
    tensors: Tensors
    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    config: bytes = b""
    weights: bytes = b""
    strict: bool = True
    by_tree: bool = False
    """Whether the model is given by its parameters instead of its configuration."""

    def finish(self) -> "Case":
        self.config = json.dumps(self.fields, indent=2).encode()
        self.weights = safetensors.numpy.save(self.tensors, {"format": "pt"})
        return self

    def write(self, path: Path) -> None:
        path.mkdir()
        (path / CONFIG).write_bytes(self.config)
        (path / WEIGHTS).write_bytes(self.weights)


def sound(rng: Rng, name: str) -> Case:
    dtype = pick(rng, (np.float32, np.float32, np.float16, ml_dtypes.bfloat16))
    tensors = {
        key: rng.standard_normal(shape, np.float32).astype(dtype)
        for key, shape in SHAPES_OF[name].items()
    }
    return Case(json.loads(json.dumps(FIELDS | STARTS[name])), tensors)


# --- Mutations: of fields, of tensors, of a header, of bytes ---


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


# fmt: off
SLOW = [
    "(a+)+$", r"(\w+)+$", "(.*)*x", r"(.|[a-z_]+|\w)*?!", ".*" * 30 + "x",
    ".?" * 40 + "." * 30, "(?=(.+)+x).*", "(?:){1000000}", r"model\.layers\.1\.(.+)+x",
]
TEXTS = [
    *SLOW, "", " ", "x", "q_proj", "lm_head", "all-linear", "ALL-LINEAR", "default",
    "true", "none", "all", "lora_only", "gaussian", "orthogonal", "pissa", "eva",
    "LORA", "IA3", "loftq", "pissa_niter_" + "9" * 5000, "0", "-1", "1e999", "nan",
    "(", ")", "[", "*", "a)|(b", "(?i)q_proj", "(?P<a>", r"\1", "(?x)q#", "[[a]", "\\",
    ".*", ".*proj", "(.*)", "(q|v)_proj", r".*\.(q|down)_proj", "(" * 3000, "[^x]*" * 9,
    "../../etc/passwd", "/etc/passwd", "a\0b", "\n\n", "\x1b[31m", "{}", "{0}", "%s",
    "\ud800", "\udfff\ud800", "\u2028", "\U0001f600", "é", "a" * 100_000, "[/red]",
]
NUMBERS = [
    0, 1, 2, 3, -1, -2, 5, 6, 7, 99, 2**16, 2**20 - 1, 2**31, 2**63 - 1, 2**63, 2**64,
    10**30, -(10**30),
    10**400, -(10**4000), 0.0, -0.0, 0.5, 1.0, 2.0, 1.5, 1e-320, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), True, False, None,
]
TABLES = [
    [], {}, [[]], [{}], {"": {}}, [None], [True], [0], [1], [-1], [0, 0], [0, 1],
    [5, 1], [6], [1.0], ["0"], [10**30], ["q_proj"], ["q_proj", 1], ["q_proj"] * 2,
    [""], ["down_proj", "q_proj", "nothing"], ["(", "[a-"], ["(.+)+x"], ["proj"],
    ["layers"], ["model.layers.0.self_attn.q_proj"], ["norm"], ["embed_tokens"],
    ["lm_head"], {"q_proj": 1}, {"q_proj": 3}, {"q_proj": "8"}, {"q_proj": True},
    {"q_proj": None}, {"q_proj": 2**70},
    {"q_proj": [0]}, {"q_proj": -1}, {"q_proj": 10**30}, {"q_proj": 2.5}, {"": 1},
    {"(": 1}, {"(.+)+x": 1}, {"a)|(b": 2}, {"(?i)q_proj": 2}, {".*" * 20 + "x": 2},
    {"embed_tokens": [0, 1]}, {"lm_head": [1, 5]}, {"": [0]}, {"embed_tokens": "1"},
    {f"k{i}": 1 for i in range(1300)}, {f"k{i}.*x": 1 for i in range(99)},
    list(range(3000)), ["x" * 50] * 3000, [json.loads(deep(45))],
]
MATTERING = [
    "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "bias",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "use_dora", "lora_bias",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "use_rslora",
    "init_lora_weights", "peft_type", "lora_dropout", "revision",
    "base_model_name_or_path",
]
PATTERNED = [
    "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "layers_pattern", "modules_to_save",
]
RENAMES = [
    *TEXTS, lambda key: f"../{key}", lambda key: f"/{key}", lambda key: f"{key}\0",
    lambda key: f"{key}\n\n", lambda key: f"{key}\x1b]0;x\a", lambda key: key.upper(),
    lambda key: key.replace("layers.0", "layers.00"), lambda key: key + ".weight",
    lambda key: key.replace("layers.1", "layers.2"), lambda key: "a" * 2000 + key,
    lambda key: key.replace("layers.1", f"layers.{10**30}"), lambda key: key[5:],
    lambda key: key.replace("layers.1", "layers.-1"), lambda key: key[:-7],
    lambda key: key.replace("lora_A", "lora_A.default"),
    lambda key: key.replace("lora_B", "lora_A"),
]
SHAPES = [
    lambda a: np.ascontiguousarray(a.T), lambda a: a.reshape(-1), lambda a: a[None],
    lambda a: a[..., None], lambda a: a[:0], lambda a: a[:1], lambda a: a[..., :-1],
    lambda a: np.concatenate([a, a]), lambda a: np.zeros((), a.dtype),
    lambda a: a.reshape((1,) * 20 + a.shape), lambda a: np.zeros((0, 2**40), a.dtype),
]
KINDS = [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_, np.uint8,
    np.int64, np.int32, np.uint64, ml_dtypes.float8_e4m3fn,
]
# Values that no JSON writer would write.
FRAGMENTS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1" * 4200, deep(60),
    deep(900), deep(100_000), '{"a":' * 2000, "0x10", "01", "+1", "1.", ".5", "'a'",
    "undefined", "tru", '"\\ud800"', '"\\x"', '"a', "", "-", "1e", '"\x01"', "1e-999",
    "[1,]", "{,}", "// x\n1", "\ufeff1", '"' + "a" * 300_000 + '"', "{}" * 3,
    "[" + "0," * 100_000 + "0]",
]
CONTENTS = [
    b"", b" ", b"{}", b"[]", b"null", b"1", b'"x"', b"NaN", b"{", b"\0" * 100,
    deep(100_000).encode(), deep(900).encode(), b'{"a":' * 50_000, b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
]
FULL = [
    b'{"r": [' + b"[]," * 1_330_000 + b"1]}", b'{"r": {' + b'"":1,' * 790_000 + b"}}",
]
NAMES = [
    '"a"', '"\\u0061"', '"\\ud800"', '"\\u0000"', "1", "null", "[1]", '""', "a",
    '"../../x"', '"/etc/x"', '"__metadata__"', '"\ud800"', '"\x01"', '"[/b]"',
    json.dumps("x" * 200_000), json.dumps("\n\n# x"), json.dumps("\x1b[2J"),
]
DTYPES = [
    '"F64"', '"I8"', '"F8_E4M3"', '"F4"', '"C64"', '"Q3"', '"f32"', '""', "0", "null",
    '{"F32":null}', '["F32"]', '"BF16"', '"F16"', '"F32"', '"BOOL"',
]
COUNTS = [
    "-1", "1.0", "1e3", "18446744073709551615", "18446744073709551616", "-0", "1e999",
    "9223372036854775807", "9" * 4000, "9" * 5000, "NaN", "null", '"8"', "true", "[]",
    "{}", "4294967296", "0", "1", "2", "8", "00", "",
]
LISTS = [
    "null", "0", "1", "{}", "[]", '"[1]"', '"x"', deep(200), deep(300), deep(100_000),
    "[0, 18446744073709551615, 18446744073709551615, 18446744073709551615]",
    "[" + "4294967296," * 39 + "1]", "[" + "1," * 69 + "1]", '["F32", [1], [0, 4]]',
]
METADATA = [
    "", "null", "1", "[]", '{"a":1}', '{"a":null}', '{"a":{"b":"c"}}', deep(200),
    '{"a":"b","a":"c"}', '{"\\ud800":"x"}', '{"format":"pt"},"__metadata__":{}',
    '{"a":"' + "b" * 300_000 + '"}',
    '{"qlora_jax_base_fingerprint":"\\u001b[2J\\n\\n"}',
]
# fmt: on


RAW = {int: COUNTS, str: [*NAMES, *DTYPES], list: LISTS}


def hostile(rng: Rng) -> Any:
    value = pick(rng, pick(rng, (TEXTS, NUMBERS, TABLES)))
    wrap = rng.random()
    if wrap < 0.1:
        return [value]
    if wrap < 0.15:
        return {"q_proj": value}
    if wrap < 0.2 and isinstance(value, str):
        return {value: pick(rng, NUMBERS)}
    return value


def set_field(rng: Rng, case: Case) -> None:
    names = pick(rng, (list(FIELDS), MATTERING, MATTERING, TEXTS))
    case.fields[pick(rng, names)] = hostile(rng)


def set_a_pattern(rng: Rng, case: Case) -> None:
    """A regular expression, in every field that takes one."""
    text = pick(rng, [*SLOW, *TEXTS])
    name = pick(rng, PATTERNED)
    if name.endswith("_pattern") and name != "layers_pattern":
        case.fields[name] = {text: pick(rng, (1, 2, 3))}
    else:
        case.fields[name] = pick(rng, (text, [text], ["q_proj", text]))
    if name == "layers_pattern":
        case.fields["layers_to_transform"] = pick(rng, ([0], [1], [0, 1]))


def set_fields_of_another(rng: Rng, case: Case) -> None:
    """Claims to be another kind of adapter than the tensors are."""
    case.fields |= STARTS[pick(rng, list(STARTS))]


def drop_tensor(rng: Rng, case: Case) -> None:
    case.tensors.pop(pick(rng, list(case.tensors) or [""]), None)


def rename_tensor(rng: Rng, case: Case) -> None:
    if case.tensors:
        key = pick(rng, list(case.tensors))
        trick = pick(rng, RENAMES)
        new = trick(key) if callable(trick) else trick
        case.tensors[new.encode(errors="replace").decode()] = case.tensors.pop(key)


def add_tensor(rng: Rng, case: Case) -> None:
    keys = [key for shapes in SHAPES_OF.values() for key in shapes]
    shape = tuple(rng.integers(0, 4, size=rng.integers(0, 4)).tolist())
    for _ in range(pick(rng, (1, 1, 1, 40))):
        key = pick(rng, [*keys, f"x{rng.integers(10**9)}", "model.norm.weight"])
        case.tensors[key] = np.ones(shape, np.float32)


def reshape_tensor(rng: Rng, case: Case) -> None:
    if case.tensors:
        key = pick(rng, list(case.tensors))
        a = case.tensors[key] = pick(rng, SHAPES)(np.atleast_1d(case.tensors[key]))
        assert isinstance(a, np.ndarray)


def retype_tensor(rng: Rng, case: Case) -> None:
    for key in case.tensors:
        if rng.random() < 0.5:
            array = np.nan_to_num(case.tensors[key].astype(np.float32), nan=1)
            case.tensors[key] = np.asarray(array.clip(0, 9)).astype(pick(rng, KINDS))


def spoil_values(rng: Rng, case: Case) -> None:
    if case.tensors:
        key = pick(rng, list(case.tensors))
        array = case.tensors[key].copy()
        if array.size and array.dtype.name in ("float32", "float16", "bfloat16"):
            bad = pick(rng, (np.nan, -np.nan, np.inf, -np.inf, 3e38, -0.0, 1e-45))
            with np.errstate(all="ignore"):
                array.reshape(-1)[int(rng.integers(array.size))] = np.float32(bad)
            case.tensors[key] = array


# fmt: off
FIELD_MUTATIONS = [
    set_field, set_field, set_field, set_a_pattern, set_fields_of_another,
]
TENSOR_MUTATIONS = [
    drop_tensor, rename_tensor, add_tensor, reshape_tensor, retype_tensor, spoil_values,
]
# fmt: on


class Raw(str):
    """Text that stands in JSON as it is: what no JSON writer would write."""


class Pairs(list):
    """A JSON object: its [key, value] lists."""


def dump(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        pairs = (pair if isinstance(pair, list) else [pair] for pair in value)
        return "{" + ",".join(":".join(map(dump, pair)) for pair in pairs) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(dump, value))}]"
    return json.dumps(value)


def near(rng: Rng, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + int(rng.integers(-8, 9))
    if isinstance(value, str):
        position = int(rng.integers(len(value) + 1))
        return value[:position] + pick(rng, TEXTS) + value[position:]
    return type(value)(value[::-1]) if isinstance(value, list) else hostile(rng)


def slots(node: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Every place in a tree of lists."""
    for index, child in enumerate(node):
        yield node, index
        if isinstance(child, list):
            yield from slots(child)


def change_json(rng: Rng, data: bytes) -> bytes:
    """Changes one key or value, of a configuration or a header."""
    tree = [json.loads(data, object_pairs_hook=lambda p: Pairs(map(list, p)))]
    node, index = pick(rng, list(slots(tree)))
    old = node[index]
    kind = int(rng.integers(10))
    if kind < 4:
        choices = pick(rng, (RAW.get(type(old), LISTS), FRAGMENTS))
        node[index] = Raw(pick(rng, choices))
    elif kind == 4:
        node[index] = hostile(rng)
    elif kind < 7:
        node[index] = near(rng, old)
    elif kind == 7:
        del node[index]
    elif kind == 8:
        node.insert(index, pick(rng, (old, old, [hostile(rng)] * 2)))
    else:  # two in each other's place
        other = int(rng.integers(len(node)))
        node[index], node[other] = node[other], old
    return "".join(map(dump, tree)).encode(errors="surrogatepass")


def change_the_text(rng: Rng, data: bytes) -> bytes:
    kind, text = int(rng.integers(20)), data.decode(errors="replace")
    changed = [
        *(data * 2, b"\xef\xbb\xbf" + data, text.encode("utf-16")),
        *(text.encode("utf-32"), data + b"\0", b"\xff" + data, data + b"}"),
        data.replace(b'"', b"'"),
        data.replace(b'"', b'"\xed\xa0\x80', 1),
        data[:1] + b'"r": 2, "r": 3, "peft_type": "LORA",' + data[1:],
        data[:1] + b'"__proto__": {"r": 1}, "\\ud800": 1,' + data[1:],
        data[:1] + b" " * pick(rng, (10, 3_990_000, 4_000_000)) + data[1:],
    ]
    if kind < len(changed):
        return changed[kind]
    return pick(rng, FULL if rng.random() < 0.03 else CONTENTS)


def change_bytes(rng: Rng, data: bytes) -> bytes:
    """Bit flips, insertions, deletions, copies and cuts, as a bad disk makes them."""
    out = bytearray(data)
    for _ in range(pick(rng, (1, 1, 1, 2, 5, 50))):
        # The header is where it hurts; the tensors are most of the bytes.
        end = len(out) if rng.random() < 0.5 else min(len(out), 400)
        position = int(rng.integers(end + 1))
        length = pick(rng, (1, 1, 2, 8, 64))
        kind = int(rng.integers(7))
        if kind <= 1 and position < len(out):
            out[position] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            out[position:position] = rng.bytes(length)
        elif kind == 3:
            del out[position : position + length]
        elif kind == 4:
            byte = pick(rng, (b"\0", b"\xff", b'"', b"9"))
            out[position : position + length] = byte * length
        elif kind == 5:
            out[position:position] = out[position : position + length]
        elif rng.random() < 0.3:
            del out[position:]
    return bytes(out)


def change_header(rng: Rng, data: bytes) -> bytes:
    """A header, its length or the data behind it that are not what they were."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = int(rng.integers(15))
    if kind == 0:  # a claim about the header's own length
        lengths = (0, 1, 7, 99_999_999, 100_000_001, 2**31, 2**53, 2**63, 2**64 - 1)
        lengths += (length - 1, length + 1, len(data) - 8, len(data), len(data) - 7)
        return pick(rng, lengths).to_bytes(8, "little") + data[8:]
    if kind == 1:  # a long one
        header += b" " * pick(rng, (1, 7, 3_900_000, 4_000_000))
    elif kind == 2:  # many tensors without a byte
        empty = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
        many = ",".join(f'"t{i}":{{{empty}}}' for i in range(3000))
        header = b"{" + many.encode() + b"," + header[1:]
    elif kind == 3:
        rest = pick(rng, (rest + b"\0", rest[:-1], rest * 2, b"", b"\0" + rest))
    elif kind == 4:
        header = change_the_text(rng, header)
    elif kind == 5:
        metadata = pick(rng, METADATA).encode()
        header = header.replace(b'{"format":"pt"}', metadata)
    else:
        header = change_json(rng, header)
    return len(header).to_bytes(8, "little") + header + rest


CONFIG_BYTES = [change_json, change_json, change_json, change_the_text, change_bytes]
WEIGHT_BYTES = [change_header, change_header, change_header, change_bytes, change_bytes]


def make_case(seed: int) -> Case:
    """The case of a seed: of its weights, its configuration, or both."""
    rng = np.random.default_rng([20_261_121, seed])
    scope = ("weights", "config", "both")[seed % 3]
    case = sound(rng, pick(rng, list(STARTS)))
    case.model = TIED if rng.random() < 0.2 else MODEL
    case.strict = rng.random() < 0.8
    case.by_tree = rng.random() < 0.2
    changed = False
    for _ in range(pick(rng, (1, 1, 1, 2, 3))):
        for other, mutations, chance in (
            ("weights", FIELD_MUTATIONS, 0.7),
            ("config", TENSOR_MUTATIONS, 0.5),
        ):
            if scope != other and rng.random() < chance:
                pick(rng, mutations)(rng, case)
                changed = True
    case.finish()
    if scope != "weights" and (rng.random() < 0.5 or not changed):
        case.config = pick(rng, CONFIG_BYTES)(rng, case.config)
    if scope != "config" and (rng.random() < 0.6 or not changed):
        case.weights = pick(rng, WEIGHT_BYTES)(rng, case.weights)
    return case


# --- The law ---


class Hang(BaseException):
    """A case took too long."""


# Time of the processor, which a machine with other work does not lengthen. What waits
# takes none: it has this many times longer by the clock on the wall.
PATIENCE = 30


def _ring(number: int, frame: Any) -> None:
    raise Hang(f"no end after {SECONDS} seconds")


@contextlib.contextmanager
def bounded() -> Iterator[Callable[[float], None]]:
    """Ends what takes too long or too much memory, by an exception in its midst.

    Gives a function that starts the clock: seconds, 0 to stop it. It rings again and
    again: what is raised in a callback of the collector gets lost.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    rings = (signal.SIGPROF, signal.SIGALRM)
    before = [signal.signal(ring, _ring) for ring in rings]

    def limit(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds, 1)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds, 1)

    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    try:
        yield limit
    finally:
        limit(0)
        for ring, handler in zip(rings, before, strict=True):
            signal.signal(ring, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# What was written since the watch began; None while nobody watches. A hook of the
# interpreter sees every file that Python opens or makes, and cannot be taken off.
_written: list[str] | None = None
_MAKES = ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.truncate", "os.remove")


def _see(event: str, args: tuple[Any, ...]) -> None:
    if _written is None:
        return
    if event == "open":
        if isinstance(args[0], int) or args[0] == os.devnull:  # a pipe
            return
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if isinstance(args[2], int) and args[2] & writes:
            _written.append(str(args[0]))
    elif event in _MAKES:
        _written.extend(
            str(a) for a in args if isinstance(a, str | bytes | os.PathLike)
        )
    elif event == "subprocess.Popen" and "bounded_templates" in str(args[1]):
        pass  # the process in which templates are rendered
    elif event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec"):
        _written.append(f"{event} {args!r}")


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """Watches files; types are not checked, so that wrong ones reach the code."""
    sys.addaudithook(_see)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@contextlib.contextmanager
def watched(allowed: Path) -> Iterator[None]:
    """Fails where something was written outside of `allowed`."""
    global _written
    _written = []
    try:
        yield
    finally:
        written, _written = _written, None
    outside = [
        path
        for path in written
        if not f"{path}{os.sep}".startswith(f"{allowed}{os.sep}")
        and "__pycache__" not in path
    ]
    assert not outside, f"written outside: {outside}"


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: the cases write 100,000 files."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if usable else tmp_path) as path:
        yield Path(path)


def check_message(message: str) -> None:
    start = repr(message[:60])
    assert 20 < len(message) < MESSAGE, f"a message of another length: {start}"
    # One sentence after the other, or a list with a line for each problem.
    heading, *listed = message.split("\n- ")
    if listed:
        assert re.search(r"\d problems with the LoRA settings:$", heading), start
        assert len(listed) > 1, f"a list of one: {start}"
    for part in (heading, *listed):
        assert part.isprintable(), f"a message with control characters: {start}"


def judge(directory: Path, model: Any, out: Path, strict: bool = True) -> str:
    """Loads; returns how it ended. Anything that breaks the law is raised."""
    try:
        lora, adapters = convert.load_adapter(directory, model, strict=strict)
    except UserError as error:
        check_message(str(error))
        return "refused"
    for array in jax.tree.leaves(adapters):
        assert array.dtype == np.float32 and np.isfinite(array).all()
    convert.save_adapter(out, lora, adapters, model)
    assert equal_arrays(convert.load_adapter(out, model)[1], adapters)
    if strict:
        # The library reads both files; what has the same name is the same.
        a, b = (safetensors.numpy.load_file(d / WEIGHTS) for d in (directory, out))
        for key in a.keys() & b.keys():
            np.testing.assert_array_equal(a[key].astype(np.float32), b[key], key)
    return "loaded"


def kind_of(error: BaseException) -> str:
    """Where an error came from: what is the same for all cases of one cause."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).partition("\n")[0][:120]
    return (
        f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {text!r}"
    )


def try_cases(cases: Iterator[tuple[int, Case]], sandbox: Path) -> Counter[str]:
    """Judges cases; fails at the end with all that broke the law."""
    source, saved = sandbox / "adapter", sandbox / "saved"
    ended: Counter[str] = Counter()
    broken: dict[str, list[int]] = {}
    with bounded() as limit:
        for seed, case in cases:
            case.write(source)
            saved.mkdir()
            limit(SECONDS)
            try:
                model = LlamaConfig.from_hf(case.model)
                if case.by_tree:
                    base = model_params.abstract_base(model)
                    model = jax.tree.map(lambda leaf: ones(leaf.shape), base)
                with watched(saved):
                    end = judge(source, model, saved / "out", strict=case.strict)
                assert os.listdir(saved) == (["out"] if end == "loaded" else [])
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                end = "broken"
                broken.setdefault(kind_of(error), []).append(seed)
            limit(0)
            ended[end] += 1
            shutil.rmtree(source)
            shutil.rmtree(saved)
    report = "\n".join(
        f"{len(seeds)} times, first in make_case({seeds[0]}): {kind}"
        for kind, seeds in broken.items()
    )
    assert not broken, f"{ended['broken']} of {ended.total()} broke the law:\n{report}"
    return ended


# --- Tests ---


def test_the_bounds_bind(sandbox):
    with bounded(), pytest.raises(MemoryError):
        np.ones(2 * BYTES, np.uint8)
    with bounded() as limit, pytest.raises(Hang):
        limit(0.01)
        re.fullmatch("(.*)*x", "a" * 50)
    with pytest.raises(AssertionError, match="written outside"):
        with watched(sandbox / "saved"):
            (sandbox / "elsewhere").touch()


@pytest.mark.parametrize("name", STARTS)
def test_the_adapters_to_start_from_are_sound(name, sandbox):
    case = sound(np.random.default_rng(0), name).finish()
    assert try_cases(iter([(0, case)]), sandbox) == {"loaded": 1}


@pytest.mark.parametrize("piece", range(PIECES))
def test_a_mutated_adapter_is_refused_clearly_or_loaded_correctly(piece, sandbox):
    seeds = range(piece, CASES, PIECES)
    ended = try_cases(((seed, make_case(seed)) for seed in seeds), sandbox)
    # Both ends are met: the mutations are neither all harmless nor all crude.
    assert ended["loaded"] > len(seeds) // 100
    assert ended["refused"] > len(seeds) // 2


def run_main(arguments: list[str]) -> tuple[int, str, str]:
    """Runs `qlora-convert`; its streams are those of a terminal that speaks UTF-8."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    for stream in (out, err):
        stream.flush()
    return status, *(stream.buffer.getvalue().decode() for stream in (out, err))


def check_command(sandbox: Path, *arguments: str) -> None:
    """Runs a command in the sandbox, and holds what it says and leaves to the law."""
    saved = sandbox / "saved"
    saved.mkdir()
    with bounded() as limit, watched(saved):
        limit(SECONDS)
        status, out, err = run_main([a.replace("@", str(sandbox)) for a in arguments])
    failure = 2 if arguments[0] == "verify" else 1
    assert status in (0, 1, failure)
    if err:
        assert status == failure and not out
        assert err.startswith(f"qlora-convert {arguments[0]}: "), err
        assert "Traceback" not in err
        assert err.endswith((".\n", "?\n")), err
        check_message(err.strip())
    else:
        assert out
    done = status == 0 and arguments[0] == "adapter"
    assert os.listdir(saved) == (["out"] if done else [])
    shutil.rmtree(saved)


def test_the_command_line_prints_a_paragraph(sandbox):
    (sandbox / "base").mkdir()
    good = sound(np.random.default_rng(0), "plain").finish()
    good.write(sandbox / "good")
    cases = [make_case(seed) for seed in range(CASES, CASES + 40)]
    for text in TEXTS:
        if text.isprintable() and text and len(text) < 200:
            # Names that mean something to whatever prints them.
            tensors = {**good.tensors, text: np.ones((2, 2), np.float32)}
            cases.append(Case(good.fields, tensors).finish())
    for case in cases:
        (sandbox / "base" / "config.json").write_text(json.dumps(case.model))
        case.write(sandbox / "adapter")
        convert = ["adapter", "@/adapter", "@/saved/out", "--base", "@/base"]
        check_command(sandbox, *convert)
        check_command(sandbox, "verify", "@/adapter", "@/good")
        check_command(sandbox, "verify", "@/good", "@/adapter", "--json")
        shutil.rmtree(sandbox / "adapter")
