"""Scheduled programs of a few lines, and traces of them."""

import gzip
import json

from qlora_jax.planning.work import Sizes

SIZES = Sizes(
    layers=4,
    rows=2,
    length=128,
    hidden=512,
    intermediate=1536,
    vocabulary=5000,
    widths=frozenset((512, 1536, 128)),
    ranks=frozenset((16,)),
    keys=64.0,
)
TOKENS, HIDDEN, WIDE = 256, 512, 1536
FORWARD = "jit(train_step)/jvp(Llama.hidden_states)/model/while"
BACKWARD = "jit(train_step)/transpose(jvp(Llama.hidden_states))/model/while"
UNROLLED = "jit(train_step)/jvp(Llama.hidden_states)/model/model._unrolled/Block"
UNROLLED_BACKWARD = UNROLLED.replace(
    "jvp(Llama.hidden_states)", "transpose(jvp(Llama.hidden_states))"
)
LOSS = "jit(train_step)/jvp()/while"
TOKEN = "jit(_generate)/while"
TOKEN_LAYER = f"{TOKEN}/body/Llama.decode/model/while"
REMAT = f"{BACKWARD}/body/checkpoint/rematted_computation/layers"


def product(columns: int, terms: int, rows: int = TOKENS) -> str:
    return (
        f"  %x = bf16[{rows},{terms}]{{1,0}} parameter(0)\n"
        f"  %w = bf16[{terms},{columns}]{{1,0}} parameter(1)\n"
        f"  ROOT %k = bf16[{rows},{columns}]{{1,0}} dot(%x, %w), "
        "lhs_contracting_dims={1}"
    )


def elementwise(*sizes: int) -> str:
    shape = f"bf16[{','.join(map(str, sizes))}]{{}}"
    return f"  %a = {shape} parameter(0)\n  ROOT %k = {shape} add(%a, %a)"


def custom(target: str) -> str:
    return (
        "  %a = bf16[2,128,4,16]{3,2,1,0} parameter(0)\n"
        "  ROOT %k = bf16[2,128,4,16]{3,2,1,0} custom-call(%a, %a), "
        f'custom_call_target="{target}"'
    )


def program(body: str, op_name: str, *loops: str) -> str:
    """A program that runs one kernel in loops, the outermost first; 3 times in each."""
    text = ""
    body = f'{body}, metadata={{op_name="{op_name}"}}'
    for i, loop in reversed(list(enumerate(loops))):
        text += f"%body{i} (s: f32[]) -> f32[] {{\n{body}\n}}\n\n"
        body = (
            f"  ROOT %w{i} = f32[] while(%s), body=%body{i}, "
            f'metadata={{op_name="{loop}"}}, '
            'backend_config={"known_trip_count":{"n":"3"}}'
        )
    return f"{text}ENTRY %m (a: f32[]) -> f32[] {{\n{body}\n}}\n"


TWO = program(product(HIDDEN, WIDE), "down_proj/dot", FORWARD).replace(
    "ENTRY %m (a: f32[]) -> f32[] {\n",
    "ENTRY %m (a: f32[]) -> f32[] {\n"
    "  %b = f32[4096]{0} parameter(0)\n  %c = f32[4096]{0} copy(%b)\n",
)


# --- Traces ---


def write_trace(folder, events: list[dict], device="/device:GPU:0") -> None:
    """Writes events as jax.profiler.trace does; an event is on a stream by default."""
    names = {
        "process_name": [(1, 0, device)],
        "thread_name": [(1, 7, "Stream #7(Compute)"), (1, 8, "XLA Ops")],
    }
    metadata = [
        {"ph": "M", "pid": p, "tid": t, "name": kind, "args": {"name": name}}
        for kind, rows in names.items()
        for p, t, name in rows
    ]
    rows = [{"ph": "X", "pid": 1, "tid": 7, "ts": 0, **event} for event in events]
    path = folder / "plugins" / "profile" / "2026_01_01"
    path.mkdir(parents=True)
    with gzip.open(path / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": metadata + rows}, file)


def event(name: str, microseconds: float, hlo_op: str | None = None, **more) -> dict:
    arguments = {} if hlo_op is None else {"hlo_op": hlo_op, "hlo_module": "jit_f"}
    return {"name": name, "dur": microseconds, "args": arguments, **more}
