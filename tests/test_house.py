"""The rules of the house, held on the source itself.

What may import what, what importing may do, how large a module may be, what the wheel
and the README list: each rule is data at the top and one test below.
"""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pallas_kernels", "qlora_jax", "convert")

# One-way imports. A module may import the lines above its own, and its own line (which
# must then be a package: pallas_kernels and convert order themselves).
ORDER = (
    "pallas_kernels",
    "qlora_jax.version",
    "qlora_jax.choices",
    "qlora_jax.errors",
    "qlora_jax.tree",
    "qlora_jax.patterns",
    "qlora_jax.config",
    "qlora_jax.config_changes",
    "qlora_jax.nf4",
    "qlora_jax.fingerprint",
    "qlora_jax.lora_config",
    "qlora_jax.targets",
    "qlora_jax.describe",
    "qlora_jax.continued",
    "qlora_jax.bases",
    "qlora_jax.vocabulary",
    "qlora_jax.lora",
    "qlora_jax.lora_init",
    "qlora_jax.adapters",
    "qlora_jax.placement",
    "qlora_jax.linear",
    "qlora_jax.attention",
    "qlora_jax.rope",
    "qlora_jax.llama",
    "qlora_jax.data.rows",
    "qlora_jax.data.settings",
    "qlora_jax.data.report",
    "qlora_jax.data.sources",
    "qlora_jax.data.chat",
    "qlora_jax.data.segments",
    "qlora_jax.data.packing",
    "qlora_jax.data.encoding",
    "qlora_jax.data.arrays",
    "qlora_jax.data.cache",
    "qlora_jax.data.mixture",
    "qlora_jax.data.held_out",
    "qlora_jax.data.examples",
    "qlora_jax.data.batches",
    "qlora_jax.data.notes",
    "qlora_jax.data",
    "qlora_jax.loss",
    "qlora_jax.adam8bit",
    "qlora_jax.train_config",
    "qlora_jax.parameter_groups",
    "qlora_jax.optimizer",
    "qlora_jax.train",
    "qlora_jax.inputs",
    "qlora_jax.sampling",
    "qlora_jax.generate",
    "qlora_jax.dialogue",
    "qlora_jax.memory",
    "qlora_jax.cards",
    "qlora_jax.sharding",
    "qlora_jax.collectives",
    "qlora_jax.step_memory",
    "qlora_jax.estimate",
    "qlora_jax.compile_for",
    "convert",
    "qlora_jax.runs.config",
    "qlora_jax.runs.toml",
    "qlora_jax.runs.overrides",
    "qlora_jax.runs",
    "qlora_jax.directories",
    "qlora_jax.interruptions",
    "qlora_jax.checkpoint",
    "qlora_jax.provenance",
    "qlora_jax.model",  # not `load`: the public function of that name would be hidden
    "qlora_jax.compare",
    "qlora_jax.trackers",
    "qlora_jax.watch",
    "qlora_jax.loss_plot",
    "qlora_jax.evaluation",
    "qlora_jax.tokens",
    "qlora_jax.plan",
    "qlora_jax.fit",
    "qlora_jax.run_directory",
    "qlora_jax.run_record",
    "qlora_jax.loop",
    "qlora_jax.page",
    "qlora_jax.curves",
    "qlora_jax.run_page",
    "qlora_jax.settled",
    "qlora_jax.runner",
    "qlora_jax.options",
    "qlora_jax.printed",
    "qlora_jax.plan_command",
    "qlora_jax.data_page",
    "qlora_jax.data_command",
    "qlora_jax.generate_command",
    "qlora_jax.eval_command",
    "qlora_jax.verify_command",
    "qlora_jax.cli",
    "qlora_jax.convert_cli",
    "scripts",
)
DOORS = ORDER[ORDER.index("convert") + 1 : ORDER.index("scripts")]
# Narrower than the order: the byte formats and the core's data types, never the model,
# the loss or training.
ALLOWED = {
    "convert": {
        "convert",
        "pallas_kernels",
        "qlora_jax.version",
        "qlora_jax.choices",
        "qlora_jax.errors",
        "qlora_jax.tree",
        "qlora_jax.config",
        "qlora_jax.config_changes",
        "qlora_jax.nf4",
        "qlora_jax.lora_config",
        "qlora_jax.targets",
        "qlora_jax.lora",
    },
}
# Where an import against the order is made inside a function: (from, to) -> reason.
LAZY_EXCEPTIONS: dict[tuple[str, str], str] = {}

# What each package may import from outside, at module level and inside functions.
OUTSIDE = {
    "pallas_kernels": {"jax", "jaxlib", "jaxtyping", "numpy"},
    "convert": {
        *("jax", "jaxtyping", "ml_dtypes", "numpy", "rich", "safetensors"),
    },
    "qlora_jax": {
        *("flax", "jax", "jaxtyping", "jinja2", "ml_dtypes", "numpy", "optax"),
        *("orbax", "rich", "safetensors", "tyro"),
    },
}
# Slow to import or an extra: inside functions only.
OUTSIDE_LAZY = {
    "pallas_kernels": set(),
    "convert": {"transformers"},
    "qlora_jax": {
        *("datasets", "matplotlib", "pyarrow", "tensorboardX", "tomlkit"),
        *("transformers", "wandb"),
    },
}
NEVER = {"torch", "peft", "bitsandbytes"}

# Modules that may read the environment: name -> reason.
ENVIRONMENT_READERS: dict[str, str] = {
    "qlora_jax.compile_for": "its own process is set up before jax starts, for a GPU "
    "that is not there",
}

MAX_LINES = 600


# --- The source as data ---


def sources(*folders: str) -> dict[str, Path]:
    """Module name -> file, for every Python file under the folders."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


MODULES = sources(*PACKAGES)
ALL_MODULES = sources(*PACKAGES, "scripts")


def contents() -> dict[str, str]:
    """The table of contents in `qlora_jax/__init__.py`: public name -> module."""
    for node in ast.parse(MODULES["qlora_jax"].read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_CONTENTS":
            return ast.literal_eval(node.value)
    raise AssertionError("`qlora_jax/__init__.py` has no `_CONTENTS`")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(name: str) -> Iterator[tuple[str, bool, int]]:
    """What a module imports: (dotted target, inside a function, line).

    `from p import x` gives `p.x` where that is a module; a public name taken from
    `qlora_jax` itself gives the module it stands for.
    """
    path = ALL_MODULES[name]
    public = contents()

    def absolute(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        here = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        here = here[: len(here) - (node.level - 1)]
        return ".".join([*here, node.module] if node.module else here)

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool, int]]:
        if is_type_checking(node):
            for child in node.orelse:
                yield from visit(child, lazy)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node)
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if base == "qlora_jax" and alias.name in public:
                    target = public[alias.name]
                elif base == "qlora_jax" and alias.name == "__version__":
                    continue  # known without importing anything
                elif target not in ALL_MODULES:
                    target = base
                yield target, lazy, node.lineno
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or inside)

    yield from visit(ast.parse(path.read_text()), False)


def line_of(name: str) -> str | None:
    """The entry of `ORDER` a module belongs to."""
    for entry in ORDER:
        if name == entry or name.startswith(f"{entry}."):
            return entry
    return None


def is_ours(target: str) -> bool:
    return target.split(".")[0] in (*PACKAGES, "scripts")


# --- Imports ---


@pytest.mark.parametrize("name", ALL_MODULES)
def test_every_module_has_a_place_in_the_order(name):
    assert name == "qlora_jax" or line_of(name), (
        f"`{name}` is not in ORDER of tests/test_house.py: give it a line, below "
        "everything it imports and above everything that imports it"
    )


@pytest.mark.parametrize("name", [name for name in ALL_MODULES if name != "qlora_jax"])
def test_imports_run_one_way(name):
    own = line_of(name)
    if own is None:
        pytest.fail(f"`{name}` is not in ORDER of tests/test_house.py")
    above = set(ORDER[: ORDER.index(own) + 1])
    allowed = ALLOWED.get(own, above)
    wrong = []
    for target, lazy, line in imports(name):
        if not is_ours(target):
            continue
        if lazy and (name, target) in LAZY_EXCEPTIONS:
            continue
        if own == "scripts":
            if target.split(".")[0] == "scripts":
                wrong.append(f"line {line}: scripts are imported by no one")
        elif target == "qlora_jax":
            wrong.append(f"line {line}: name the module, not `qlora_jax` itself")
        elif line_of(target) not in allowed:
            wrong.append(f"line {line}: `{target}` is not below `{name}`")
    assert not wrong, f"{name}: " + "; ".join(wrong)


def test_lazy_exceptions_are_still_needed():
    made = {
        (name, target) for name in MODULES for target, lazy, _ in imports(name) if lazy
    }
    assert set(LAZY_EXCEPTIONS) <= made


@pytest.mark.parametrize("name", MODULES)
def test_imports_from_outside_are_the_listed_ones(name):
    package = name.split(".")[0]
    wrong = []
    for target, lazy, line in imports(name):
        top = target.split(".")[0]
        if is_ours(target) or top in sys.stdlib_module_names:
            continue
        if top in OUTSIDE[package] or (lazy and top in OUTSIDE_LAZY[package]):
            continue
        where = "inside functions only" if top in OUTSIDE_LAZY[package] else "not here"
        wrong.append(f"line {line}: `{target}` ({where})")
    assert not wrong, f"{name}: " + "; ".join(wrong)


def test_what_may_be_imported_is_declared_and_is_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [*project["optional-dependencies"]["plots"]]
    extras += project["optional-dependencies"]["logging"]
    extras += project["optional-dependencies"]["data"]
    declared = {
        re.split(r"[\[<>=]", requirement)[0].replace("orbax-checkpoint", "orbax")
        for requirement in [*project["dependencies"], *extras]
    }
    for package in PACKAGES:
        listed = OUTSIDE[package] | OUTSIDE_LAZY[package]
        assert listed <= declared
        assert not NEVER & listed


@pytest.mark.parametrize("name", ALL_MODULES)
def test_the_environment_is_not_read(name):
    if name.startswith("scripts"):
        return  # a script is the user's side: it may set up its own process
    found = []
    for node in ast.walk(ast.parse(ALL_MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            used = {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            used = {node.attr}
        else:
            continue
        if used & {"environ", "environb", "getenv", "getenvb", "putenv"}:
            found.append(node.lineno)
    if name in ENVIRONMENT_READERS:
        assert found, f"`{name}` no longer reads the environment: take it off the list"
    else:
        assert not found, f"{name}, lines {found}: choice is an argument"


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_a_package_pulls_in_no_door_and_opens_no_device():
    run_python(
        "import sys, qlora_jax, convert, pallas_kernels\n"
        f"doors = set({DOORS!r}) & set(sys.modules)\n"
        "assert not doors, f'doors were imported: {doors}'\n"
        "xla = sys.modules.get('jax._src.xla_bridge')\n"
        "assert xla is None or not xla._backends, 'a device was opened'\n"
    )


def test_importing_every_module_opens_no_device_and_needs_no_extra():
    lazy = set().union(*OUTSIDE_LAZY.values(), NEVER)
    run_python(
        "import importlib, sys\n"
        f"for name in {list(MODULES)!r}: importlib.import_module(name)\n"
        "import jax._src.xla_bridge as xla\n"
        "assert not xla._backends, f'opened: {list(xla._backends)}'\n"
        f"extras = {lazy!r} & set(sys.modules)\n"
        "assert not extras, f'imported at module level: {extras}'\n"
    )


# --- The table of contents ---


def test_every_listed_name_resolves_to_its_module():
    import qlora_jax

    for name, module in contents().items():
        value = getattr(qlora_jax, name)
        assert value.__module__ == module, f"`{name}` lives in `{value.__module__}`"
    assert set(contents()) <= set(dir(qlora_jax))
    assert set(qlora_jax.__all__) == {"__version__", *contents()}


def test_no_public_name_is_also_a_module():
    # Importing `qlora_jax.x` anywhere binds `x` on the package to the module, and hides
    # a function of that name from then on.
    both = {name for name in contents() if f"qlora_jax.{name}" in MODULES}
    assert not both, f"rename the modules {both}: each hides the public name"


def test_type_checkers_see_the_same_table():
    tree = ast.parse(MODULES["qlora_jax"].read_text())
    seen = {}
    for block in filter(is_type_checking, tree.body):
        for node in block.body:
            for alias in node.names:
                assert alias.asname == alias.name, f"write `{alias.name} as ...`"
                seen[alias.name] = node.module
    assert seen == contents()


def test_an_unknown_name_is_an_attribute_error():
    import qlora_jax

    with pytest.raises(AttributeError, match="`qlora_jax` has no attribute `Lama`"):
        qlora_jax.Lama  # noqa: B018


# --- Size, names, docstrings ---


@pytest.mark.parametrize("name", ALL_MODULES)
def test_a_module_has_one_idea(name):
    lines = len(ALL_MODULES[name].read_text().splitlines())
    assert lines < MAX_LINES, f"`{name}` has {lines} lines: it holds two ideas"
    leaf = name.split(".")[-1]
    assert leaf not in {"util", "utils", "helpers", "misc", "common"}, (
        f"`{name}`: name the idea"
    )


def public_without_docstring(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        is_setter = any(name.endswith(".setter") for name in decorators)
        if node.name.startswith("_") or "overload" in decorators or is_setter:
            continue
        if not ast.get_docstring(node):
            yield f"{prefix}{node.name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from public_without_docstring(node.body, f"{node.name}.")


@pytest.mark.parametrize("name", ALL_MODULES)
def test_public_names_have_docstrings(name):
    tree = ast.parse(ALL_MODULES[name].read_text())
    assert ast.get_docstring(tree), f"`{name}` has no module docstring"
    missing = list(public_without_docstring(tree.body, ""))
    if not name.startswith("scripts"):
        assert not missing, f"`{name}`: no docstring on {', '.join(missing)}"


# --- What is listed and shipped ---


def readme_map(text: str) -> dict[str, str]:
    """File -> clause, from the fenced block between the tree markers of the README."""
    block = re.search(r"<!-- tree -->\n```\n(.*?)```\n<!-- /tree -->", text, re.S)
    assert block, "README.md has no fenced block between the tree markers"
    listed: dict[str, str] = {}
    folder = ""
    for line in block[1].splitlines():
        name, _, clause = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name
        else:
            assert f"{folder}{name}" not in listed, f"`{folder}{name}` is listed twice"
            listed[f"{folder}{name}"] = clause.strip()
    return listed


def differences(listed: dict[str, str], existing: set[str]) -> list[str]:
    """What to do to the README's map so that it lists every module and no other."""
    return [
        *(f"add `{path}` with a clause" for path in sorted(existing - set(listed))),
        *(f"take out `{path}`" for path in sorted(set(listed) - existing)),
        *(f"say what `{path}` is" for path in sorted(listed) if not listed[path]),
    ]


def test_the_readme_map_lists_every_module_and_no_other():
    listed = readme_map((ROOT / "README.md").read_text())
    existing = {path.relative_to(ROOT).as_posix() for path in ALL_MODULES.values()}
    todo = differences(listed, existing)
    assert not todo, "README.md, the map: " + "; ".join(todo)


def test_the_map_check_says_what_is_missing():
    listed = readme_map(
        "<!-- tree -->\n```\na/\n  x.py   the x\n  y.py\n```\n<!-- /tree -->\n"
    )
    assert differences(listed, {"a/y.py", "b/z.py"}) == [
        "add `b/z.py` with a clause",
        "take out `a/x.py`",
        "say what `a/y.py` is",
    ]


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path):
    program = (
        "from hatchling.builders.wheel import WheelBuilder\n"
        f"print(*WheelBuilder({str(ROOT)!r}).build(directory={str(tmp_path)!r}))\n"
    )
    wheel = run_python(program).split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in MODULES.values()}
    typed = {f"{package}/py.typed" for package in PACKAGES}
    metadata = {name for name in shipped if ".dist-info/" in name}
    # Choices made from measured times, one file for each device measured.
    tuned = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pallas_kernels" / "tuned").glob("*.json")
    }
    assert shipped - metadata == modules | typed | tuned
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
