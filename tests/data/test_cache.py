"""The memory-mapped cache: the same examples, built once, complete or not at all."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.data import examples
from qlora_jax.data.arrays import MappedExamples
from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig, Source
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"prompt": f"q{n} ", "completion": "y" * (n % 31 + 1)})
        for n in range(700)
    ]
    path.write_text("\n".join(lines))
    return path


def config_of(path, cache=None, **more):
    options = dict(format="prompt_completion", max_length=48) | more
    return DataConfig(
        path=str(path), cache=None if cache is None else str(cache), **options
    )


@pytest.fixture
def load(tokenizer):
    def load(config, tokenizer=tokenizer, vocab_size=300, **more):
        return load_examples(config, tokenizer, vocab_size=vocab_size, **more)

    return load


def caches(directory):
    return sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))


def counting(make_encoder, counts, delay=0.0):
    """`make_encoder` whose encoders record the rows of each call."""

    def make(*args, **options):
        encoder = make_encoder(*args, **options)

        def encode(rows):
            counts.append(len(rows))
            time.sleep(delay)
            return encoder.encode(rows)

        return dataclasses.replace(encoder, encode=encode)

    return make


@pytest.fixture
def encoded(monkeypatch):
    """The number of rows of each call of an encoder."""
    counts = []
    make = counting(examples.make_encoder, counts)
    monkeypatch.setattr(examples, "make_encoder", make)
    return counts


@pytest.mark.parametrize("packing", [False, True])
def test_cached_examples_equal_those_in_memory(load, tmp_path, rows, packing):
    plain = load(config_of(rows, packing=packing))
    config = config_of(rows, tmp_path / "cache", packing=packing)
    for _ in range(2):  # built, then read
        stored = load(config)
        assert isinstance(stored, MappedExamples)
        assert stored.report == plain.report
        for name in ("tokens", "labels", "offsets", "supervised"):
            ours, theirs = getattr(stored, name), getattr(plain, name)
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(stored.used(), np.unique(plain.tokens))
        options = dict(batch_size=3, accumulation_steps=2, pad_token_id=0, epochs=2)
        ours, theirs = (
            Batches(stored, config, **options),
            Batches(plain, config_of(rows, packing=packing), **options),
        )
        for index in range(len(theirs)):
            for key, values in theirs[index].items():
                np.testing.assert_array_equal(ours[index][key], values)


def test_rows_are_tokenized_once(load, tmp_path, rows, encoded):
    config = config_of(rows, tmp_path / "cache")
    load(config)
    assert sum(encoded) == 700
    load(config)
    moved = rows.rename(tmp_path / "elsewhere.jsonl")
    load(config_of(moved, tmp_path / "cache"))
    assert sum(encoded) == 700


def test_another_order_reuses_the_cache_under_another_fingerprint(
    load, tmp_path, rows, encoded
):
    load(config_of(rows, tmp_path / "cache"))
    for more in ({"seed": 5}, {"shuffle": False}):
        expected = load(config_of(rows, **more)).report.fingerprint
        encoded.clear()
        stored = load(config_of(rows, tmp_path / "cache", **more))
        assert not encoded
        assert stored.report.fingerprint == expected


def test_whatever_changes_the_tokens_makes_another_cache(
    load, byte_tokenizer, tmp_path, rows
):
    cache = tmp_path / "cache"
    load(config_of(rows, cache))
    for more in ({"max_length": 20}, {"train_on": "all"}, {"append_eos": False}):
        load(config_of(rows, cache, **more))
    load(config_of(rows, cache), byte_tokenizer(eos="<s>"))
    load(config_of(rows, cache), vocab_size=301)
    rows.write_text(rows.read_text() + "\n" + '{"prompt": "a", "completion": "b"}')
    load(config_of(rows, cache))
    assert len(caches(cache)) == 7


def test_a_chat_template_is_part_of_the_key(load, tokenizer, tmp_path):
    path, template = tmp_path / "chat.jsonl", tmp_path / "t.jinja"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns}))
    tokens = []
    for end in ("!", "?"):
        template.write_text(
            "{% for m in messages %}{{ m.role }}:{{ m.content }}" + end + "{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        config = config_of(
            path, tmp_path / "c", format="messages", chat_template=str(template)
        )
        tokens.append(load(config)[0][0].tolist())
    assert tokens == [
        tokenizer.encode(text, add_special_tokens=False)
        for text in ("user:a!assistant:b!", "user:a?assistant:b?")
    ]


def test_each_source_of_a_mixture_has_a_cache(load, tmp_path, rows, encoded):
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 9))
    sources = (Source(path=str(rows), weight=3), Source(path=str(other), weight=1))

    def mixture(cache, **more):
        options = dict(format="prompt_completion", max_length=48, packing=True) | more
        return DataConfig(sources=sources, cache=cache and str(cache), **options)

    stored = load(mixture(tmp_path / "cache"))
    assert len(caches(tmp_path / "cache")) == 2
    assert stored.report == load(mixture(None)).report
    encoded.clear()
    load(mixture(tmp_path / "cache", seed=4))
    assert not encoded


@pytest.mark.parametrize("what", ["tokens.i4", "meta.json", "labels.i4"])
def test_a_damaged_cache_is_made_again(load, tmp_path, rows, what, encoded):
    config = config_of(rows, tmp_path / "cache")
    expected = load(config).report
    (entry,) = (tmp_path / "cache" / name for name in caches(tmp_path / "cache"))
    (entry / what).write_bytes((entry / what).read_bytes()[:-7])
    assert load(config).report == expected
    assert sum(encoded) == 1400


def test_rows_that_cannot_be_used_leave_nothing_behind(load, tmp_path, rows):
    rows.write_text(rows.read_text() + '\n{"prompt": 3, "completion": ""}')
    with pytest.raises(UserError, match=r":701: field `prompt` must be a string"):
        load(config_of(rows, tmp_path / "cache"))
    assert caches(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_the_next_process_clears_what_a_killed_process_left(
    load, tokenizer, tmp_path, rows
):
    cache = tmp_path / "cache"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = f"""
import os, signal
from transformers import PreTrainedTokenizerFast
from qlora_jax.data import arrays
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples
real = arrays.Sink.add
count = 0
def add(self, tokens, labels):
    global count
    count += 1
    if count == 300:
        self._streams[0].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, tokens, labels)
arrays.Sink.add = add
tokenizer = PreTrainedTokenizerFast.from_pretrained({str(tmp_path / "tokenizer")!r})
load_examples({config_of(rows, cache)!r}, tokenizer, vocab_size=300)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert caches(cache) == []
    (partial,) = cache.glob(".*.partial")
    assert (partial / "tokens.i4").stat().st_size > 0
    stored = load(config_of(rows, cache))
    assert stored.report == load(config_of(rows)).report
    assert not list(cache.glob(".*.partial")) and len(caches(cache)) == 1


def _load_slowly(config, tokenizer, queue):
    counts = []
    examples.make_encoder = counting(examples.make_encoder, counts, delay=0.2)
    report = load_examples(config, tokenizer, vocab_size=300).report
    queue.put((sum(counts), report.fingerprint))


def test_processes_that_start_together_tokenize_once(tokenizer, tmp_path, rows):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    config = config_of(rows, tmp_path / "cache")
    processes = [
        context.Process(target=_load_slowly, args=(config, tokenizer, queue))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in results) == [0, 700]
    assert len({fingerprint for _, fingerprint in results}) == 1


def test_auto_is_named_after_the_run_directory(load, tmp_path, rows):
    config = config_of(rows, "auto")
    load(config, run_directory=tmp_path / "run")
    assert len(caches(tmp_path / "run.data")) == 1
    with pytest.raises(UserError, match="'auto' is named after a run directory"):
        load(config)


def test_a_cache_that_cannot_be_written_is_refused(load, tmp_path, rows):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="`data.cache`: cannot write .* 8 bytes a token"
    ):
        load(config_of(rows, tmp_path / "file"))


# --- memory ---

_MEASURE = """
import json, re, sys
import numpy as np
from transformers import PreTrainedTokenizerFast
from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

path, tokenizer, cache = sys.argv[1:4]
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
config = DataConfig(path=path, max_length=512, packing=True, cache=cache or None)
def train(examples, steps):
    batches = Batches(examples, config, batch_size=8, pad_token_id=0, steps=steps)
    for index in range(steps):
        batches[index]
warm = DataConfig(path=path + ".small", max_length=512, packing=True)
examples = load_examples(warm, tokenizer, vocab_size=512)
train(examples, 20)
before = memory("VmHWM")
examples = load_examples(config, tokenizer, vocab_size=512)
loaded = memory("VmHWM")
train(examples, len(examples) * 512 // 512 // 8)
examples.used()
print(json.dumps({
    "bytes": 8 * examples.report.tokens,
    "loaded": (loaded - before) * 1024,
    "trained": (memory("VmHWM") - before) * 1024,
}))
"""


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_data(tmp_path, shared_data):
    text = (shared_data / "text/tinyshakespeare/input.txt").read_text()
    documents = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    path = tmp_path / "rows.jsonl"
    path.write_text(lines * 24)
    Path(f"{path}.small").write_text(lines)

    def measure(cache):
        done = subprocess.run(
            [
                *(sys.executable, "-c", _MEASURE, str(path)),
                *(str(shared_data / "stories260K"), str(cache)),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    mapped, held = measure(tmp_path / "cache"), measure("")
    size = mapped["bytes"]
    assert size > 100e6
    # 30 MB of 133 were measured: the pages of the maps that are held, 32 MiB at most,
    # and what packing keeps for each example (of 512 tokens, 4096 bytes). Twice that.
    assert mapped["trained"] < 0.45 * size
    # Without the map, all of it is in memory: the measure sees what it is to see.
    assert held["trained"] > 0.9 * size
