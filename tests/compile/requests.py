"""What the tests ask the GPU compiler for, as compile_for_gpu.py reads it."""

import pytest

LLAMA_8B = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
"""(out, in) of the linear layers of Llama 3 8B."""


def nf4(kernel: str, shape, dtype="bfloat16", *, nested, layers=3, rows=0, **options):
    """An NF4 kernel; `rows` of x for those that multiply."""
    case = {"kernel": kernel, "shape": shape, "dtype": dtype, "nested": nested}
    return case | {"layers": layers, "rows": rows, "options": options}


def name(case: dict) -> str:
    words = {k: v for k, v in case.items() if v and k not in ("options", "layers")}
    words |= case.get("options", {})
    return "-".join(f"{k}{v}".replace(" ", "") for k, v in words.items())


def each(cases: list[dict]) -> pytest.MarkDecorator:
    """Runs a test on the kernel of each request of its module's `ALL`."""
    return pytest.mark.parametrize("case", cases, ids=name)
