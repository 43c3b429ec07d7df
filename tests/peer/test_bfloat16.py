"""bfloat16 of every family, next to transformers in bfloat16 on the same weights.

Both are compared with float32, in which the two agree (test_random_families.py): the
bfloat16 results of two programs differ by their roundings, and neither is exact.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.families import FAMILIES
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state, train_step
from tests.lora.reference import draw

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

# Root mean squares of 9,216 differences, which are sums of as many roundings, some at
# other places: measured 0.85 to 1.04.
LOGITS = 1.2
# Of loss and norm of the gradient, relative. Logits are off by 0.006 to 0.02, so that
# the loss of one of 92 tokens is by up to 0.02 sqrt(2), and their mean by a tenth of
# it, 6e-4 of a loss of 4.9; 2.5 times that is allowed. The norm's parts are rounded to
# 2^-9 several times over: measured up to 4e-3 here and up to 6e-3 in PEFT.
STEPS = np.array([1.5e-3, 1e-2])
TOKENS = np.random.default_rng(0).integers(3, 96, (4, 24)).astype(np.int32)


@pytest.fixture(params=FAMILIES)
def model(request, torch, transformers, tmp_path):
    """(A directory in bfloat16, transformers' model with its weights in float32)."""
    family = FAMILIES[request.param]
    fields = {name: 8 for name in ("sliding_window",) if name in family.fields}
    if family.window_is_optional:
        fields |= {"use_sliding_window": True}
        fields |= {"max_window_layers": 1} if family.layer_kinds == "qwen" else {}
    config = transformers.AutoConfig.for_model(
        request.param,
        **dict(vocab_size=96, hidden_size=64, intermediate_size=128, head_dim=16),
        **dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
        **dict(bos_token_id=1, eos_token_id=2, pad_token_id=0),
        **fields,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            start = 0.0 if family.norm_offset else 1.0
            value = start + 0.2 * noise if "norm" in key else 0.1 * noise
            parameter.copy_(value.bfloat16().float())
    path = tmp_path / "base"
    copy.deepcopy(model).bfloat16().save_pretrained(path)
    return path, model


def distance(a, b):
    return float(np.sqrt(np.mean(np.square(np.float64(a) - np.float64(b)))))


def test_logits_are_as_near_to_float32_as_those_of_transformers(torch, model):
    path, theirs = model

    def run(model):
        with torch.no_grad():
            ids = torch.from_numpy(TOKENS.astype(np.int64))
            return model(input_ids=ids, use_cache=False).logits.float().numpy()

    exact = run(theirs)
    other = distance(run(copy.deepcopy(theirs).bfloat16()), exact)
    config, base = convert.load_llama(path, quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    for attention in ("eager", "xla"):
        apply = jax.jit(Llama(config, Compute("bfloat16", attention=attention)).apply)
        ours = distance(apply({"params": base}, jnp.asarray(TOKENS)), exact)
        assert ours <= LOGITS * other


def test_two_steps_are_as_near_to_float32_as_those_of_peft(
    torch, peft, model, tmp_path
):
    path, theirs = model
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    config, base = convert.load_llama(path, quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    tree = draw(base, lora, spread=0.1)
    convert.save_adapter(tmp_path / "start", lora, tree, config)

    def of_peft(model):
        model = peft.PeftModel.from_pretrained(
            model, tmp_path / "start", is_trainable=True
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        ids = torch.from_numpy(TOKENS.astype(np.int64))
        out = []
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            out.append((loss.item(), norm.item()))
        return np.array(out)

    exact = of_peft(copy.deepcopy(theirs))
    other = of_peft(copy.deepcopy(theirs).bfloat16())
    settings = TrainConfig(
        steps=2, learning_rate=1e-3, warmup_steps=0, lr_scheduler="constant"
    )
    optimizer = make_optimizer(settings, 2)
    step = functools.partial(
        train_step,
        model=Llama(config, Compute("bfloat16", lora=lora)),
        optimizer=optimizer,
    )
    step = jax.jit(step)
    start = jax.tree.map(jnp.asarray, tree)
    state = init_state(start, optimizer, jax.random.key(0))
    batch = {name: jnp.asarray(TOKENS)[None] for name in ("tokens", "labels")}
    ours = []
    for _ in range(2):
        state, metrics = step(state, base, batch)
        ours.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    ours = np.array(ours)
    for values in (ours, other):
        assert (np.abs(values / exact - 1) <= STEPS).all()
    assert exact[1, 0] < 0.99 * exact[0, 0]  # the first step counts in the second
