"""Renders chat templates, which others wrote, within bounds of time and memory.

transformers runs a template in a sandbox that keeps it from files and programs, but not
from memory or endless loops. Nearly all templates only walk over the turns and write
them: `is_linear` sees that in their syntax, and they are rendered here, at no cost.
Any other template is rendered in a process of its own, with limits that the system
keeps; that takes about 0.2 ms a conversation more, and a few seconds once.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError

SECONDS = 5
"""Processor time for one conversation."""
MEMORY_BYTES = 1 << 30
"""Memory for one conversation; macOS does not keep this limit."""

# Turns and characters of a conversation beyond which a loop that writes all of them for
# each turn would take noticeable memory.
_MAX_PRODUCT = 1_000_000_000


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Renders a conversation as `tokenizer.apply_chat_template` does, within bounds.

    Args:
      tokenizer: a `transformers` tokenizer.
      messages: the turns.
      **options: `chat_template`, `tools`, `add_generation_prompt`, and variables of the
        template.

    Raises:
      UserError: the template takes too much time or memory.
      Exception: what the template raises.
    """
    if not hasattr(tokenizer, "get_chat_template"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    source = tokenizer.get_chat_template(
        options.get("chat_template"), tools=options.get("tools")
    )
    characters = sum(len(str(message.get("content"))) for message in messages)
    if is_linear(source) and len(messages) ** 2 * characters < _MAX_PRODUCT:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    options = options | {"chat_template": source}
    variables = {**tokenizer.special_tokens_map, **options}
    return _worker().render(messages, variables)


# --- What a template may take, by its syntax ---

_STATEMENTS = "Template Output TemplateData If Scope ExprStmt Continue Break"
_EXPRESSIONS = (
    "Name NSRef Const Getattr Getitem Slice Compare Operand And Or Not CondExpr Test "
    "Neg Sub List Tuple Dict Pair Keyword"
)
_HARMLESS = frozenset(f"{_STATEMENTS} {_EXPRESSIONS}".split())
_JOINING = frozenset("Add Concat List Tuple Dict Filter".split())
_FILTERS = frozenset(
    "trim length count upper lower capitalize title string list first last default d "
    "items tojson selectattr rejectattr select reject map safe int float abs".split()
)
_METHODS = frozenset(
    "split rsplit strip lstrip rstrip startswith endswith get items keys values upper "
    "lower title capitalize find".split()
)
_FUNCTIONS = frozenset(("raise_exception", "namespace", "dict"))
# With arguments that are constants: they expand a text by a constant factor.
_CONSTANT_FILTERS, _CONSTANT_METHODS = ("join", "replace"), ("replace",)
_MAX_DEPTH, _MAX_INDENT = 60, 8


@functools.lru_cache(maxsize=16)
def is_linear(source: str) -> bool:
    """Whether the syntax of a template bounds its time by the size of a conversation.

    It has loops over what it is given only, an inner one over a part of what the outer
    one stands at; nothing repeats, pads or formats text; no variable is joined with
    itself. False says nothing about the template.

    Raises:
      jinja2.TemplateSyntaxError: it is not a template.
      UserError: it is nested too deeply.
    """
    try:
        tree = _environment().parse(source)
    except RecursionError:
        raise UserError("The chat template is nested too deeply.") from None
    nodes = _nodes()
    joined = _joined_names(tree)
    for assign in tree.find_all(nodes.Assign):
        if _joins(assign) and sum(n in joined for n in _names(assign.node)) > 1:
            return False
    return _is_bounded(tree, None, 0)


def _nodes() -> Any:
    import jinja2.nodes

    return jinja2.nodes


@functools.cache
def _environment() -> Any:
    """Returns an environment that parses what transformers' does, and runs nothing."""
    import jinja2
    import jinja2.ext

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return _nodes().Scope(body).set_lineno(line)

    extensions = (Generation, jinja2.ext.loopcontrols)
    return jinja2.Environment(extensions=extensions)


def _names(tree: Any) -> list[str]:
    nodes = _nodes()
    found = [name.name for name in tree.find_all(nodes.Name)]
    return [*found, tree.name] if isinstance(tree, nodes.Name) else found


def _joins(assign: Any) -> bool:
    return any(
        type(node).__name__ in _JOINING for node in (assign.node, *_walk(assign.node))
    )


def _walk(node: Any) -> Iterator[Any]:
    for child in node.iter_child_nodes():
        yield child
        yield from _walk(child)


def _joined_names(tree: Any) -> set[str]:
    """Returns the variables that are joined from others, or assigned from such."""
    nodes = _nodes()
    assigns = list(tree.find_all(nodes.Assign))
    joined: set[str] = set()
    while True:
        new = {
            target.name
            for assign in assigns
            if _joins(assign) or joined & set(_names(assign.node))
            for target in (assign.target, *_walk(assign.target))
            if isinstance(target, nodes.Name | nodes.NSRef)
        }
        if new <= joined:
            return joined
        joined |= new


def _is_bounded(node: Any, inner: set[str] | None, depth: int) -> bool:
    """Whether a node and those in it are of bounded kinds.

    Args:
      node: of the syntax tree.
      inner: variables that stand for a part of what the innermost loop is at; None
        outside of loops.
      depth: levels above it.
    """
    if depth > _MAX_DEPTH:
        return False
    kind, nodes = type(node).__name__, _nodes()
    if kind == "For":
        if node.recursive or (
            inner is not None and not set(_names(node.iter)) <= inner
        ):
            return False
        targets = set(_names(node.target))
        parts = (*node.body, *node.else_, *([node.test] if node.test else []))
        return _is_bounded(node.iter, inner, depth + 1) and all(
            _is_bounded(part, targets, depth + 1) for part in parts
        )
    if kind == "Assign" and inner is not None and not _joins(node):
        names = set(_names(node.node))
        if names and names <= inner:
            inner |= set(_names(node.target))
    allowed = kind in _HARMLESS or kind in ("Assign", "Add", "Concat")
    constant = all(isinstance(a, nodes.Const) for a in getattr(node, "args", ()))
    if kind == "Mod":  # of numbers, not the formatting of strings
        left = node.left
        allowed = (
            isinstance(left, nodes.Getattr)
            and isinstance(left.node, nodes.Name)
            and left.node.name == "loop"
            and isinstance(node.right, nodes.Const)
        )
    elif kind == "Filter":
        allowed = node.name in _FILTERS or (
            node.name in _CONSTANT_FILTERS and constant and not node.kwargs
        )
        if node.name == "tojson":
            allowed = not node.args and all(map(_is_small_indent, node.kwargs))
    elif kind == "Call":
        allowed = _is_bounded_call(node, constant)
    return allowed and all(
        _is_bounded(child, inner, depth + 1) for child in node.iter_child_nodes()
    )


def _is_small_indent(keyword: Any) -> bool:
    value = getattr(keyword.value, "value", None)
    if keyword.key != "indent":
        return keyword.key in ("ensure_ascii", "sort_keys")
    return value is None or (type(value) is int and 0 <= value <= _MAX_INDENT)


def _is_bounded_call(node: Any, constant: bool) -> bool:
    nodes, function = _nodes(), node.node
    if node.dyn_args or node.dyn_kwargs:
        return False
    if isinstance(function, nodes.Name):
        if function.name == "strftime_now":  # "%9999Y" pads
            return constant and not any(c.isdigit() for a in node.args for c in a.value)
        return function.name in _FUNCTIONS
    if isinstance(function, nodes.Getattr):
        return function.attr in _METHODS or (
            function.attr in _CONSTANT_METHODS and constant
        )
    return False


# --- The process for other templates ---


def _too_much() -> UserError:
    return UserError(
        f"The chat template takes more than {SECONDS} s of processor time or "
        f"{MEMORY_BYTES / 1e9:.1f} GB of memory for a conversation. Is it a chat "
        "template? Give the path of another one as `data.chat_template`."
    )


class _Worker:
    """A process that renders, started when it is needed and again after a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        # They would take as long for every other conversation.
        self._refused: set[str] = set()

    def render(self, messages: list[Any], variables: Mapping[str, Any]) -> str:
        """Renders a conversation.

        Raises:
          UserError: the process has reached a limit.
          ValueError: what the template raised, with its message.
          jinja2.TemplateSyntaxError: it is not a template.
        """
        request = pickle.dumps((messages, dict(variables), SECONDS))
        with self._lock:
            if variables["chat_template"] in self._refused:
                raise _too_much()
            process = self._process or self._start()
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None and stdout is not None
            answer = b""
            try:
                stdin.write(len(request).to_bytes(8, "little") + request)
                stdin.flush()
                answer = stdout.readline()
            except BrokenPipeError:
                pass
            except BaseException:  # Ctrl-C: the answer is still to come
                self.stop()
                raise
            if not answer.endswith(b"\n"):
                self.stop()
                self._refused.add(variables["chat_template"])
                raise _too_much()
        kind, text = json.loads(answer)
        if kind == "text":
            return text
        raise ValueError(text)

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        code = (
            f"import sys; sys.path.insert(0, {root!r}); "
            "from qlora_jax.data.bounded_templates import main; main()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C in a terminal is for this process, which stops it.
            start_new_session=True,
        )
        return self._process

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@functools.cache
def _worker_of(pid: int) -> _Worker:
    worker = _Worker()
    atexit.register(worker.stop)
    return worker


def _worker() -> _Worker:
    return _worker_of(os.getpid())  # a fork must not share the pipes


def main() -> None:
    """Answers requests on stdin with lines of JSON on stdout, until its end."""
    import resource

    from transformers.utils.chat_template_utils import render_jinja_template

    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    _limit_memory(resource)
    while header := stdin.read(8):
        request = stdin.read(int.from_bytes(header, "little"))
        messages, variables, allowed = pickle.loads(request)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + allowed
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        # The default of SIGXCPU ends the process.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
        try:
            texts, _ = render_jinja_template(conversations=[messages], **variables)
            answer = json.dumps(("text", texts[0]))
        except MemoryError:
            return
        except Exception as error:
            reason = str(error)[:2000] or type(error).__name__
            answer = json.dumps(("error", reason))
        stdout.write(answer.encode() + b"\n")
        stdout.flush()


def _limit_memory(resource: Any) -> None:
    """Bounds what the process may allocate beyond what it has now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # macOS
        return
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
