"""An adapter that is trained further: its settings, and those given beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import continued, given_fields
from qlora_jax.tree import PROJECTIONS

L, D = 2, 8


def abstract(*shape):
    return {"weight": jax.ShapeDtypeStruct(shape, jnp.float32)}


BASE = {
    "model": {
        "embed_tokens": abstract(32, D),
        "layers": {
            "self_attn": {name: abstract(L, D, D) for name in PROJECTIONS[:4]},
            "mlp": {name: abstract(L, D, D) for name in PROJECTIONS[4:]},
        },
    },
    "lm_head": abstract(32, D),
}
OWN = LoraConfig(
    r=4,
    lora_alpha=8,
    lora_dropout=0.1,
    target_modules=PROJECTIONS,
    trainable_token_indices=(5, 6, 7),
)


def meet(**given):
    return continued(OWN, LoraConfig(**given), given, BASE, name="adapter")


def test_what_is_not_given_is_the_adapters():
    assert meet() == (OWN, [])
    assert meet(base_model_name_or_path="elsewhere", base_fingerprint="x") == (OWN, [])


@pytest.mark.parametrize(
    "given",
    [
        dict(r=4, lora_alpha=8.0, lora_dropout=0.1, use_dora=False, bias="none"),
        dict(target_modules=PROJECTIONS[::-1]),
        dict(target_modules="all-linear"),
        dict(target_modules=r"model\.layers\..*proj", layers_to_transform=None),
        dict(rank_pattern={"q_proj": 4}),
        dict(trainable_token_indices={"embed_tokens": (5, 6, 7)}),
        dict(trainable_token_indices={"model.embed_tokens": (5, 6, 7)}),
        dict(init_lora_weights="default", task_type="CAUSAL_LM"),
    ],
)
def test_another_spelling_contradicts_nothing(given):
    assert meet(**given) == (OWN, [])


def test_the_factor_and_the_dropout_may_change():
    lora, changes = meet(lora_alpha=16, lora_dropout=0.0, use_rslora=True)
    assert lora == dataclasses.replace(
        OWN, lora_alpha=16, lora_dropout=0.0, use_rslora=True
    )
    assert changes == [
        "lora_alpha 8 -> 16",
        "lora_dropout 0.1 -> 0.0",
        "use_rslora False -> True",
    ]
    lora, changes = meet(alpha_pattern={"q_proj": 2})
    assert lora.alpha_pattern == {"q_proj": 2} and len(changes) == 1


def test_all_else_is_refused_and_all_of_it_named():
    with pytest.raises(UserError) as caught:
        meet(r=16, use_dora=True, lora_alpha=1, bias="all", target_modules=("q_proj",))
    text = str(caught.value)
    assert "The adapter `adapter` has its own settings, which these contradict" in text
    assert "`r`=16 (the adapter's: 4)" in text
    assert "`use_dora`=True (the adapter's: False)" in text
    assert "`target_modules`=('q_proj',) (the adapter's: ('q_proj', 'k_proj'" in text
    assert "`bias`='all'" in text and "`lora_alpha`=1" not in text
    assert "`lora_dropout` may be changed." in text


@pytest.mark.parametrize(
    "given",
    [
        dict(init_lora_weights="pissa"),
        dict(trainable_token_indices=(5, 6)),
        dict(layers_to_transform=(0,)),
        dict(target_modules=("query",)),  # which is nothing in this model
    ],
)
def test_what_would_be_another_adapter(given):
    (name,) = given
    with pytest.raises(UserError, match=f"contradict: `{name}`="):
        meet(**given)


def test_nothing_may_change_where_nothing_is_trained():
    wanted = LoraConfig(lora_alpha=16)
    with pytest.raises(UserError, match=r"`lora_alpha`=16 .*Leave these out\.$"):
        continued(OWN, wanted, ["lora_alpha"], BASE, name="a", changeable=())


def test_given_in_python_is_what_is_not_at_its_default():
    assert given_fields(LoraConfig()) == set()
    assert given_fields(LoraConfig(r=16, lora_dropout=0.1)) == {"lora_dropout"}
