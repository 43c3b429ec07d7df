"""The examples of the README and the pages work.

Python runs, run files are read, commands, options, make targets and files exist, and
the README's recipe is executed from the first command to the last.
"""

import contextlib
import functools
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import tomlkit

import convert
import qlora_jax as qj
from qlora_jax.cli.convert import main as convert_main
from qlora_jax.cli.main import main as jax_main
from qlora_jax.runs.toml import read_config
from tests.byte_tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MAINS = {"qlora-jax": jax_main, "qlora-convert": convert_main}
README = "README.md"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for name in (README, "CONTRIBUTING.md", "notebooks/README.md", "docs/*.md")
    for path in sorted(ROOT.glob(name))
}
# Name -> page and a part of the one Python example that has it. All are executed below.
EXAMPLES = {
    "load": (README, "lora_config.r"),
    "run": ("docs/adapters.md", "RunConfig"),
    "peft": ("docs/adapters.md", "import PeftModel"),
    "several adapters": ("docs/adapters.md", "stack_adapters"),
    "custom layer": ("docs/custom_layers.md", "GatedAttention"),
    "stream": ("docs/generation.md", "model.stream("),
    "chat": ("docs/generation.md", "model.chat("),
}
# The README downloads these. Tests have no network: a small model of a server on the
# loopback and local conversations stand in for them.
HUB_MODEL = "unsloth/Llama-3.2-1B-Instruct"
HUB_DATA = "hf:HuggingFaceTB/smoltalk/everyday-conversations"
# Files that measurements on a GPU write.
TUNED = "pallas_kernels/tuned/DEVICE"
WRITTEN = {f"{TUNED}.json", f"{TUNED}-attention.json"}
WRITTEN |= {"benchmarks/gpu_check_DEVICE.json"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
    "{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def blocks(language: str, text: str) -> list[str]:
    """Returns the fenced blocks of a language."""
    return re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> Iterator[list[str]]:
    """Yields the command lines of the sh blocks, comments removed."""
    for block in blocks("sh", text):
        line = ""
        for part in block.replace("\\\n", " ").splitlines():
            line += f"{part}\n"
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # the next line continues a quoted string
                continue
            line = ""
            if words:
                yield words


def command_lines(*programs: str) -> list[list[str]]:
    """Returns the commands of these programs: in sh blocks, and in prose as code."""
    lines = []
    for text in PAGES.values():
        lines += [words for words in commands(text) if words[0] in programs]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        for code in re.findall(r"`([^`]+)`", prose):
            words = code.replace("...", "").split()
            if words and words[0] in programs and len(words) > 1:
                lines.append(words)
    return lines


def example(name: str) -> str:
    page, part = EXAMPLES[name]
    (block,) = (b for b in blocks("python", PAGES[page]) if part in b)
    return block


def completed(partial: str) -> str:
    """Returns a partial run file with the other settings of the first complete one."""
    tables = tomllib.loads(blocks("toml", PAGES["docs/runs.md"])[0])
    for name, given in tomllib.loads(partial).items():
        if isinstance(given, dict):
            left_out = ("path", "format") if "sources" in given else ()
            others = tables.get(name, {}).items()
            given = {k: v for k, v in others if k not in left_out} | given
        tables[name] = given
    return tomlkit.dumps(tables)


@pytest.fixture
def directories(repository, tmp_path) -> tuple[Path, Path]:
    """A model directory and an adapter directory that names it as its base."""
    data = repository.parent / "shared/data"
    if data.is_dir():
        return data / "stories260K", data / "adapters/stories260K-lora-r8-shakespeare"
    script = str(repository / "scripts/demo/story_model.py")
    command = [sys.executable, script, "--output", str(tmp_path), "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run(command, check=True, env=environment)
    config, base = convert.load_llama(tmp_path / "base")
    lora, adapter = qj.LoraConfig(r=4), tmp_path / "adapter"
    adapters = qj.init_adapters(jax.random.key(0), base, lora)
    convert.save_adapter(
        adapter, lora, adapters, config, base_model_name_or_path="base"
    )
    return tmp_path / "base", adapter


@pytest.fixture
def chat_model(directories, tmp_path) -> Path:
    """A copy of the model whose tokenizer has a chat template."""
    path = tmp_path / "with-template"
    shutil.copytree(directories[0], path, copy_function=shutil.copyfile)
    path.chmod(0o755)
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    return path


def run_example(name: str, directories, **namespace) -> list[str]:
    """Executes an example on local directories; returns the lines that it prints."""
    source = example(name)
    placeholders = ("path/to/hf-llama", "path/to/peft-adapter")
    for placeholder, path in zip(placeholders, directories, strict=True):
        source = source.replace(f'"{placeholder}"', repr(str(path)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, EXAMPLES[name][0], "exec"), namespace)
    return printed.getvalue().splitlines()


# --- Python ---


def test_every_python_example_is_executed_by_a_test():
    executed = {example(name) for name in EXAMPLES}
    assert executed == {b for text in PAGES.values() for b in blocks("python", text)}


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("load", r"[1-9]\d*\nOnce upon a time(.|\n)*\n\(1, .*"),
        ("custom layer", ".*, 4, .*"),  # the rank that `rank_pattern` sets
        ("several adapters", r"(8|16) \(3, .*"),
        ("stream", r"(.|\n)* \S+ ([1-9]\d?|1\d\d|200)"),  # reason, tokens
    ],
)
def test_an_example_prints_what_it_says(name, printed, directories):
    assert re.fullmatch(printed, "\n".join(run_example(name, directories)))


def test_the_example_of_a_run_from_python(directories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog.\n" * 40)
    (line,) = run_example("run", directories)
    assert line.startswith("2 ")
    file = "adapter_model.safetensors"
    by_run = (tmp_path / "python-run/adapter" / file).read_bytes()
    assert by_run == (tmp_path / "python-adapter" / file).read_bytes()


def test_the_example_of_a_chat(chat_model, directories):
    namespace = {"model": qj.load(chat_model, dtype="float32")}
    exec(compile(example("chat"), "docs/generation.md", "exec"), namespace)
    assert isinstance(namespace["reply"], str)
    assert "".join(namespace["answer"]) is not None


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised within transformers
def test_the_example_with_peft(directories, tmp_path, monkeypatch, capsys):
    """A run continued from an adapter of PEFT loads in PEFT with the same logits."""
    model, adapter = directories
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories260K").symlink_to(model)
    text = "ROMEO: what is it that you say?\n" * 400
    (tmp_path / "shakespeare.txt").write_text(text)
    (settings,) = blocks("toml", PAGES["docs/adapters.md"])
    settings = settings.replace('"peft-adapter"', repr(str(adapter)))
    (tmp_path / "more.toml").write_text(settings)
    assert jax_main(["train", "more.toml", "--train.steps", "2"]) == 0
    lines = run_example("peft", directories)
    assert float(lines[-1]) < 3e-5


@pytest.mark.parametrize("module", [qj.Linear, qj.Embed, qj.RMSNorm])
def test_the_modules_to_build_with_have_the_documented_signature(module):
    page = PAGES["docs/custom_layers.md"]
    (signature,) = re.findall(rf"^\| `{module.__name__}\((.*)\)` \|", page, re.M)
    parameters = list(inspect.signature(module).parameters.values())
    parameters = parameters[: [p.name for p in parameters].index("parent")]
    for parameter, text in zip(parameters, signature.split(", "), strict=True):
        name, _, default = text.partition("=")
        assert parameter.name == name
        if default:
            assert repr(parameter.default) == default


# --- The recipe ---


def test_the_recipe_of_the_readme(hub, chat_model, shared_data, tmp_path, monkeypatch):
    """Every command of "Fine-tune a chat model", with stand-ins for the downloads.

    There are too few conversations for a warm-up and for long rows.
    """
    recipe = PAGES[README].partition("## Fine-tune a chat model")[2]
    recipe = recipe.partition("\n## ")[0]
    (settings,) = blocks("toml", recipe)
    lines = list(commands(recipe))
    assert HUB_MODEL in settings
    hub.add(HUB_MODEL, chat_model)

    monkeypatch.chdir(tmp_path)
    conversations = shared_data / "text/fastchat-dummy/dummy_conversation.json"
    rows = json.loads(conversations.read_text())[:24]
    Path("conversations.json").write_text(json.dumps(rows))
    assert HUB_DATA in settings
    Path("chat.toml").write_text(settings.replace(HUB_DATA, "conversations.json"))

    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n/exit\n"))
    for program, *words in lines:
        if words[0] == "train":
            words += ["--train.warmup-steps", "0", "--data.max-length", "256"]
        assert MAINS[program](words) == 0, words
    assert (Path("chat-run") / "adapter/adapter_config.json").is_file()
    assert (Path("chat-run") / "report.html").is_file()
    merged = qj.load("chat-model", quantization="none", dtype="float32")
    assert merged.chat([{"role": "user", "content": "Hi"}], max_new_tokens=2)


# --- Unsloth's notebooks, as run files ---

ROWS = {
    "messages": {"conversations": [{"from": "human", "value": "Who?"}]},
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "text": {"title": "A dog", "text": "Once upon a time there was a dog."},
}
ROWS["messages"]["conversations"].append({"from": "gpt", "value": "A dog."})
NOTEBOOKS = [
    *(
        ("chat.toml", name)
        for name in ("llama", "qwen3", "phi3", "gemma3_text", "smollm3", "granite")
    ),
    *(("alpaca.toml", name) for name in ("qwen2", "mistral_nemo", "gemma2")),
    ("cpt.toml", "mistral"),
    ("completion.toml", "mistral"),
]


@pytest.fixture
def small_model(tmp_path, golden):
    """A function: family -> a model of it with random weights and a chat template."""

    def make(name: str) -> Path:
        folder = "llama32" if name == "llama" else f"families/{name}"
        raw = json.loads((golden / folder / "fp32/config.json").read_text())
        raw |= {"vocab_size": 320, "max_position_embeddings": 256}
        config = qj.LlamaConfig.from_hf(raw)
        shapes = qj.Llama(config, qj.Compute(dtype="float32"))
        params = shapes.init(jax.random.key(0), jax.numpy.zeros((1, 2), int))["params"]
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        convert.save_llama(
            tmp_path / name, config, params, tokenizer_from=tmp_path / "tokenizer"
        )
        return tmp_path / name

    return make


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize(("file", "family"), NOTEBOOKS)
def test_the_run_files_for_notebooks_train_every_family(
    file, family, small_model, tmp_path, monkeypatch
):
    """With local rows for the downloads, and two short steps."""
    page = PAGES["docs/from_unsloth.md"]
    (text,) = re.findall(rf'^```toml title="{file}"\n(.*?)^```', page, re.S | re.M)
    settings = tomllib.loads(text)
    monkeypatch.chdir(tmp_path)
    settings["model"]["path"] = str(small_model(family))
    settings["model"]["dtype"] = "float32"
    settings["data"] |= {"path": "rows.jsonl", "max_length": 96}
    settings["train"].pop("epochs", None)
    settings["train"] |= {"steps": 2, "warmup_steps": 0}
    row = ROWS[settings["data"]["format"]]
    Path("rows.jsonl").write_text(40 * (json.dumps(row) + "\n"))
    Path(file).write_text(tomlkit.dumps(settings))
    assert jax_main(["train", file]) == 0
    run = Path(settings["output_dir"])
    report = json.loads((run / "report.json").read_text())
    trained = set(report["groups"])
    assert {"embed_tokens", "lm_head"} <= trained or "lm_head" not in text
    assert ("qkv_proj" if family == "phi3" else "q_proj") in trained
    assert qj.load(run).generate(["Once"], max_new_tokens=2)


# --- Commands and run files ---


@functools.cache
def help_of(program: str, *command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            status = MAINS[program]([*command, "--help"])
        except SystemExit as stopped:
            status = stopped.code
    assert status == 0, (program, command)
    return printed.getvalue()


@pytest.mark.parametrize(
    "words", command_lines("qlora-jax", "qlora-convert"), ids=" ".join
)
def test_every_command_and_option_exists(words):
    program, command = words[:2]
    if command == "COMMAND":
        return
    used = {re.split(r"[=)]", word)[0] for word in words[2:] if word.startswith("--")}
    assert used <= set(re.findall(r"--[a-z][a-z0-9.-]*", help_of(program, command)))


def test_every_command_is_shown_in_an_example():
    lines = [words for text in PAGES.values() for words in commands(text)]
    shown = {tuple(words[:2]) for words in lines}
    for program in MAINS:
        names = re.findall(r"^ {2,4}(?:• )?([a-z]+) {2,}", help_of(program), re.M)
        assert len(names) > 4
        assert shown >= {(program, name) for name in names}


@pytest.mark.parametrize(
    ("page", "text"),
    [(page, block) for page, text in PAGES.items() for block in blocks("toml", text)],
)
def test_every_run_file_is_read(page, text, directories, tmp_path, capsys):
    path = tmp_path / "example.toml"
    of_a_gpu = text.startswith("like = ")
    path.write_text(text if "output_dir" in text or of_a_gpu else completed(text))
    if of_a_gpu:
        plan = ["plan", "--model", str(directories[0]), "--method", "estimate"]
        assert jax_main([*plan, "--max-length", "64", "--gpu", str(path)]) == 0
        return
    config = read_config(path)
    assert config.model.path
    assert config.train.steps or config.train.epochs


# --- Files, targets, numbers ---


def test_every_make_target_exists(repository):
    makefile = (repository / "Makefile").read_text()
    used = {words[1] for words in command_lines("make")}
    assert used >= {"demo", "test", "docs", "bench", "gpu", "compile"}
    for target in used:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("page", PAGES)
def test_every_linked_or_named_file_exists(page, repository):
    text, folder = PAGES[page], (repository / page).parent
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (folder / link).is_file()]
    folders = "scripts|tests|docs|benchmarks|qlora_jax|convert|pallas_kernels"
    named = re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]+\.\w+", text)
    missing += [name for name in named if not (repository / name).exists()]
    assert set(missing) <= WRITTEN


def test_the_readme_is_short():
    assert len(PAGES[README].splitlines()) <= 250


def test_planned_lengths_are_those_of_the_stored_plans(repository):
    stored = json.loads((repository / "benchmarks/memory_8b.json").read_text())
    table = PAGES["docs/memory.md"]
    rows = [row for row in stored["rows"].values() if "card_gb" in row]
    # Other families have a table of lengths alone.
    families = {row["model"] for row in rows} - {"8b", "70b"}
    for row in rows:
        if row["model"] in families:
            continue
        published = f"{row['published']:,}" if row["published"] else ""
        memory = f"{row['device_bytes']['total'] / 1e9:.2f} GB"
        numbers = rf"{row['card_gb']} GB \| {published} ?\| {row['max_length']:,} \|"
        assert re.search(rf"\| {numbers}.*\| {memory} \|", table), row["card_gb"]
    in_readme = re.findall(r"^\| Llama .* \|$", PAGES[README], re.M)
    assert len(in_readme) > 5
    in_readme += re.findall(r"^\| (?:Qwen|Mistral|gemma).* \|$", PAGES[README], re.M)
    assert len(families) == 4
    lengths = {
        model: [
            f"{row['max_length']:,}" if row["fits"] else "none"
            for row in rows
            if row["model"] == model
        ]
        for model in families
    }
    for model in families:
        (line,) = [x for x in in_readme if x.startswith(f"| {model} |")]
        assert set(line.strip("| ").split(" | ")[1:]) <= set(lengths[model])
    assert all(line in table.splitlines() for line in in_readme)
