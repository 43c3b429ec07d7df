"""The structure of the source tree, checked on the source itself.

What may import what, what importing may do, how large a module may be, what the wheel
holds: each rule is data at the top and one test below. (The map of modules on the
site's architecture page is checked in test_docs.py.)
"""

import ast
import graphlib
import importlib
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
        *("qlora_jax.reading", "qlora_jax.version"),
    ),
    ("qlora_jax.compiler",),
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
        *("jax", "jaxtyping", "lazy_loader", "ml_dtypes", "numpy", "rich"),
        "safetensors",
    },
    "qlora_jax": {
        *("flax", "jax", "jaxtyping", "jinja2", "lazy_loader", "ml_dtypes", "numpy"),
        *("optax", "orbax", "regex", "rich", "safetensors", "tyro"),
    },
}
# Slow to import or an extra: inside functions only.
OUTSIDE_LAZY = {
    "pallas_kernels": set(),
    "convert": {"huggingface_hub", "transformers"},
    "qlora_jax": {
        *("datasets", "matplotlib", "pyarrow", "tensorboardX", "tomlkit"),
        *("transformers", "wandb"),
    },
}
NEVER = {"torch", "peft", "bitsandbytes"}

# Modules that may read the environment: name -> reason.
ENVIRONMENT_READERS: dict[str, str] = {
    "qlora_jax.compiler": "XLA_FLAGS has the user's settings of the same compiler",
    "qlora_jax.planning.gpus": "JAX's limit of pinned memory has no other place",
    "qlora_jax.runs.place": "Slurm tells a task which one it is",
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


def names_offered(package: str) -> dict[str, str]:
    """The names listed in a package's `__init__.pyi`: name -> module."""
    stub = ROOT / package.replace(".", "/") / "__init__.pyi"
    return {
        alias.name: f"{package}.{node.module}"
        for node in (ast.parse(stub.read_text()).body if stub.exists() else ())
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


# Packages that list what others may use: package -> name -> module.
OFFERED = {name: names for name in MODULES if (names := names_offered(name))}


def imports(name: str) -> Iterator[tuple[str, bool, int]]:
    """What a module imports: (dotted target, inside a function, line).

    `from p import x` gives `p.x` where that is a module, and the module that holds `x`
    where `p` only lists it.
    """

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are absolute"
            for alias in node.names:
                module = node.module or ""
                target = OFFERED.get(module, {}).get(alias.name, module)
                if f"{module}.{alias.name}" in ALL_MODULES:
                    target = f"{module}.{alias.name}"
                yield target, lazy, node.lineno
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
    raise AssertionError(
        f"`{name}` belongs to no part in ORDER of tests/test_structure.py"
    )


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


@pytest.mark.parametrize("package", OFFERED)
def test_every_name_a_package_offers_resolves_to_its_module(package):
    offered = OFFERED[package]
    module = importlib.import_module(package)
    for name, home in offered.items():
        value = getattr(module, name)
        assert value is getattr(importlib.import_module(home), name)
        assert getattr(value, "__module__", home) in (home, "typing"), name
    assert set(module.__all__) - {"__version__"} == set(offered)
    assert set(offered) <= set(dir(module))
    # Importing `p.x` anywhere binds `x` on the package to the module, and hides a
    # function of that name from then on.
    both = {name for name in offered if f"{package}.{name}" in MODULES}
    assert not both, f"rename the modules {both}: each hides a name of {package}"


@pytest.mark.parametrize("name", MODULES)
def test_packages_use_of_each_other_what_is_offered(name):
    inside = [
        f"line {node.lineno}: `{node.module}`"
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for package in OFFERED.keys() - {"qlora_jax"}
        if node.module.startswith(f"{package}.") and not name.startswith(f"{package}.")
    ]
    assert not inside, f"{name} goes past a package's `__init__.pyi`: {inside}"


def test_packages_offer_what_is_used():
    used = set()
    for path in ALL_MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                used |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute):
                used.add((ast.unparse(node.value), node.attr))
    offered = {(p, n) for p in OFFERED if p != "qlora_jax" for n in OFFERED[p]}
    assert not offered - used, "offered and used by nobody"


def test_an_unknown_name_is_an_attribute_error():
    import qlora_jax

    with pytest.raises(AttributeError, match="Lama"):
        qlora_jax.Lama  # noqa: B018


def names_in_text() -> set[str]:
    """Dotted names of the packages in code, in strings of code, and in pages."""
    pages = (
        page for d in ("", "docs", "notebooks") for page in (ROOT / d).glob("*.md")
    )
    files = [*ALL_MODULES.values(), *pages, *(ROOT / "notebooks").glob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    package = rf"(?:{'|'.join(PACKAGES)})"
    dotted = re.findall(rf"(?<![\w./-]){package}(?:\.[A-Za-z_]\w*)+", text)
    imported = re.findall(rf"from ({package}[\w.]*) import ([\w, ]+)", text)
    dotted += [f"{m}.{part.split()[0]}" for m, n in imported for part in n.split(", ")]
    return {name for name in dotted if not name.endswith(".md")}


def test_dotted_names_in_programs_and_pages_exist():
    # A program in a string (of a child process) is seen by no linter.
    missing = set()
    for name in names_in_text():
        path, value = name.split("."), None
        for end in range(1, len(path) + 1):
            try:
                value = importlib.import_module(".".join(path[:end]))
            except ImportError:
                value = getattr(value, path[end - 1], missing)
        if value is missing:
            missing.add(name)
    assert not missing


def test_tests_of_kernels_are_where_make_compile_collects_them():
    makefile = (ROOT / "Makefile").read_text()
    folders = re.search(r"^KERNEL_TESTS := (.*)$", makefile, re.M)[1].split()
    for path in (ROOT / "tests").rglob("*.py"):
        if re.search(r"^[^#]*\bmark\.(compile|interpret)\b", path.read_text(), re.M):
            name = path.relative_to(ROOT).as_posix()
            assert name.startswith(tuple(f"{folder}/" for folder in folders)), name


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
    typed = {f"{package}/py.typed" for package in PACKAGES}
    typed |= {f"{package.replace('.', '/')}/__init__.pyi" for package in OFFERED}
    pages = ("base", "data", "macros", "run")
    templates = {f"qlora_jax/runs/templates/{name}.html" for name in pages}
    chats = (ROOT / "qlora_jax" / "data" / "templates").glob("*.jinja")
    templates |= {path.relative_to(ROOT).as_posix() for path in chats}
    assert shipped - metadata == modules | typed | templates
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
