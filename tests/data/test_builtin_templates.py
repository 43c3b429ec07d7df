"""Built-in chat templates write what those of the models write, and mark the answers.

The texts are those of the models' own templates (Llama 3, Gemma 3, Zephyr, Mistral 7B
v0.2), of FastChat (Vicuna 1.1), and of Stanford's Alpaca.
"""

import re

import pytest

from qlora_jax.data.batches import Batches
from qlora_jax.data.builtin_templates import BUILTIN_TEMPLATES, template_file
from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples
from qlora_jax.data.notes import data_notes
from qlora_jax.errors import UserError

SYSTEM = [{"role": "system", "content": "Be brief."}]
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No"},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request."
)
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
# Text before the first turn; with a system text; a question with the generation prompt;
# an answer; what stands after it.
PIECES = {
    "chatml": (
        "",
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "{}<|im_end|>",
        "\n",
    ),
    "llama-3": (
        "<s>",
        f"<s>{LLAMA.format('system')}Be brief.<|eot_id|>",
        LLAMA.format("user") + "{}<|eot_id|>" + LLAMA.format("assistant"),
        "{}<|eot_id|>",
        "",
    ),
    "zephyr": (
        "",
        "<|system|>\nBe brief.</s>\n",
        "<|user|>\n{}</s>\n<|assistant|>\n",
        "{}</s>",
        "\n",
    ),
    "vicuna": (
        f"<s>{VICUNA} ",
        "<s>Be brief. ",
        "USER: {} ASSISTANT:",
        " {}</s>",
        "",
    ),
    "alpaca": (
        f"<s>{ALPACA}",
        "<s>Be brief.",
        "\n\n### Instruction:\n{}\n\n### Response:",
        "{}</s>",
        "",
    ),
    "mistral": ("<s>", "<s>", " [INST] {} [/INST]", " {}</s>", ""),
    "gemma": (
        "<s>",
        "<s>",
        "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "{}<end_of_turn>",
        "\n",
    ),
}


def written(name, *, system):
    """The text of SYSTEM + TURNS, and the supervised pieces."""
    start, start_system, question, answer, after = PIECES[name]
    # Mistral and Gemma have the system text in the first question.
    inside = "Be brief.\n\n" * (system and name in ("mistral", "gemma"))
    answers = [answer.format("Yo"), answer.format("No")]
    text = start_system if system else start
    text += question.format(f"{inside}Hi") + answers[0] + after
    return text + question.format("More"), answers, after


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_a_built_in_template_writes_the_models_text(tokenizer, name, system):
    renderer = ChatRenderer(tokenizer, name)
    turns = (SYSTEM if system else []) + TURNS
    prompt, answers, after = written(name, system=system)
    assert renderer.text(turns[:-1], add_generation_prompt=True) == prompt
    (example,) = renderer.examples(turns)
    assert example.text == prompt + answers[1] + after
    assert [example.text[a:b] for a, b in example.spans] == answers
    # transformers renders the same text of the file, and the same mask of its marks.
    template = template_file(name).read_text()
    hf = tokenizer.apply_chat_template(
        turns,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert tokenizer.decode(hf["input_ids"]) == example.text
    pairs = zip(hf["input_ids"], hf["assistant_masks"], strict=True)
    assert tokenizer.decode([i for i, mask in pairs if mask]) == "".join(answers)


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_roles_that_a_built_in_template_does_not_write_are_refused(tokenizer, name):
    turns = [*TURNS[:2], {"role": "tool", "content": "3"}]
    renderer = ChatRenderer(tokenizer, name)
    if name in ("chatml", "llama-3"):
        assert "3" in renderer.text(turns)
        return
    with pytest.raises(UserError, match=f"{name} writes .*not tool"):
        renderer.text(turns)


@pytest.mark.parametrize(
    ("name", "tokens", "note"),
    [
        ("chatml", {}, r"does not have \(<\|im_start\|>, <\|im_end\|>\).*tokens MODEL"),
        ("chatml", {"specials": ("<s>", "</s>", "<|im_start|>", "<|im_end|>")}, None),
        ("zephyr", {}, None),
        ("zephyr", {"eos": None}, "ends an answer with the tokenizer's EOS, and this"),
    ],
)
def test_tokens_that_a_template_needs_and_the_tokenizer_lacks_are_said(
    write, byte_tokenizer, name, tokens, note
):
    tokenizer = byte_tokenizer(**tokens)
    path = write([{"messages": TURNS}])
    config = DataConfig(path=path, format="messages", chat_template=name)
    examples = load_examples(config, tokenizer, vocab_size=300)
    batches = Batches(examples, config, batch_size=1, pad_token_id=0)
    notes = data_notes(examples, config, batches, tokenizer)

    said = [text for text in notes if text.startswith(f"the chat template {name} ")]
    assert len(said) == (note is not None)
    assert note is None or re.search(note, said[0])


def test_an_unknown_name_is_refused_with_those_that_are_built_in(tokenizer):
    with pytest.raises(UserError, match=r"cannot read chatlm: .* alpaca, chatml, gem"):
        ChatRenderer(tokenizer, "chatlm")


def test_calls_of_tools_under_a_template_without_them_are_explained(tokenizer):
    call = {"function": {"name": "find", "arguments": {"q": "x"}}}
    turns = [*TURNS[:1], {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(UserError, match="They call tools: take the template of"):
        ChatRenderer(tokenizer, "chatml").text(turns)
