"""`qlora-jax`: train, evaluate, ask, inspect, plan and quantize on a command line.

Exit status: 0 done, or a run that a signal stopped and that is saved; 1 a failure the
user can mend (one paragraph on stderr), 2 wrong usage, 130 interrupted, 143 terminated.
What a command reports goes to stdout, as a table or, with `--json`, as one JSON object;
progress goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

import convert
from convert.checkpoint import open_checkpoint
from convert.files import read_json
from convert.output import check_new_directory
from convert.peft import adapter_bytes, open_adapter, peft_directory
from qlora_jax.choices import Auto, Dtype, Quantization, Quantized
from qlora_jax.config import LlamaConfig
from qlora_jax.continued import CHANGEABLE, continued
from qlora_jax.data_command import DataView, print_view, view_from_arguments
from qlora_jax.directories import (
    ADAPTER,
    adapter_directory,
    find_base,
    quantizes_lm_head,
    resolve_auto,
    run_settings,
)
from qlora_jax.errors import UserError
from qlora_jax.eval_command import Eval, eval_from_arguments
from qlora_jax.generate_command import Chat, Generate
from qlora_jax.interruptions import (
    STOPS,
    AtOnce,
    leave,
    stopped,
    termination_raises,
)
from qlora_jax.lora_config import LoraConfig
from qlora_jax.memory import abstract_base, parameter_report, warnings
from qlora_jax.options import explained, place
from qlora_jax.plan_command import PlanCommand, plan_from_arguments, print_plan
from qlora_jax.printed import print_report
from qlora_jax.run_page import Report
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.overrides import (
    given_lora,
    option_defaults,
    option_keys,
    unchecked,
    values_of,
)
from qlora_jax.runs.toml import SETTINGS, read_config
from qlora_jax.tokens import Tokens
from qlora_jax.train_config import Optimizer, TrainConfig


@dataclass(frozen=True)
class Inspect:
    """Count what a run would train and store; reads configurations, loads nothing."""

    path: Annotated[tyro.conf.Positional[str], place("PATH")]
    """Model directory or its config.json; a run file (.toml), where options win; or an
    adapter or run directory, whose own LoRA configuration is then the one counted."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    base: str | None = None
    """Base of an adapter directory, where its configuration does not lead to it."""
    quantization: Auto | Quantization = "auto"
    """Of the base's linear layers; auto = that of a run file or run directory, else
    nf4_dq."""
    dtype: Auto | Dtype = "auto"
    """Of dense tensors; auto = that of a run file or run directory, else bfloat16."""
    optimizer: Optimizer | None = None
    """Whose state is counted; default that of a run file or run directory, else adamw.
    """
    json: bool = False
    """Print a JSON object."""

    def run(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Does it; returns the report.

        Args:
          given: names of the fields of `lora` that were given; they win over a run
            file's, and those of an adapter cannot be changed.
        """
        path, lora = Path(self.path), self.lora
        planned = path.suffix == ".toml"
        if planned:
            keys = {f"lora.{name}" for name in given}
            trained = read_config(path, values_of(self, keys))
            lora, given = trained.lora, given_lora(path, keys)
            path = Path(self.base or trained.model.path)
            adapter = self._initial_adapter(trained)
        else:
            trained = run_settings(path)
            adapter = adapter_directory(path)
            if adapter is not None:
                path = find_base(adapter, self.base)
        quantize_lm_head = quantizes_lm_head(trained, self.quantization)
        quantization, dtype = resolve_auto(trained, self.quantization, self.dtype)
        if path.is_dir():
            path = path / "config.json"
        config = LlamaConfig.from_hf(read_json(path))
        if adapter is not None:
            lora, _ = continued(
                open_adapter(adapter)[0],
                lora,
                given,
                abstract_base(config),
                name=str(adapter),
                changeable=CHANGEABLE if planned else (),
            )
        saved = lora.absorbed
        if saved.base_fingerprint is None and (planned or adapter is None):
            # A run writes one; its digits do not matter, their number does.
            saved = dataclasses.replace(saved, base_fingerprint="0" * 64)
        train = TrainConfig(steps=1) if trained is None else trained.train
        if self.optimizer is not None:
            train = dataclasses.replace(train, optimizer=self.optimizer)
        report = parameter_report(
            config,
            lora,
            quantization=quantization,
            quantize_lm_head=quantize_lm_head,
            dtype=dtype,
            train=train,
        )
        return {
            "trainable_parameters": report.trainable_parameters,
            "groups": dict(report.groups),
            "adapter_bytes": adapter_bytes(config, saved),
            "optimizer_bytes": report.optimizer_bytes,
            "base_parameters": report.base_parameters,
            "base_bytes": report.base_bytes,
            "quantization": quantization or "none",
            **({"lm_head": "nf4"} if quantize_lm_head else {}),
            "dtype": dtype,
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "scaling": lora.scaling,
            "target_modules": lora.target_modules,
            "warnings": warnings(config, lora),
        }

    @staticmethod
    def _initial_adapter(run: RunConfig) -> Path | None:
        """The adapter whose settings a run takes, if it starts from one."""
        if run.train.adapter_init is None:
            return None
        return peft_directory(Path(run.train.adapter_init))


@dataclass(frozen=True)
class Quantize:
    """Quantize a checkpoint to a bitsandbytes-4bit directory (NF4)."""

    input: Annotated[tyro.conf.Positional[str], place("IN")]
    """Hugging Face directory of 16- or 32-bit weights."""
    output: Annotated[tyro.conf.Positional[str], place("OUT")]
    """Directory to create."""
    quantization: Quantized = "nf4_dq"
    """NF4, or NF4 with double quantization."""
    dtype: Dtype | None = None
    """Of the tensors that stay dense; default as in the file."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report."""
        source = open_checkpoint(self.input)
        if source.quantized:
            raise UserError(
                f"`{self.input}` is quantized already; its packed weights would be "
                "written as they are. Give the original 16-bit checkpoint."
            )
        check_new_directory(Path(self.output))
        before = sum(source.files[name].nbytes for name in source.files)
        config, base = convert.load_llama(
            self.input, quantization=self.quantization, dtype=self.dtype, progress=True
        )
        convert.save_llama(
            self.output, config, base, tokenizer_from=self.input, progress=True
        )
        after = sum(p.stat().st_size for p in Path(self.output).glob("*.safetensors"))
        return {
            "output": self.output,
            "bytes_before": before,
            "bytes_after": after,
            "ratio": after / before,
        }


_COMMANDS: dict[str, tuple[Any, str]] = {
    "train": (RunConfig, "Fine-tune a model, or continue a run."),
    "eval": (Eval, "Loss and perplexity on a data file."),
    "generate": (Generate, "Continue prompts."),
    "chat": (Chat, "Talk to a model in the terminal."),
    "data": (DataView, "What a run would train on: tokens, labels, lengths."),
    "report": (Report, "A page for a browser about a run, finished or under way."),
    "inspect": (Inspect, "Parameters, adapter size, optimizer size; loads nothing."),
    "plan": (PlanCommand, "What fits on a card; loads nothing."),
    "quantize": (Quantize, "Write a bitsandbytes-4bit directory."),
    "tokens": (Tokens, "Vocabulary rows never trained: find, repair, add."),
}
_CONTINUES = " The same command continues from the newest checkpoint, if there is one."
_USAGE = "usage: qlora-jax COMMAND ...\n\ncommands:\n" + "".join(
    f"  {name:<10}{text}\n" for name, (_, text) in _COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE + "\n`qlora-jax COMMAND --help` says what each takes.")
        return 0 if args else 2
    if args[0] not in _COMMANDS:
        print(f"qlora-jax: no command {args[0]!r}.\n\n{_USAGE}", file=sys.stderr)
        return 2
    # Orbax logs, thread by thread, the errors that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with explained():
            return _run(args[0], args[1:])
    except UserError as error:
        print(f"qlora-jax {args[0]}: {error}", file=sys.stderr)
        return 1
    except SystemExit as error:  # how tyro ends, for --help and for wrong usage
        return error.code if isinstance(error.code, int) else 2
    except STOPS as error:
        hint = ""
        if args[0] == "train":
            idle = "" if isinstance(error, AtOnce) else " No step was under way."
            hint = idle + _CONTINUES
        return stopped(f"qlora-jax {args[0]}", error, hint)


def entry() -> NoReturn:
    """The console script: runs one command and leaves with its status."""
    leave(main())


def _run(name: str, args: list[str]) -> int:
    command = _COMMANDS[name][0]
    if name == "train":
        with termination_raises():
            _train(args)
        return 0
    if name == "plan":
        planned, given = plan_from_arguments(args)
        report = planned.run(given)
        if planned.json:
            print(json.dumps(report))
        else:
            print_plan(report)
        return 0
    if name == "data":
        view = view_from_arguments(args)
        report = view.run()
        if view.json:
            print(json.dumps(report))
        else:
            print_view(report)
        return 0
    if name == "eval":
        chosen = eval_from_arguments(args)
    else:
        chosen = tyro.cli(command, args=args, prog=f"qlora-jax {name}")
    if isinstance(chosen, Inspect):
        report = chosen.run(given_lora(None, option_keys(args)))
    else:
        report = chosen.run()
    if isinstance(chosen, Chat) or (isinstance(chosen, Generate) and chosen.stream):
        return 0  # all is printed
    if chosen.json:
        print(json.dumps(report))
    elif name == "generate":
        print("\n\n".join(report["texts"]))
    else:
        print_report(report)
    return 0


def _train(args: list[str]) -> None:
    """`train CONFIG.toml [--section.key value ...]`."""
    file = Path(args.pop(0)) if args and not args[0].startswith("-") else None
    keys = option_keys(args)
    like, start = unchecked(
        None if file is None else option_defaults(read_config(file))
    )
    options = tyro.cli(
        like,
        args=args,
        # Without one, options that are not given keep the defaults of their fields.
        default=tyro.MISSING_NONPROP if start is None else start,
        prog="qlora-jax train [CONFIG.toml]",
        description="Fine-tune a model, or continue a run: the same command on the "
        "same --output-dir goes on from the newest checkpoint. CONFIG.toml holds these "
        "options by section; options given here win.",
    )
    config = read_config(file, values_of(options, keys))
    given = given_lora(file, keys)
    # The other commands have no use for the libraries that a run needs.
    from qlora_jax.runner import run
    from qlora_jax.watch import process_seconds

    report = run(config, given=given, began=time.perf_counter() - process_seconds())
    if "interrupted" in report:
        settings = str(Path(config.output_dir) / SETTINGS)
        print(
            f"Stopped by {report['interrupted']} after step {report['step']}; all of "
            "it is saved. To continue:\n\n    qlora-jax train "
            f"{shlex.quote(settings)}"
        )
        return
    shown = ("steps", "final_loss", "trainable_parameters", "groups", "adapter_bytes")
    print_report(
        {
            "run directory": config.output_dir,
            "adapter": str(Path(config.output_dir) / ADAPTER),
            **{name: report[name] for name in shown},
        }
    )


if __name__ == "__main__":
    entry()
