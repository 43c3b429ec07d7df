"""Programs that are profiled: their settings, compilation, files and count.

A step is compiled by `qlora_jax.planning.compile`; generation, which planning knows
nothing of, in a process of its own that runs this module:

    python -m scripts.profile_step.program SETTINGS.json PROGRAM.txt
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import read_json
from convert.atomic import write_text
from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.planning import categories, estimate, hlo
from qlora_jax.planning.compile import ENVIRONMENT, XLA_FLAGS, compile_for
from qlora_jax.planning.gpus import GpuSpec, find_gpu
from qlora_jax.planning.roofline import summary
from qlora_jax.planning.work import Kernel, Sizes, count_kernels

_HEADER = "// qlora-jax: "
_NAMES = {
    *("model", "config", "gpu", "batch", "length", "accumulate", "rank", "alpha"),
    *("packed", "remat", "scan_layers", "lora_products", "attention", "kernels"),
    *("norms", "activation", "mesh", "decode", "jax"),
}
"""What a saved program says of itself."""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what is compiled, as plain data that a saved program carries."""
    if args.model in MODELS:
        config = dict(MODELS[args.model].hf_config)
    else:
        path = Path(args.model)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(
                f"--model {args.model}: expected one of {', '.join(MODELS)}, or a "
                "config.json or a directory with one."
            )
        config = read_json(path)
    if args.decode:
        _check_generation(args)
    return {
        "model": args.model,
        "config": config,
        "gpu": args.gpu,
        "batch": args.batch,
        "length": args.length,
        "accumulate": args.accumulate,
        "rank": args.rank,
        # With a scaling of 1 the compiler leaves its products out.
        "alpha": 2 * args.rank if args.alpha is None else args.alpha,
        "packed": args.packed,
        "remat": "none" if args.decode else args.remat,
        "scan_layers": not args.unrolled,
        "lora_products": args.lora_products,
        "attention": args.attention,
        "kernels": args.kernels,
        "norms": args.norms,
        "activation": args.activation,
        "mesh": {k: n for k in ("data", "fsdp") if (n := getattr(args, k)) > 1},
        "decode": args.decode,
    }


def _check_generation(args: argparse.Namespace) -> None:
    """Raises if options are given that only a training step has."""
    if args.decode < 1:
        raise UserError(f"--decode must be at least 1, got {args.decode}.")
    of_training = {
        # "full" is what it is when it is not given.
        "--remat": args.remat not in ("full", "none"),
        "--unrolled": args.unrolled,
        "--packed": args.packed,
        "--accumulate": args.accumulate != 1,
        "--data": args.data != 1,
        "--fsdp": args.fsdp != 1,
    }
    if given := [name for name, is_given in of_training.items() if is_given]:
        raise UserError(
            f"{', '.join(given)}: with --decode no training step is counted, but "
            "generation on one GPU. Leave it out."
        )


def make_step(chosen: Mapping[str, Any]) -> Any:
    """Returns the training step of the settings."""
    from qlora_jax.models.layers import Compute
    from qlora_jax.planning.step import Step
    from qlora_jax.training.config import TrainConfig

    names = ("attention", "remat", "scan_layers", "kernels", "lora_products", "norms")
    compute = {name: chosen[name] for name in (*names, "activation")}
    return Step(
        LlamaConfig.from_hf(chosen["config"]),
        Compute(lora=_lora(chosen), **compute),
        length=chosen["length"],
        train=TrainConfig(
            steps=1000,
            batch_size=chosen["batch"],
            gradient_accumulation_steps=chosen["accumulate"],
        ),
        packed=chosen["packed"],
    )


def _lora(chosen: Mapping[str, Any]) -> LoraConfig:
    return LoraConfig(r=chosen["rank"], lora_alpha=chosen["alpha"])


def compile_program(
    chosen: Mapping[str, Any], python: str
) -> tuple[dict[str, Any], str]:
    """Compiles the step, or generation.

    Returns:
      The settings with the version of jax that compiled, and the text of the program.
    """
    if chosen["decode"]:
        version, text = _compile_decoding(chosen, python)
        return {**chosen, "jax": version}, text
    compiled = compile_for(
        make_step(chosen),
        find_gpu(chosen["gpu"]),
        python=python,
        mesh=chosen["mesh"] or None,
        program=True,
    )
    return {**chosen, "jax": compiled.jax}, compiled.program or ""


def _compile_decoding(chosen: Mapping[str, Any], python: str) -> tuple[str, str]:
    """Compiles generation in a process of its own, as XLA's settings need.

    Returns:
      The version of jax, and the text of the program.
    """
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request, out = folder / "settings.json", folder / "program.txt"
        request.write_text(json.dumps(chosen))
        flags = [*XLA_FLAGS, f"--xla_dump_to={folder}", "--xla_dump_hlo_as_text"]
        child = subprocess.run(
            [python, "-m", "scripts.profile_step.program", str(request), str(out)],
            env={**os.environ, **ENVIRONMENT, "XLA_FLAGS": " ".join(flags)},
            cwd=root,
            capture_output=True,
            text=True,
        )
        if child.returncode:
            raise UserError(f"generation cannot be compiled:\n{child.stderr[-2000:]}")
        launches = list(folder.glob("*_generate*thunk_sequence_after_thunk_passes.txt"))
        names = list(folder.glob("*_generate*.thunk_metadata.txt"))
        graphs = ""
        if len(launches) == len(names) == 1:
            graphs = hlo.graph_comment(launches[0].read_text(), names[0].read_text())
        return child.stdout.strip(), out.read_text() + graphs


def _lower_decoding(chosen: Mapping[str, Any], out: Path) -> None:
    """Compiles generation, in the process that `_compile_decoding` starts."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from qlora_jax.inference.config import Sampling
    from qlora_jax.inference.decode import _generate, _Program
    from qlora_jax.inference.sampling import Values
    from qlora_jax.lora.functional import abstract_adapters
    from qlora_jax.models.layers import Compute
    from qlora_jax.models.llama import Llama
    from qlora_jax.models.params import abstract_base
    from qlora_jax.planning.step import gpu_mesh

    mesh = gpu_mesh(find_gpu(chosen["gpu"]))
    device = NamedSharding(mesh, PartitionSpec())
    config, lora = LlamaConfig.from_hf(chosen["config"]), _lora(chosen)
    base = abstract_base(config, quantization="nf4_dq")
    variables = {"params": base, "lora": abstract_adapters(base, lora)}
    rows = jax.ShapeDtypeStruct((chosen["batch"], chosen["length"]), jnp.int32)
    values = jax.eval_shape(lambda: Values.of(Sampling()))
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
        (variables, rows, rows, values),
    )
    names = ("attention", "remat", "kernels", "lora_products", "norms", "activation")
    compute = {name: chosen[name] for name in names}
    size = chosen["length"] + chosen["decode"]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = Llama(config, Compute(lora=lora, **compute))
        program = _Program.of(model, Sampling(), (2,), cache_size=size)
        lowered = _generate.lower(program, *arguments, max_new_tokens=chosen["decode"])
        out.write_text(lowered.compile().as_text() or "")


def save_program(path: Path, chosen: Mapping[str, Any], text: str) -> None:
    """Writes a program with its settings in the first line."""
    write_text(path, f"{_HEADER}{json.dumps(chosen)}\n{text}")


def read_program(path: Path) -> tuple[dict[str, Any], str]:
    """Reads what `--save` wrote: the settings, and the text of the program."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {error}.") from error
    if not text.startswith(_HEADER):
        raise UserError(
            f"`{path}` was not written by --save: its first line must begin with "
            f"`{_HEADER.strip()}` and say what was compiled."
        )
    header, _, program = text.removeprefix(_HEADER).partition("\n")
    try:
        chosen = json.loads(header)
        missing = sorted(_NAMES - chosen.keys())
    except (ValueError, AttributeError) as error:
        raise UserError(f"The first line of `{path}` is damaged: {error}.") from error
    if missing:
        raise UserError(
            f"`{path}` does not say of its program: {', '.join(missing)}. Save it anew."
        )
    if "ENTRY" not in program:
        raise UserError(f"`{path}` has no whole program behind its first line.")
    return chosen, text


# --- The count ---


def count(
    chosen: Mapping[str, Any], program: str, gpu: GpuSpec
) -> tuple[dict[str, Any], list[Kernel], Sizes]:
    """Counts a program.

    Args:
      chosen: its settings.
      program: scheduled HLO as text.
      gpu: the data sheet of each device.

    Returns:
      The report (that of `roofline.summary`, with the settings), the kernels of a step
      or of a token, and the sizes.
    """
    config, lora = LlamaConfig.from_hf(chosen["config"]), _lora(chosen)
    devices = math.prod(chosen["mesh"].values())
    sizes = Sizes.of_model(
        config, lora, rows=chosen["batch"] // devices, length=chosen["length"]
    )
    kernels = count_kernels(hlo.parse(program), sizes)
    step = make_step(chosen)
    if chosen["decode"]:
        # A loop whose number of iterations is not known counts once: one token.
        kernels = [k for k in kernels if categories.phase(k) == "token"]
        work = {"tokens": chosen["batch"], **token_floor(chosen, config, lora)}
    else:
        tokens = step.tokens * chosen["accumulate"]
        flops = estimate.necessary_flops(step, devices=devices)
        work = {"tokens": tokens, "necessary_flops": flops}
    report = summary(kernels, sizes, gpu, **work)
    return {"settings": dict(chosen), **report}, kernels, sizes


def token_floor(
    chosen: Mapping[str, Any], config: LlamaConfig, lora: LoraConfig
) -> dict[str, float]:
    """Returns what a token of every row needs: each weight and key read once."""
    parameters = estimate.parameter_report(config, lora)
    table = config.vocab_size * config.hidden_size
    # Of the embedding a row is looked up; a tied head reads all of it.
    looked_up = 0 if config.tie_word_embeddings else 2 * table
    pairs = config.num_key_value_heads * config.head_dim
    cache = 2 * 2 * config.num_hidden_layers * pairs * chosen["length"]
    weights = parameters.base_parameters - looked_up // 2
    return {
        "necessary_flops": 2.0 * weights * chosen["batch"],
        "necessary_bytes": parameters.base_bytes
        - looked_up
        + 4 * parameters.trainable_parameters
        + cache * chosen["batch"],
    }


if __name__ == "__main__":
    _lower_decoding(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    import jax

    print(jax.__version__)
