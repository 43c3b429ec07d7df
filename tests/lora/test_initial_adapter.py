"""An adapter that is trained further: its settings, and those of the run."""

import dataclasses

import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import continued_config, given_fields
from qlora_jax.tree import PROJECTIONS
from tests.lora.reference import abstract

BASE = abstract()
ADAPTER = LoraConfig(
    **dict(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=PROJECTIONS),
    trainable_token_indices=(5, 6, 7),
)


def merge(**fields):
    return continued_config(ADAPTER, LoraConfig(**fields), fields, BASE, name="adapter")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        # Properties of the base.
        dict(base_model_name_or_path="elsewhere", base_fingerprint="x"),
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
def test_fields_not_set_and_other_spellings_change_nothing(fields):
    assert merge(**fields) == (ADAPTER, [])


def test_scaling_and_dropout_may_change():
    fields = dict(lora_alpha=16, lora_dropout=0.0, use_rslora=True)
    lora, changes = merge(**fields)
    assert lora == dataclasses.replace(ADAPTER, **fields)
    notes = [
        "lora_alpha 8 -> 16",
        "lora_dropout 0.1 -> 0.0",
        "use_rslora False -> True",
    ]
    assert changes == notes
    lora, changes = merge(alpha_pattern={"q_proj": 2})
    assert lora.alpha_pattern == {"q_proj": 2} and len(changes) == 1


def test_all_contradictions_are_named():
    with pytest.raises(UserError) as caught:
        merge(r=16, use_dora=True, lora_alpha=1, bias="all", target_modules=("q_proj",))
    text = str(caught.value)
    for part in (
        "The adapter `adapter` has its own settings, which these contradict",
        *("`r`=16 (the adapter's: 4)", "`use_dora`=True (the adapter's: False)"),
        "`target_modules`=('q_proj',) (the adapter's: ('q_proj', 'k_proj'",
        *("`bias`='all'", "`lora_dropout` may be changed."),
    ):
        assert part in text
    assert "`lora_alpha`=1" not in text


@pytest.mark.parametrize(
    "fields",
    [
        *(dict(init_lora_weights="pissa"), dict(trainable_token_indices=(5, 6))),
        dict(layers_to_transform=(0,)),
        dict(target_modules=("query",)),  # which no module has
    ],
)
def test_settings_of_another_adapter_are_refused(fields):
    (name,) = fields
    with pytest.raises(UserError, match=f"contradict: `{name}`="):
        merge(**fields)


def test_nothing_may_change_where_nothing_is_trained():
    run = LoraConfig(lora_alpha=16)
    with pytest.raises(UserError, match=r"`lora_alpha`=16 .*Leave these out\.$"):
        continued_config(ADAPTER, run, ["lora_alpha"], BASE, name="a", changeable=())


def test_fields_at_their_defaults_are_not_set():
    assert given_fields(LoraConfig()) == set()
    assert given_fields(LoraConfig(r=16, lora_dropout=0.1)) == {"lora_dropout"}
