import math

import pytest

from qlora_jax.errors import UserError
from qlora_jax.training.config import ParameterGroup, TrainConfig


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": None}, "either `steps` or `epochs`, got steps=None and epochs=None"),
        ({"epochs": 1.0}, "either `steps` or `epochs`, got steps=5 and epochs=1.0"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"gradient_accumulation_steps": -1}, "`gradient_accumulation_steps` must be"),
        ({"steps": None, "epochs": 0.0}, "`epochs` must be > 0, got 0.0"),
        ({"learning_rate": -1.0}, "`learning_rate` must be >= 0, got -1.0"),
        ({"learning_rate": math.nan}, "`learning_rate` must be >= 0, got nan"),
        ({"warmup_steps": -1}, "`warmup_steps` must be a number of steps, or a share"),
        ({"warmup_steps": 6}, "`warmup_steps`=6 exceeds `steps`=5; the learning rate"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` must be > 0 or none, got 0.0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be >= 0, got -0.1"),
        ({"weight_decay": math.nan}, "`weight_decay` must be >= 0, got nan"),
        ({"adam_beta2": 1.0}, "`adam_beta2` must be at least 0 and less than 1"),
        ({"adam_epsilon": 0.0}, "`adam_epsilon` must be > 0, got 0.0"),
        ({"embedding_learning_rate": -1.0}, "`embedding_learning_rate` must be >= 0"),
        ({"loraplus_lr_ratio": 0.0}, "`loraplus_lr_ratio` must be > 0, or left out"),
        ({"neftune_noise_alpha": -5.0}, "`neftune_noise_alpha` must be > 0, or left"),
        ({"ema_decay": 1.0}, "`ema_decay` must be between 0 and 1, or left out, got"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"steps": 5, **change})


@pytest.mark.parametrize(
    "group, message",
    [
        (("(", 1.0), r"`match` = '\(' is not a regular expression: missing \)"),
        (("q_proj",), "it changes nothing"),
        (("q_proj", -1.0), "`learning_rate` must be >= 0, got -1.0"),
        (("q_proj", None, None, None, 9), "`warmup_steps`=9 exceeds `steps`=5"),
    ],
)
def test_invalid_groups_are_refused(group, message):
    with pytest.raises(UserError, match=f"train: group 1: {message}"):
        TrainConfig(steps=5, groups=(ParameterGroup(*group),))


def test_all_invalid_settings_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        TrainConfig(steps=0, learning_rate=-1.0, weight_decay=-0.5, ema_decay=2.0)
    assert str(caught.value).splitlines() == [
        "4 problems with the [train] settings:",
        "- train: `steps` must be at least 1, got 0.",
        "- train: `learning_rate` must be >= 0, got -1.0.",
        "- train: `weight_decay` must be >= 0, got -0.5.",
        "- train: `ema_decay` must be between 0 and 1, or left out, got 2.0.",
    ]


def test_an_unknown_schedule_is_refused():
    config = TrainConfig(steps=5)
    object.__setattr__(config, "lr_scheduler", "polynomial")  # past the type checks
    with pytest.raises(UserError, match="'linear' or 'cosine', got 'polynomial'"):
        config.__post_init__()
