"""The memory-mapped cache: the same examples, built once, complete or not at all."""

import gzip
import itertools
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

from qlora_jax.data import arrays, examples
from qlora_jax.data.arrays import MappedExamples
from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig, Source
from qlora_jax.data.encoding import Encoder
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    completions = ("y" * (n % 31 + 1) for n in range(700))
    lines = [{"prompt": f"q{n} ", "completion": y} for n, y in enumerate(completions)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def cache(tmp_path):
    """The directory of the caches."""
    return tmp_path / "cache"


def config_of(path, cache=None, **more):
    options = {"format": "prompt_completion", "max_length": 48} | more
    return DataConfig(path=str(path), cache=cache and str(cache), **options)


@pytest.fixture
def load(tokenizer):
    """A function: path, cache, settings -> the examples."""

    def load(
        path, cache=None, *, tokenizer=tokenizer, vocab_size=300, run=None, **settings
    ):
        config = config_of(path, cache, **settings)
        return load_examples(
            config, tokenizer, vocab_size=vocab_size, run_directory=run
        )

    return load


def caches(directory):
    return sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))


def counting(counts, delay=0.0):
    """An `Encoder` that records the rows of each call."""

    class Counting(Encoder):
        def encode(self, rows):
            counts.append(len(rows))
            time.sleep(delay)
            return super().encode(rows)

    return Counting


@pytest.fixture
def encoded(monkeypatch):
    """The number of rows of each call of an encoder."""
    counts = []
    monkeypatch.setattr(examples, "Encoder", counting(counts))
    return counts


@pytest.mark.parametrize("packing", [False, True])
def test_cached_examples_equal_those_in_memory(load, cache, rows, packing):
    plain = load(rows, packing=packing)
    config = config_of(rows, packing=packing)
    options = {"batch_size": 3, "accumulation_steps": 2, "pad_token_id": 0, "epochs": 2}
    expected = Batches(plain, config, **options)
    for _ in range(2):  # built, then read
        stored = load(rows, cache, packing=packing)
        assert isinstance(stored, MappedExamples)
        assert stored.report == plain.report
        for name in ("tokens", "labels", "offsets", "supervised"):
            ours, theirs = getattr(stored, name), getattr(plain, name)
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(stored.used(), np.unique(plain.tokens))
        batches = Batches(stored, config_of(rows, cache, packing=packing), **options)
        for index in range(len(expected)):
            for key, values in expected[index].items():
                np.testing.assert_array_equal(batches[index][key], values)


def test_rows_are_tokenized_once_whatever_their_order_and_path(
    load, cache, rows, encoded
):
    load(rows, cache)
    load(rows, cache)
    assert sum(encoded) == 700
    orders = [{"seed": 5}, {"shuffle": False}]
    expected = [load(rows, **more).report.fingerprint for more in orders]
    encoded.clear()
    stored = [load(rows, cache, **more).report.fingerprint for more in orders]
    assert stored == expected
    load(rows.rename(rows.with_name("elsewhere.jsonl")), cache)
    assert not encoded


def test_whatever_changes_the_tokens_makes_another_cache(
    load, byte_tokenizer, cache, rows
):
    load(rows, cache)
    for more in ({"max_length": 20}, {"train_on": "all"}, {"append_eos": False}):
        load(rows, cache, **more)
    load(rows, cache, tokenizer=byte_tokenizer(eos="<s>"))
    load(rows, cache, vocab_size=301)
    rows.write_text(rows.read_text() + "\n" + '{"prompt": "a", "completion": "b"}')
    load(rows, cache)
    assert len(caches(cache)) == 7


def test_a_chat_template_and_its_tokens_are_part_of_the_key(
    load, byte_tokenizer, write, cache
):
    tokenizer = byte_tokenizer()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write([{"messages": turns}])
    for end, pad in ("!", "x"), ("?", "x"), ("?", "y"):
        tokenizer.pad_token = pad
        template = write(
            "{{ pad_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}"
            + end
            + "{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "t.jinja",
        )
        options = {"format": "messages", "chat_template": template}
        tokens = load(path, cache, tokenizer=tokenizer, **options)[0][0]
        text = f"{pad}user:a{end}assistant:b{end}"
        assert tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)


def test_each_source_of_a_mixture_has_a_cache(tokenizer, write, cache, rows, encoded):
    line = b'{"prompt": "p", "completion": "c"}\n'
    other = write(gzip.compress(line * 9), "other.jsonl.gz")
    sources = (Source(path=str(rows), weight=3), Source(path=other, weight=1))
    options = {"format": "prompt_completion", "max_length": 48, "packing": True}

    def mixture(**more):
        config = DataConfig(sources=sources, **options, **more)
        return load_examples(config, tokenizer, vocab_size=300)

    stored = mixture(cache=str(cache))
    assert len(caches(cache)) == 2
    assert stored.report == mixture().report
    encoded.clear()
    mixture(cache=str(cache), seed=4)
    assert not encoded


@pytest.mark.parametrize("what", ["tokens.i4", "meta.json", "labels.i4"])
def test_a_damaged_cache_is_made_again(load, cache, rows, what, encoded):
    expected = load(rows, cache).report
    (entry,) = (cache / name for name in caches(cache))
    (entry / what).write_bytes((entry / what).read_bytes()[:-7])
    assert load(rows, cache).report == expected
    assert sum(encoded) == 1400


@pytest.mark.parametrize("what", ["lengths.npy", "supervised.npy", "meta.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\x93NUMPY", b'{"sizes": 3}', b'{"sizes": {}}', b"[" * 99_999, None],
    ids=["empty", "a list", "cut off", "no sizes", "other sizes", "deep", "a pipe"],
)
def test_a_cache_with_other_content_is_made_again(load, cache, rows, what, content):
    expected = load(rows, cache)
    (entry,) = (cache / name for name in caches(cache))
    (entry / what).unlink()
    if content is None:
        os.mkfifo(entry / what)
    else:
        (entry / what).write_bytes(content)
    again = load(rows, cache)
    assert again.report == expected.report
    np.testing.assert_array_equal(again.tokens, expected.tokens)


def test_rows_that_cannot_be_used_leave_nothing_behind(load, cache, rows):
    rows.write_text(rows.read_text() + '\n{"prompt": 3, "completion": ""}')
    with pytest.raises(UserError, match=r":701: field `prompt` must be a string"):
        load(rows, cache)
    assert caches(cache) == [] and not list(cache.glob(".*.partial"))


def _load_until_killed(config, tokenizer):
    add, count = arrays.Sink.add, itertools.count(1)

    def kill_at_300(self, tokens, labels):
        if next(count) == 300:
            self._streams[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, tokens, labels)

    arrays.Sink.add = kill_at_300
    load_examples(config, tokenizer, vocab_size=300)


def test_the_next_process_clears_what_a_killed_process_left(
    load, tokenizer, cache, rows
):
    process = SPAWN.Process(
        target=_load_until_killed, args=(config_of(rows, cache), tokenizer)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert caches(cache) == []
    (partial,) = cache.glob(".*.partial")
    assert (partial / "tokens.i4").stat().st_size > 0
    assert load(rows, cache).report == load(rows).report
    assert not list(cache.glob(".*.partial")) and len(caches(cache)) == 1


def _load_slowly(config, tokenizer, queue):
    counts = []
    examples.Encoder = counting(counts, delay=0.2)
    report = load_examples(config, tokenizer, vocab_size=300).report
    queue.put((sum(counts), report.fingerprint))


def test_processes_that_start_together_tokenize_once(tokenizer, cache, rows):
    queue = SPAWN.Queue()
    args = (config_of(rows, cache), tokenizer, queue)
    processes = [SPAWN.Process(target=_load_slowly, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in results) == [0, 700]
    assert len({fingerprint for _, fingerprint in results}) == 1


def test_auto_is_named_after_the_run_directory_and_a_file_is_no_cache(
    load, tmp_path, rows
):
    load(rows, "auto", run=tmp_path / "run")
    assert len(caches(tmp_path / "run.data")) == 1
    with pytest.raises(UserError, match="'auto' is named after a run directory"):
        load(rows, "auto")
    message = "`data.cache`: cannot write .* 8 bytes a token"
    with pytest.raises(UserError, match=message):
        load(rows, rows)


# --- memory ---

_MEASURE = """
import json, re, sys
from transformers import PreTrainedTokenizerFast
from qlora_jax.data.batches import Batches
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples

def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

path, tokenizer, cache = sys.argv[1:4]
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
def train(path, cache=None, steps=None):
    config = DataConfig(path=path, max_length=512, packing=True, cache=cache)
    examples = load_examples(config, tokenizer, vocab_size=512)
    steps = steps or len(examples) // 8
    batches = Batches(examples, config, batch_size=8, pad_token_id=0, steps=steps)
    for index in range(steps):
        batches[index]
    examples.used()
    return examples.report.tokens
train(path + ".small", steps=20)
before = peak()
tokens = train(path, cache or None)
print(json.dumps({"bytes": 8 * tokens, "trained": peak() - before}))
"""


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_data(tmp_path, cache, shared_data):
    text = (shared_data / "text/tinyshakespeare/input.txt").read_text()
    documents = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    path = tmp_path / "rows.jsonl"
    path.write_text(lines * 24)
    Path(f"{path}.small").write_text(lines)

    def measure(cache):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, path, shared_data / "stories260K", cache],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    mapped, held = measure(cache), measure("")
    size = mapped["bytes"]
    assert size > 100e6
    # 30 MB of 133 were measured: the pages of the maps that are held, 32 MiB at most,
    # and what packing keeps for each example (of 512 tokens, 4096 bytes). Twice that.
    assert mapped["trained"] < 0.45 * size
    # Without the map, all of it is in memory: the measure sees what it is to see.
    assert held["trained"] > 0.9 * size
