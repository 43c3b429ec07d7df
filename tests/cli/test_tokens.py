"""`qlora-jax tokens` on a real model whose tables were damaged, as base models are."""

import json

import numpy as np
import pytest

import convert
from convert.added_tokens import copy_with_added_tokens
from convert.tokenizer import load_tokenizer
from qlora_jax.models.vocabulary import untrained_rows
from qlora_jax.runs.loading import load

TEXT = "Once upon a time there was a little dog."


@pytest.fixture
def damaged(shared_data, tmp_path):
    """stories260K with two rows zero, one of them of a token that TEXT uses."""
    source = shared_data / "stories260K"
    config, base = convert.load_llama(source, quantization=None)
    used = load_tokenizer(source)(TEXT)["input_ids"]
    unused = next(i for i in range(300, 512) if i not in used)
    table = base["model"]["embed_tokens"]["weight"]
    # The bytes and </s>, which it never saw, become rows like others.
    noise = np.random.default_rng(0).standard_normal(table.shape)
    while (never := untrained_rows(table)).any():
        table[never] = 0.3 * noise[never]
    table[[used[2], unused]] = 0
    convert.save_llama(tmp_path / "damaged", config, base, tokenizer_from=source)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "damaged", used[2], unused


@pytest.fixture
def report(cli):
    def report(*args) -> dict:
        status, out, _ = cli("tokens", *args, "--json")
        assert status == 0
        return json.loads(out)

    return report


def test_rows_that_the_data_use_are_reported_and_repaired(damaged, tmp_path, report):
    path, bad, unused = damaged
    data = ["--data.path", tmp_path / "text.txt"]
    untrained = report(path, *data)
    assert untrained["untrained_rows"] == {"embed_tokens": 2}
    (named,) = untrained["untrained_and_used"]["embed_tokens"]
    assert named.startswith(f"{bad} ")
    # Nothing of the tokenizer's own is untrained.
    assert report(path)["untrained_and_used"] == {"embed_tokens": []}

    out = tmp_path / "repaired"
    report(path, *data, "--repair", "mean", "--output-dir", out)
    assert report(out, *data)["untrained_and_used"] == {"embed_tokens": []}
    before, after = (
        convert.load_llama(p, quantization=None)[1]["model"]["embed_tokens"]["weight"]
        for p in (path, out)
    )
    changed = np.flatnonzero((before != after).any(axis=1))
    np.testing.assert_array_equal(changed, [bad])
    trained = np.delete(before, [bad, unused], axis=0).mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(after[bad], trained, atol=1e-6)


def test_the_end_of_text_of_a_model_that_never_saw_one_is_reported(shared_data, report):
    used = report(shared_data / "stories260K")["untrained_and_used"]["embed_tokens"]
    assert [int(entry.split()[0]) for entry in used] == [0, 2]  # <unk> and </s>


def test_with_nothing_to_repair_the_model_stays(shared_data, tmp_path, cli):
    source, out = shared_data / "babyllama-char105", tmp_path / "out"
    status, _, err = cli("tokens", source, "--repair", "mean", "--output-dir", out)
    assert status == 0
    assert "Note: no token that is used has an untrained row" in err
    before, after = (d / "model.safetensors" for d in (source, out))
    assert before.read_bytes() == after.read_bytes()


def test_new_tokens_get_rows_and_names(shared_data, tmp_path, report):
    source, out = shared_data / "stories260K", tmp_path / "grown"
    added = report(source, "--add", "<ask>", "<answer>", "--output-dir", out)
    assert added["new_tokens"] == [512, 513] and added["new_vocab_size"] == 514
    tokenizer = load_tokenizer(out)
    ids = tokenizer("<ask>Once")["input_ids"]
    assert 512 in ids and "<ask>" not in tokenizer.decode(ids, skip_special_tokens=True)
    # The files are those of the base, with two tokens more.
    before, after = ((d / "tokenizer_config.json").read_text() for d in (source, out))
    assert before == after
    before, after = (
        json.loads((d / "tokenizer.json").read_text()) for d in (source, out)
    )
    added = after.pop("added_tokens")
    assert added[:-2] == before.pop("added_tokens") and before == after
    assert [(t["id"], t["content"]) for t in added[-2:]] == (
        [(512, "<ask>"), (513, "<answer>")]
    )
    model = load(out, dtype="float32", quantization=None)
    assert model.logits([ids]).shape[-1] == 514
    plain = load(source, dtype="float32", quantization=None)
    tokens = [plain.tokenizer("Once upon")["input_ids"]]
    # A product of another width sums in another order.
    np.testing.assert_allclose(
        model.logits(tokens)[..., :512], plain.logits(tokens), atol=3e-5
    )


def test_tokens_that_never_had_a_row_get_one(shared_data, tmp_path, report):
    source, out = shared_data / "stories260K", tmp_path / "out"
    larger = tmp_path / "larger"
    larger.mkdir()
    copy_with_added_tokens(source, larger, ["<pad>"])
    for name in ("config.json", "model.safetensors"):
        (larger / name).write_bytes((source / name).read_bytes())
    settings = json.loads((larger / "tokenizer_config.json").read_text())
    settings["pad_token"] = "<pad>"
    (larger / "tokenizer_config.json").write_text(json.dumps(settings))
    found = report(larger)
    assert found["used_without_a_row"] == ["512 '<pad>'"]
    assert (found["vocab_size"], found["tokenizer_size"]) == (512, 513)
    repaired = report(larger, "--repair", "mean", "--output-dir", out)
    assert repaired["new_vocab_size"] == 513
    assert report(out)["used_without_a_row"] == []
    before, after = (
        convert.load_llama(p, quantization=None)[1]["model"]["embed_tokens"]["weight"]
        for p in (larger, out)
    )
    assert len(after) == 513
    kept = ~untrained_rows(before)
    np.testing.assert_array_equal(after[:512][kept], before[kept])
    # A mean of those that were trained, in float64 and rounded once.
    np.testing.assert_allclose(after[512], before[kept].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("older", ["added_tokens.json", "added_tokens_decoder"])
def test_tokens_are_added_wherever_the_tokenizer_lists_them(
    shared_data, tmp_path, older
):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((shared_data / "stories260K" / name).read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text())
    if older == "added_tokens_decoder":
        config[older] = {"0": {"content": "<unk>", "special": True}}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (source / older).write_text("{}")
    copy_with_added_tokens(source, out, ["<é>"])
    listed = json.loads((out / "tokenizer_config.json").read_text()).get(older)
    if older == "added_tokens.json":
        assert json.loads((out / older).read_text()) == {"<é>": 512}
    else:
        assert listed["0"] == config[older]["0"] and listed["512"]["content"] == "<é>"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--repair", "mean"], "--output-dir goes with"),
        (["--output-dir", "x"], "--output-dir goes with"),
        (["--add", "the", "the", "--output-dir", "x"], "in the tokenizer already"),
    ],
)
def test_options_that_do_not_go_together(
    shared_data, cli, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    status, _, err = cli("tokens", shared_data / "stories260K", *options)
    assert status == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_model_without_tokenizer(llama_dir, tmp_path, cli, report):
    untrained = report(llama_dir)
    assert untrained["tokenizer_size"] is None and untrained["tokens_used"] == 0
    options = ["--add", "<x>", "--output-dir", tmp_path / "out"]
    status, _, err = cli("tokens", llama_dir, *options)
    assert status == 1
    assert "has no tokenizer" in err


def test_a_run_warns_of_untrained_rows_it_does_not_train(damaged, tmp_path, cli):
    path, bad, _ = damaged
    args = ["train", "--model.path", path, "--data.path", tmp_path / "text.txt"]
    args += ["--train.steps", 1, "--output-dir"]
    status, _, err = cli(*args, tmp_path / "run")
    assert status == 0
    warning = f"1 tokens whose rows of embed_tokens were never trained ({bad})"
    assert warning in " ".join(err.split())
    rows = ["--lora.trainable-token-indices", bad]
    status, _, err = cli(*args, tmp_path / "run2", *rows)
    assert status == 0
    assert "never trained" not in err
