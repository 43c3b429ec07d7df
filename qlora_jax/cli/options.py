"""How options are parsed and explained by `--help`, and those of several commands.

tyro joins the lines of a field's docstring only where they are not indented, and then
wraps each line anew; here they are joined first, paragraph by paragraph.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    get_args,
    get_type_hints,
)

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from qlora_jax.choices import Attention, Auto, Dtype, Quantization
from qlora_jax.errors import CheckpointError, UsageError, say
from qlora_jax.lora import LoraConfig

if TYPE_CHECKING:
    from qlora_jax.inference import Model
    from qlora_jax.runs import Resolved

T = TypeVar("T")

FLAGS = (tyro.conf.FlagCreatePairsOff,)
"""For `config` of `parse`: a flag has one form, the one that changes its default."""

_BOOLEANS = {"True": True, "False": False}
# What a run notes in its adapter: options that work and that the help leaves out.
_HIDDEN = ("base_fingerprint", "base_config_changes")


def parse(kind: type[T], args: Sequence[str], *, prog: str, **settings: Any) -> T:
    """Builds a dataclass from the options of a command line.

    Args:
      kind: the dataclass; each field is an option.
      args: the command line, without the names of program and command.
      prog: these names, for usage and errors.
      **settings: of `tyro.cli`, such as `default`.

    Raises:
      SystemExit: 0 after `--help`; 2 for wrong usage, with a message on stderr.
    """
    check_names(kind, args, prog)
    is_single = settings.get("config") == FLAGS
    args = _spell_switches(args, dict(_switches(kind)), is_single)
    with _help_rules(is_single):
        command = tyro.cli(kind, args=args, prog=prog, **settings)
    # `--output=~/out` reaches a program as it is written.
    paths = {
        field.name: value.expanduser()
        for field in dataclasses.fields(command)
        if isinstance(value := getattr(command, field.name), Path)
    }
    return dataclasses.replace(command, **paths) if paths else command


def check_names(kind: Any, args: Sequence[str], prog: str) -> None:
    """Refuses options by their names in other libraries, with those here.

    Raises:
      UsageError: names all of them. Other unknown options are left to the parser.
    """
    names = [arg.partition("=")[0][2:] for arg in args if arg.startswith("--")]
    options = {name.replace("-", "_") for name in _option_names(kind)}
    unknown = [name for name in names if name.replace("-", "_") not in options]
    if not unknown:
        return
    from qlora_jax.runs import list_options, option_hint

    wrong = [
        f"There is no option `--{name}`.{ours}"
        for name in unknown
        if (ours := _short_form(name, options) or option_hint(name, options))
    ]
    if wrong:
        raise UsageError(list_options(wrong, prog.partition(" [")[0]))


def _short_form(name: str, options: Collection[str]) -> str:
    """Returns where a run's `--model.path` is `--model`, with a space before it."""
    section, _, last = name.replace("-", "_").partition(".")
    is_short = last == "path" and section in options
    return f" Here it is `--{section}`." if is_short else ""


def _option_names(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yields the names of the options of a dataclass, in a section also with it."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _option_names(hints[field.name], f"{prefix}{field.name}.")


def _switches(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the options of a dataclass that are on or off, with their defaults.

    An option with further choices has the default None.
    """
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _switches(hint, f"{name}.")
        elif hint is bool:
            yield name, field.default
        elif any(True in get_args(choice) for choice in get_args(hint)) or (
            bool in get_args(hint)
        ):
            yield name, None


def _spell_switches(
    args: Sequence[str], switches: Mapping[str, Any], is_single: bool
) -> list[str]:
    """Writes `--check true` and `--check=false` as tyro has them: `--no-check`.

    Args:
      args: a command line.
      switches: name -> default of the options that are on or off.
      is_single: a flag has one form, the one that changes its default.
    """
    rest, spelled = list(args), []
    while rest:
        arg = rest.pop(0)
        option, is_assigned, value = arg.partition("=")
        name = option.removeprefix("--").replace("_", "-")
        if not is_assigned and rest:
            value = rest[0]
        value = value.capitalize()
        if option[:2] != "--" or name not in switches or value not in _BOOLEANS:
            spelled.append(arg)
            continue
        if not is_assigned:
            rest.pop(0)
        section, _, flag = name.rpartition(".")
        if switches[name] is None:
            spelled += [option, value]
        elif not is_single or switches[name] is not _BOOLEANS[value]:
            prefix = f"--{section}." if section else "--"
            spelled.append(prefix + ("" if _BOOLEANS[value] else "no-") + flag)
    return spelled


def path_argument(name: str) -> Any:
    """Names a path that is given without an option, as `--help` shows it."""
    return tyro.conf.arg(metavar=name)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options of every command that computes with a model."""

    path: Annotated[tyro.conf.Positional[str], path_argument("PATH")]
    """Model directory, adapter directory, run directory, or a name of the hub."""
    base: str | None = None
    """Base of an adapter directory, where its configuration does not lead to it."""
    quantization: Auto | Quantization = "auto"
    """Of the base's linear layers; auto = as run or adapter were trained (the output
    head included), and as stored without a record of that."""
    dtype: Auto | Dtype = "auto"
    """Of activations and dense tensors; auto likewise."""
    attention: Attention = "auto"
    """Attention implementation."""
    resize_to_adapter: bool = False
    """Let the vocabulary of the base grow to that of an adapter trained with added
    tokens (default: as a run directory was trained, else such an adapter is refused).
    """
    strict: bool = True
    """Use what fits of an adapter that does not fit exactly, and list on stderr what is
    left out (default: such an adapter is refused)."""

    def resolve(self) -> Resolved:
        """Returns the base, adapter and run that `path` stands for."""
        from qlora_jax.runs import resolve

        return resolve(self.path, self.base, strict=self.strict)

    def load(self, resolved: Resolved | None = None) -> Model:
        """Loads the model (`resolve()`, if not given) and describes it on stderr."""
        from qlora_jax.runs import load

        model = load(
            self.resolve() if resolved is None else resolved,
            quantization=self.quantization,
            dtype=self.dtype,
            attention=self.attention,
            resize_to_adapter=self.resize_to_adapter or "auto",
            strict=self.strict,
            progress=sys.stderr.isatty(),
        )
        # Quantization and dtype matter to whoever compares two losses.
        say(model.description)
        return model


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """The options of every command that writes a model or an adapter."""

    push_to_hub: str | None = None
    """Publish the result on the Hugging Face hub as well, as `owner/name`, with a model
    card."""
    private: bool = True
    """Make a new repository of --push-to-hub public (default: private; one that exists
    stays as it is)."""

    def check_push(self, output: Path) -> None:
        """Creates the repository unless it exists, before anything large is read.

        Args:
          output: directory to create, which is checked first.
        """
        if self.push_to_hub is not None:
            from convert import check_new_directory, check_push

            check_new_directory(output)
            check_push(self.push_to_hub, private=self.private)
        elif not self.private:
            raise UsageError("--no-private goes with --push-to-hub.")

    def publish(
        self,
        directory: Path,
        *,
        run: Path | None = None,
        base: Path | None = None,
        relation: Literal["finetune", "quantized"] | None = None,
    ) -> dict[str, str]:
        """Publishes what was written, if asked to; returns what the report gets.

        Args:
          directory: of the model or adapter.
          run: directory of the run that trained it.
          base: directory that it was made from.
          relation: of a model to that.

        Raises:
          CheckpointError: it was written, and could not be published.
        """
        if self.push_to_hub is None:
            return {}
        from qlora_jax.runs import publish

        try:
            url = publish(
                directory, self.push_to_hub, run=run, base=base, relation=relation
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"`{directory}` was written, and could not be published: {error} `hf "
                f"upload {self.push_to_hub} {directory}` tries it again, without a "
                "model card."
            ) from error
        return {"published": url}


def _help_rules(is_single: bool) -> ConstructorRegistry:
    """Returns rules for tyro, to enter as a context: they change help texts only.

    Args:
      is_single: a flag has one form. The text of `--no-check` says what it does, and
        the default of the field, True, would read as the flag's.
    """
    registry = ConstructorRegistry()
    asking: list[Any] = []

    @registry.struct_rule
    def explain(info: StructTypeInfo) -> StructConstructorSpec | None:
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking.append(info)  # so that the question below goes to tyro's own rules
        try:
            spec = registry.get_struct_spec(info)
        finally:
            asking.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        is_lora = isinstance(info.type, type) and issubclass(info.type, LoraConfig)
        fields = [
            _hide(field) if is_lora and field.name in _HIDDEN else _join(field)
            for field in spec.fields
        ]
        # The text says what happens where an option is left out; "None" says nothing.
        hidden = (None, True, False) if is_single else (None,)
        fields = [
            _without_default(field)
            if any(field.default is v for v in hidden)
            else field
            for field in fields
        ]
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def _hide(field: StructFieldSpec) -> StructFieldSpec:
    kind: Any = Annotated[field.type, tyro.conf.Suppress]
    return dataclasses.replace(field, type=kind)


def _without_default(field: StructFieldSpec) -> StructFieldSpec:
    kind: Any = Annotated[field.type, tyro.conf.arg(help_behavior_hint="")]
    return dataclasses.replace(field, type=kind)


def _join(field: StructFieldSpec) -> StructFieldSpec:
    return dataclasses.replace(field, helptext=partial(join_lines, field.helptext))


def join_lines(helptext: str | Callable[[], str | None] | None) -> str | None:
    """Joins the lines of a help text; paragraphs stay separate."""
    text = helptext() if callable(helptext) else helptext
    return text and re.sub(r"(?<!\n)\n[ \t]*(?!\s)", " ", text)
