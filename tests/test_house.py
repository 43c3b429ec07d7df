"""The rules of the house, held on the source itself.

What may import what, what importing may do, how large a module may be, what the wheel
holds: each rule is data at the top and one test below. (The map of modules on the
site's architecture page is checked in test_docs.py.)
"""

import ast
import graphlib
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
# Programs that import the packages and are imported by nobody.
SCRIPTS = ("scripts", "docs/tooling")

# A part imports only parts on lines above its own, and itself.
ORDER = (
    (
        *("pallas_kernels", "qlora_jax.choices", "qlora_jax.errors", "qlora_jax.tree"),
        "qlora_jax.version",
    ),
    ("qlora_jax.nf4", "qlora_jax.data"),
    ("qlora_jax.lora",),
    ("qlora_jax.models",),
    ("qlora_jax.training", "convert"),
    ("qlora_jax.inference", "qlora_jax.planning"),
    ("qlora_jax.runs",),
    ("qlora_jax.cli", "qlora_jax"),
    ("scripts", "docs"),
)

# What each package may import from outside, at module level and inside functions.
OUTSIDE = {
    "pallas_kernels": {"jax", "jaxlib", "jaxtyping", "numpy"},
    "convert": {
        *("jax", "jaxtyping", "ml_dtypes", "numpy", "rich", "safetensors"),
    },
    "qlora_jax": {
        *("flax", "jax", "jaxtyping", "jinja2", "lazy_loader", "ml_dtypes", "numpy"),
        *("optax", "orbax", "regex", "rich", "safetensors", "tyro"),
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
    "qlora_jax.planning.compile": "sets up a process of its own before jax starts, for "
    "a GPU that is absent",
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
ALL_MODULES = sources(*PACKAGES, *SCRIPTS)


def public_names() -> dict[str, str]:
    """The public names of `qlora_jax`: name -> module, from `__init__.pyi`."""
    stub = ast.parse((ROOT / "qlora_jax" / "__init__.pyi").read_text())
    return {
        alias.name: f"qlora_jax.{node.module}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def imports(name: str) -> Iterator[tuple[str, bool, int]]:
    """What a module imports: (dotted target, inside a function, line).

    `from p import x` gives `p.x` where that is a module.
    """

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are absolute"
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                is_module = target in ALL_MODULES
                yield target if is_module else node.module or "", lazy, node.lineno
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or inside)

    yield from visit(ast.parse(ALL_MODULES[name].read_text()), False)


def part_of(name: str) -> tuple[int, str]:
    """The line of `ORDER` that a module belongs to, and its part there."""
    for line, parts in enumerate(ORDER):
        for part in parts:
            if name == part or (name.startswith(f"{part}.") and part != "qlora_jax"):
                return line, part
    raise AssertionError(f"`{name}` belongs to no part in ORDER of tests/test_house.py")


def is_ours(target: str) -> bool:
    return target.split(".")[0] in (*PACKAGES, "scripts", "docs")


# --- Imports ---


@pytest.mark.parametrize("name", ALL_MODULES)
def test_imports_run_one_way(name):
    line, part = part_of(name)
    against = []
    for target, _, number in imports(name):
        if not is_ours(target):
            continue
        if part == "scripts" and target.startswith(("scripts", "docs")):
            # A script is a file, or a folder whose files import each other.
            if target.split(".")[:2] == name.split(".")[:2]:
                continue
            against.append(f"line {number}: scripts import no scripts")
        elif part_of(target)[1] != part and part_of(target)[0] >= line:
            against.append(f"line {number}: `{target}` is not below `{name}`")
    assert not against, f"{name}: " + "; ".join(against)


def test_no_imports_run_in_a_circle():
    graph = {
        name: {t for t, _, _ in imports(name) if t in MODULES and t != name}
        for name in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()


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
    requirements = [*project["dependencies"]]
    for extra in ("plots", "logging", "data"):
        requirements += project["optional-dependencies"][extra]
    declared = {
        re.split(r"[\[<>=]", name)[0].replace("-", "_") for name in requirements
    }
    declared |= {"orbax"} if "orbax_checkpoint" in declared else set()
    for package in PACKAGES:
        listed = OUTSIDE[package] | OUTSIDE_LAZY[package]
        assert listed <= declared
        assert not NEVER & listed


@pytest.mark.parametrize("name", ALL_MODULES)
def test_the_environment_is_not_read(name):
    if name.startswith(("scripts", "docs")):
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
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_a_package_opens_no_device_and_qlora_jax_needs_no_jax():
    run_python(
        "import sys, qlora_jax\n"
        "assert 'jax' not in sys.modules\n"
        "import convert, pallas_kernels\n"
        "assert 'flax' not in sys.modules\n"
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


# --- Public names ---


def test_every_public_name_resolves_to_its_module():
    import qlora_jax

    for name, module in public_names().items():
        value = getattr(qlora_jax, name)
        assert value.__module__ == module, f"`{name}` is in `{value.__module__}`"
    assert set(qlora_jax.__all__) == {"__version__", *public_names()}
    assert set(public_names()) <= set(dir(qlora_jax))


def test_no_public_name_is_also_a_module():
    # Importing `qlora_jax.x` anywhere binds `x` on the package to the module, and hides
    # a function of that name from then on.
    both = {name for name in public_names() if f"qlora_jax.{name}" in MODULES}
    assert not both, f"rename the modules {both}: each hides the public name"


def test_an_unknown_name_is_an_attribute_error():
    import qlora_jax

    with pytest.raises(AttributeError, match="Lama"):
        qlora_jax.Lama  # noqa: B018


# --- Size, names, docstrings ---


@pytest.mark.parametrize("name", ALL_MODULES)
def test_a_module_has_one_idea(name):
    lines = len(ALL_MODULES[name].read_text().splitlines())
    assert lines < MAX_LINES, f"`{name}` has {lines} lines: it holds two ideas"
    nameless = {"util", "utils", "helpers", "misc", "common"}
    assert name.split(".")[-1] not in nameless, f"`{name}`: name the idea"


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
    if not name.startswith(("scripts", "docs")):
        assert not missing, f"`{name}`: no docstring on {', '.join(missing)}"


# --- What is shipped ---


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path):
    program = (
        "from hatchling.builders.wheel import WheelBuilder\n"
        f"print(*WheelBuilder({str(ROOT)!r}).build(directory={str(tmp_path)!r}))\n"
    )
    wheel = run_python(program).split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    metadata = {name for name in shipped if ".dist-info/" in name}
    # Choices made from measured times, one file for each device measured.
    tuned = (ROOT / "pallas_kernels" / "tuned").glob("*.json")
    modules = {p.relative_to(ROOT).as_posix() for p in (*MODULES.values(), *tuned)}
    typed = {f"{package}/py.typed" for package in PACKAGES} | {"qlora_jax/__init__.pyi"}
    pages = ("base", "data", "macros", "run")
    templates = {f"qlora_jax/runs/templates/{name}.html" for name in pages}
    assert shipped - metadata == modules | typed | templates
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
