import dataclasses
import json

import pytest

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning import estimate
from qlora_jax.planning.gpus import ALLOWANCE, CARDS, find_gpu
from qlora_jax.planning.ladder import LADDER, policies
from qlora_jax.planning.plan import DoesNotFit, Planner, granule
from qlora_jax.planning.step import Step
from qlora_jax.training.config import TrainConfig

LORA = LoraConfig(r=32)
CONFIG = LlamaConfig.from_hf(MODELS["8b"].hf_config)
STEP = Step(CONFIG, Compute(lora=LORA), length=8192)
GPU = CARDS["rtx-4090"]
RUNGS = {policy.name: policy for policy in LADDER}


def step_of(length, **train):
    train = TrainConfig(**{"steps": 1, "batch_size": 1} | train)
    return dataclasses.replace(STEP, length=length, train=train)


def test_every_policy_of_the_ladder_needs_less_than_the_previous():
    totals = [Planner(GPU).estimate(step_of(32768), p).total for p in LADDER]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(LADDER)


def test_policies_keep_fixed_settings():
    assert [p.name for p in policies()] == [p.name for p in LADDER]
    assert [p.name for p in policies(remat="full")] == ["full"]
    # A loop over the layers: rungs that differ in nothing else are one.
    loops = [p.name for p in policies(scan_layers=True)]
    assert loops[:2] == ["save_matmuls", "save_attention"]
    # Keeping everything in a loop is the slowest on a GPU, and not on a CPU.
    assert [p.name for p in policies(scan_layers=True, on_cpu=True)] == ["none", *loops]
    assert [p.name for p in policies(remat="none", scan_layers=True)] == ["none"]
    (unrolled,) = policies(remat="full", scan_layers=False)
    assert (unrolled.name, unrolled.scan_layers) == ("full, unrolled", False)
    rungs = policies(remat="offload", embed_tokens="device", lm_head="nf4")
    assert {(p.embed_tokens, p.lm_head) for p in rungs} == {("device", "nf4")}
    assert [p.attention for p in rungs] == ["auto", "xla"]
    assert {p.attention for p in policies(attention="eager")} == {"eager"}
    # cuDNN does not run there; two rungs are then one.
    old = policies(gpu=CARDS["t4"])
    assert {p.attention for p in old} == {"xla"}
    assert len(old) == len(LADDER) - 1


def test_tied_tables_have_the_same_memory():
    (policy,) = policies(remat="full", lm_head="host", tied=True)
    assert (policy.embed_tokens, policy.lm_head) == ("host", "host")
    assert policies(lm_head="host", tied=True) == policies(
        embed_tokens="host", lm_head="host"
    )
    with pytest.raises(UserError, match="head is its embedding table. Give `embed_to"):
        policies(embed_tokens="device", lm_head="host", tied=True)


@pytest.mark.parametrize(
    ("length", "name"),
    [
        (512, "none, unrolled"),
        (2048, "save_matmuls, unrolled"),
        (4096, "save_matmuls"),
        (8192, "save_attention"),
        (32768, "full"),
        (131072, "offload"),
        (229376, "offload, tables, xla"),
        (1 << 20, "offload, tables, xla"),
    ],
)
def test_the_fastest_policy_that_fits_is_taken(length, name):
    plan = Planner(GPU).fastest(step_of(length), policies())
    assert plan.policy.name == name
    assert plan.fits == (length < 1 << 20)


@pytest.mark.parametrize("policy", LADDER, ids=lambda policy: policy.name)
@pytest.mark.parametrize("gpu", ["rtx-4090", "h200"])
def test_the_longest_fits_and_one_unit_more_does_not(policy, gpu):
    planner = Planner(CARDS[gpu])
    plan = planner.longest(STEP, [policy])
    unit = granule(plan.step.length)
    assert plan.step.length % unit == 0
    assert plan.fits
    assert not planner.estimate(step_of(plan.step.length + unit), policy).fits


def test_the_largest_batch_fits_and_one_row_more_does_not():
    planner = Planner(GPU)
    plan = planner.longest(step_of(2048), policies(remat="full"), "batch_size")
    assert plan.fits
    more = step_of(2048, batch_size=plan.step.train.batch_size + 1)
    assert not planner.estimate(more, plan.policy).fits
    # Over several devices it comes out even.
    planner = Planner(GPU, mesh={"data": 2, "fsdp": 2})
    step = step_of(2048, batch_size=4)
    several = planner.longest(step, policies(remat="full"), "batch_size")
    assert several.step.train.batch_size % 4 == 0
    assert several.step.train.batch_size > 4 * plan.step.train.batch_size


class Curved(Planner):
    """A planner whose memory is not that of the estimate, and has jumps."""

    def __init__(self, gpu):
        super().__init__(gpu)
        self.lengths = []

    def _compile(self, step, policy):
        plan = super()._compile(step, policy)
        self.lengths.append(step.length)
        extra = int(0.2 * plan.memory.temporaries) + 2**27 * (step.length // 5000)
        temporaries = plan.memory.temporaries + extra
        memory = dataclasses.replace(plan.memory, temporaries=temporaries)
        return dataclasses.replace(plan, memory=memory)


def test_a_search_plans_few_steps_where_memory_is_not_linear():
    planner = Curved(GPU)
    plan = planner.longest(STEP, [RUNGS["offload"]])
    assert len(planner.lengths) <= 14
    assert len(set(planner.lengths)) == len(planner.lengths)
    assert plan.step.length in planner.lengths
    assert plan.step.length + granule(plan.step.length) in planner.lengths
    assert plan.fits
    assert not planner.plan(step_of(plan.step.length + 1024), RUNGS["offload"]).fits


def test_the_error_of_a_model_that_does_not_fit_has_excess_and_advice():
    config = LlamaConfig.from_hf(MODELS["70b"].hf_config)
    step = Step(config, Compute(lora=LORA), length=4096)
    planner = Planner(CARDS["l4"])
    for message in (
        r"128 tokens take .* GB more than the 24.00",
        "no setting alone is enough.*--mesh.fsdp",
    ):
        with pytest.raises(DoesNotFit, match=message):
            planner.longest(step, policies())


def test_settings_that_would_be_enough_are_named_with_what_they_save():
    planner = Planner(GPU)
    plan = planner.plan(step_of(40960), RUNGS["full"])
    assert not plan.fits
    enough, _ = planner.knobs(plan)
    assert any("'offload' saves" in text for text in enough)
    assert any(text.startswith("max_length=20,480 saves") for text in enough)
    assert "By the estimate enough: " in planner.too_large(plan)


def test_the_report_is_json_and_adds_up():
    plan = Planner(GPU).plan(STEP, RUNGS["offload"])
    report = json.loads(json.dumps(plan.report()))
    kinds = dict(report["device_bytes"])
    assert sum(v for k, v in kinds.items() if k != "total") == kinds["total"]
    assert kinds["allowance"] == ALLOWANCE
    assert report["fits"] == (kinds["total"] <= report["card_bytes"])
    assert report["method"] == "estimate"
    assert report["host_bytes"] == 2 * 32 * 8192 * 4096  # bf16 inputs of all layers
    assert report["host_bytes_needed"] > report["host_bytes"]
    # 83.9 million parameters in float32, and the header.
    assert 4 * 83_886_080 < report["adapter_bytes"] < 4 * 83_886_080 + 100_000


def test_limits_of_jax_itself_are_named_where_they_are_too_low():
    lean = Planner(CARDS["l40s"]).plan(step_of(524288), RUNGS["offload, tables, xla"])
    assert float(lean.settings["XLA_PYTHON_CLIENT_MEM_FRACTION"]) > 0.75
    # 140 GB pinned, and JAX pins 64 GiB at most.
    limit = int(lean.settings["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"])
    assert limit * 2**30 > lean.memory.host_bytes
    assert Planner(CARDS["h200"]).plan(STEP, RUNGS["full"]).settings == {}
    # Exactly 64 GiB, for which a pool of 64 GiB is too small.
    plan = Planner(CARDS["h200"]).plan(step_of(262144), RUNGS["offload"])
    assert plan.memory.host_bytes == 64 << 30
    assert plan.settings["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "71"


def test_a_mesh_that_does_not_divide_is_refused():
    planner = Planner(GPU, mesh={"fsdp": 8})
    with pytest.raises(UserError, match="`batch_size`=1 must be a multiple of the 8"):
        planner.plan(STEP, RUNGS["full"])


@pytest.mark.parametrize("choice", ["attention", "kernels"])
def test_kernels_that_nothing_divides_are_not_planned_for_several_devices(choice):
    policy = dataclasses.replace(RUNGS["full"], attention="auto")
    step = dataclasses.replace(
        step_of(128, batch_size=2),
        compute=dataclasses.replace(STEP.compute, kernels="auto"),
    )
    if choice == "attention":
        policy = dataclasses.replace(policy, attention="pallas")
    else:
        compute = dataclasses.replace(step.compute, kernels="pallas")
        step = dataclasses.replace(step, compute=compute)
    assert Planner(CARDS["h200"]).plan(step, policy).total
    planner = Planner(CARDS["h200"], mesh={"data": 2})
    with pytest.raises(UserError, match=f"{choice}='pallas': .* the mesh has 2"):
        planner.plan(step, policy)


@pytest.mark.parametrize("choice", ["norms", "activation"])
def test_one_pass_kernels_are_planned_for_the_gpus_that_have_them(choice):
    compute = dataclasses.replace(STEP.compute, **{choice: "fused"})
    step = dataclasses.replace(STEP, compute=compute)
    assert Planner(CARDS["h200"]).plan(step, RUNGS["full"]).total
    planner = Planner(CARDS["a100-80"])
    with pytest.raises(UserError, match="Hopper .* a100-80 has 8.0. Plan with 'auto'"):
        planner.plan(step, RUNGS["full"])
    # A run on that GPU asks for the estimate, and says itself that it has no effect.
    assert planner.estimate(step, RUNGS["full"]).total


# --- The closed form ---


def test_flops_are_those_of_the_products():
    # By hand, for a token of an 8B model: 6.98e9 weights of linear layers twice forward
    # and twice backward, the head likewise, attention over 2,048 tokens.
    compute = dataclasses.replace(STEP.compute, remat="none")
    step = dataclasses.replace(STEP, length=2048, compute=compute)
    linear, head = 6_979_321_856, 128256 * 4096
    attention = 32 * 2 * 2048 * 4096 * 3.5
    adapters = 6 * 83_886_080
    expected = 4 * linear + 4 * head + attention + adapters
    assert estimate.flops_per_token(step) == pytest.approx(expected, rel=1e-12)
    tied = dataclasses.replace(step.config, tie_word_embeddings=True)
    tied = dataclasses.replace(step, config=tied)  # the table is read as the head
    assert estimate.flops_per_token(tied) == pytest.approx(expected, rel=1e-12)
    full = dataclasses.replace(step, compute=STEP.compute)
    down = 32 * 14336 * 4096
    more = 2 * (linear - down) + attention / 3.5 + 2 * 83_886_080
    assert estimate.flops_per_token(full) == pytest.approx(expected + more, rel=1e-12)


def test_lower_bounds_of_time_scale_with_their_limits():
    floor = estimate.step_seconds_floor(STEP, GPU)
    assert floor["host_link"] == 0
    twice = step_of(8192, gradient_accumulation_steps=2)
    other = estimate.step_seconds_floor(twice, GPU)
    assert other["compute"] == pytest.approx(2 * floor["compute"])
    assert floor["bandwidth"] < other["bandwidth"] < 2 * floor["bandwidth"]
    offload = RUNGS["offload"].apply(STEP)
    link = estimate.step_seconds_floor(offload, GPU)["host_link"]
    assert link == pytest.approx(2 * 2 * 32 * 8192 * 4096 / GPU.host_link)
    slower = find_gpu("l4")
    assert estimate.step_seconds_floor(STEP, slower)["compute"] > floor["compute"]
