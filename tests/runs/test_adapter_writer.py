"""What a run teaches as the end of an answer goes where its adapters go."""

import json

import jax
import pytest

import convert
from qlora_jax.data.config import Source
from qlora_jax.errors import UserError
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.runs.adapter_writer import AdapterWriter, adapter_files
from qlora_jax.runs.prepare import _load_data
from qlora_jax.runs.sources import find_sources
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state
from tests.byte_tokenizers import byte_tokenizer

EOT = "<|eot_id|>"
SPECIALS = ("<s>", "</s>", EOT)  # 0, 1, 2
# The base's EOS ends a text, and the template ends a turn with another token.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
FORMATS = {
    "messages": {"messages": MESSAGES},
    "text": {"text": "ab"},
    "tokens": {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a tokenizer."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer(specials=SPECIALS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def trained(make, base, tmp_path, capsys):
    """A function: formats, settings of [data] -> the run's data, files and notes."""

    def trained(*formats, train=None, **data):
        sources = []
        for name in formats:
            file = tmp_path / f"{name}.jsonl"
            file.write_text(3 * (json.dumps(FORMATS[name]) + "\n"))
            sources.append(Source(str(file), format=name))
        config = make(
            tmp_path / "run",
            model={"path": str(base)},
            data={"sources": tuple(sources), "path": "", **data},
            train=train or {},
        )
        architecture = LlamaConfig(260, 8, 8, 1, 1, 1, 8, eos_token_id=1)
        _, sources = find_sources(config)
        _, loaded = _load_data(config, sources, architecture)
        ends = loaded.trained_ends
        files = adapter_files(config, sources, architecture, loaded.tokenizer, ends)
        return loaded, files, " ".join(capsys.readouterr().err.split())

    return trained


@pytest.mark.parametrize(
    ("formats", "ends", "noted"),
    [
        (("messages",), (2,), True),
        (("tokens",), (2,), True),
        (("text",), (1,), False),
        (("text", "messages"), (1, 2), True),
    ],
    ids=str,
)
def test_what_ends_an_answer_is_written_and_noted(trained, base, formats, ends, noted):
    data, files, err = trained(*formats)
    assert data.trained_ends == ends
    assert data.eos_token_ids == tuple(sorted({1, *ends}))
    assert (f"end with '{EOT}', and the tokenizer's EOS is '</s>'" in err) == noted
    if noted:
        generation = json.loads(files.pop("generation_config.json"))
        assert generation == {"eos_token_id": [1, 2]}
    assert files == {path.name: path.read_bytes() for path in base.iterdir()}


def test_a_source_that_never_ends_is_noted_beside_one_that_does(trained, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE.replace("<|eot_id|>", "\n"))
    data, files, err = trained("text", "messages", chat_template=str(template))
    assert data.trained_ends == (1,)
    assert "messages.jsonl is the tokenizer's EOS" in err and "not learn to stop" in err
    # The run's template is the only one.
    assert files["chat_template.jinja"] == template.read_bytes()


def test_another_eos_is_trained_and_saved(trained):
    data, files, _ = trained("text", eos_token=EOT)
    assert data.examples[0][1].tolist()[-1] == 2
    assert data.tokenizer.eos_token == EOT and data.trained_ends == (2,)
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == EOT
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [1, 2]}
    with pytest.raises(UserError, match="Did you mean `<|eot_id|>`"):
        trained("text", eos_token="<|eot_ib|>")


def test_a_run_goes_on_with_the_tokenizer_of_its_first_adapter(trained, tmp_path):
    tokenizer = byte_tokenizer(specials=SPECIALS)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = TEMPLATE.replace("<|eot_id|>", "<|im_end|>")
    tokenizer.save_pretrained(tmp_path / "first")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    data, files, err = trained(
        "messages", train={"adapter_init": str(tmp_path / "first")}
    )
    assert data.trained_ends == (259,) and "EOS is '<|im_end|>' instead of" in err
    assert json.loads(files.pop("generation_config.json"))["eos_token_id"] == [1, 259]
    assert files == first and "another chat template than" not in err

    for text, other in ((tokenizer.chat_template, False), (TEMPLATE, True)):
        file = tmp_path / "t.jinja"
        file.write_text(text)
        _, _, err = trained(
            "messages",
            train={"adapter_init": str(tmp_path / "first")},
            chat_template=str(file),
        )
        assert ("another chat template than `data.chat_template`" in err) == other


@pytest.mark.parametrize("name", [None, "org/name"])
def test_an_adapter_names_the_base_that_the_run_file_names(
    make, llama_dir, tmp_path, name
):
    config = make(tmp_path, lora={"base_model_name_or_path": name})
    architecture, tree = convert.load_llama(llama_dir, quantization=None)
    adapters = init_adapters(jax.random.key(0), tree, config.lora)
    writer = AdapterWriter(
        config=config,
        architecture=architecture,
        base=tree,
        fingerprint="0" * 64,
        files={"tokenizer.json": b"{}"},
    )
    optimizer = make_optimizer(config.train, 1)
    writer.write(init_state(adapters, optimizer, jax.random.key(0)))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == (name or str(llama_dir))
    assert (tmp_path / "adapter" / "tokenizer.json").read_bytes() == b"{}"
