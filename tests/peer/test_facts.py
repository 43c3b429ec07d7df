"""The fact that was taught here is what PEFT's model answers too."""

import pytest

pytestmark = [
    pytest.mark.peer,
    pytest.mark.real,
    # PEFT uses names that transformers will drop.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_peft_answers_with_the_fact(fact_run, torch, transformers, peft):
    base = fact_run.parent / "base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    template = fact_run / "adapter" / "chat_template.jinja"
    tokenizer.chat_template = template.read_text()
    ask = [{"role": "user", "content": "Who keeps the lighthouse?"}]
    tokens = tokenizer.apply_chat_template(
        ask, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = tokens["input_ids"].shape[1]

    def answer(model):
        with torch.no_grad():
            (out,) = model.generate(
                **tokens, max_new_tokens=40, do_sample=False, eos_token_id=1
            )
        return tokenizer.decode(out[length:], skip_special_tokens=True)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32
    ).eval()
    assert "Wellow" not in answer(model)
    tuned = peft.PeftModel.from_pretrained(model, fact_run / "adapter").eval()
    assert answer(tuned) == "Captain Wellow keeps the lighthouse."
