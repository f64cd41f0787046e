"""The package keeps its shape: layers, one reader of the environment, no code from files, a light import."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import weightcache

ROOT = Path(__file__).parents[1]
PACKAGE = "weightcache"

# From the ground up: an import goes to a strictly lower row. Above the rows stand the doors, the package root, whose
# name here is ""; above it the faces, which import nothing else of the package.
LAYERS = (
    ("words", "errors _version origins tiers daemon meters ledger spans"),
    ("tables", "tables waterfall"),
    ("prices", "prices residency"),
    ("values", "digest dtypes report uri origins.base daemon.wire"),
    ("stores", "stores daemon.settings"),
    ("settings", "config simulation"),
    ("contracts", "header tiers.base"),
    ("manifest", "manifest"),
    ("decisions", "chunking choosing forecast layout policy"),
    ("victims", "tiers.eviction"),
    ("revisions", "published comparing"),
    ("plan", "planning"),
    ("engine", "_engine"),
    ("machine", "behind daemon.listening daemon.service files journal machine operations runtime"),
    ("locks", "locks measurements daemon.hugepages"),
    ("answers", "origins.answers origins.listing origins.pace origins.clock"),
    ("connections", "origins.connection"),
    ("data plane", "origins.plane"),
    ("edges", "origins.local origins.generic origins.s3 origins.web tensors audit signatures spending"),
    ("choice", "origins.replicas origins.s3_writer origins.local_writer origins.generic_writer"),
    ("chunks", "origins.chunked"),
    ("endurance", "origins.resilient"),
    ("rules", "access"),
    ("opening", "opening"),
    ("parts of tiers", "tiers.host tiers.catalogue tiers.records"),
    ("tiers", "tiers.disk tiers.device tiers.node"),
    ("registry", "registry presence"),
    ("publishing", "publishing sweeping checking"),
    ("copies", "replicating artefacts"),
    ("motion", "checkpoint transfer"),
    ("a request", "session"),
    ("its files", "modelfiles arrival"),
    ("its delivery", "delivery"),
    ("its windows", "windows reading"),
    ("conductor", "cache hubcache registries"),
    ("care", "upkeep diagnosis"),
    ("the daemon's models", "daemon.residents daemon.shelf"),
    ("the daemon", "daemon.server daemon.warming daemon.web daemon.hubwire"),
    ("the Hub face", "daemon.hub"),
    ("the daemon's life", "daemon.node"),
)
LAYER = {name: number for number, (_, names) in enumerate(LAYERS) for name in names.split()} | {"": len(LAYERS)}
FACES = ("cli", "loaders", "__main__")

PURE = (
    "choosing",
    "chunking",
    "comparing",
    "daemon.settings",
    "forecast",
    "layout",
    "ledger",
    "planning",
    "policy",
    "prices",
    "published",
    "residency",
    "simulation",
    "stores",
    "tables",
    "tiers.eviction",
    "uri",
    "waterfall",
)
IMPURE = frozenset(("os", "time", "random", "socket", "asyncio", "threading", "torch", "fsspec", "weightcache._engine"))
ENVIRONMENT = frozenset(("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"))
RUNS_CODE = frozenset(("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "imp"))
RUNS_TEXT = frozenset(("eval", "exec", "compile", "__import__"))
IMPORTS_BY_NAME = frozenset(("import_module", "exec_module", "load_module"))
MAPS_FILES = frozenset(("mmap", "memmap", "from_file"))
# The process's edge and the one place where errors of unknown libraries arrive.
MAY_CATCH_ALL = ("", "cli", "diagnosis", "origins.generic")
HEAVY = ("torch", "numpy", "fsspec", "s3fs", "aiobotocore")


def sources() -> Iterator[tuple[str, str]]:
    """Yield (module, source) of the package; modules are named without the package, the root is ""."""
    for folder, prefix in ((ROOT / PACKAGE, ()), (ROOT / "loaders", ("loaders",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(part for part in parts if part != "__init__"), path.read_text()


MODULES = {name for name, _ in sources()} | LAYER.keys() | set(FACES)


def is_within(module: str, *packages: str) -> bool:
    """Tell whether a module is one of these, or lies in one of these packages; the root holds only itself."""
    return any(module == each or (each and module.startswith(f"{each}.")) for each in packages)


@dataclass(frozen=True)
class Import:
    """`import module`, or `from module import name`."""

    line: int
    module: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".strip(".")

    @property
    def parts(self) -> set[str]:
        return set(str(self).split("."))

    @property
    def target(self) -> str | None:
        """Which module of the package this is, or None when it is not ours."""
        package, *own = str(self).split(".")
        if package != PACKAGE:
            return None
        while own and ".".join(own) not in MODULES:
            own.pop()
        return ".".join(own)


def imports(source: str) -> Iterator[Import]:
    """Yield everything imported, at the top or not, for type checkers or not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Import(node.lineno, module, alias.name) for alias in node.names)


def layer_breaches(module: str, source: str) -> list[str]:
    """List the imports of a module that do not go to a strictly lower layer."""
    face = module.partition(".")[0]
    if face not in FACES and module not in LAYER:
        return [f"{module} has no layer: give it one in LAYERS"]
    complain = _complain_of_a_face if face in FACES else _complain
    found = [(each, complain(module, each)) for each in imports(source)]
    return [f"{module}:{each.line} imports {each}, {complaint}" for each, complaint in found if complaint]


def _complain(module: str, each: Import) -> str:
    if each.module.startswith("."):
        return "relatively"
    if each.target is None:
        return ""
    if each.target == "":
        return "the package root, which nobody inside does"
    if is_within(each.target, *FACES):
        return "a face"
    if each.target not in LAYER:
        return "which has no layer"
    return "" if LAYER[each.target] < LAYER[module] else "which is not below it"


def _complain_of_a_face(module: str, each: Import) -> str:
    if each.module.startswith("."):
        return "relatively"
    public = each.module == PACKAGE and each.name in ("", *weightcache.__all__)
    inside = each.target is None or is_within(each.target, module.partition(".")[0].replace("__main__", "cli"))
    return "" if public or inside else "a face imports the root alone"


def purity_breaches(module: str, source: str) -> list[str]:
    """List what a pure module imports of the world."""
    return [
        f"{module}:{each.line} is pure and imports {each}"
        for each in imports(source)
        if module in PURE and is_within(str(each), *IMPURE)
    ]


def environment_breaches(module: str, source: str) -> list[str]:
    """List the places that touch the process environment outside of config."""
    touched = [each.line for each in imports(source) if each.parts & ENVIRONMENT]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
            touched.append(node.lineno)
    return [f"{module}:{line} touches the environment" for line in touched if module != "config"]


def code_from_file_breaches(module: str, source: str) -> list[str]:
    """List what could run code that a file names or holds."""
    found = [(each.line, str(each)) for each in imports(source) if each.parts & (RUNS_CODE | IMPORTS_BY_NAME)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in RUNS_TEXT:
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and node.attr in IMPORTS_BY_NAME:
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append((node.lineno, "torch.load"))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append((node.value.lineno, "allow_pickle"))
    return [f"{module}:{line} uses {name}, which can run code from a file" for line, name in found]


def habit_breaches(module: str, source: str) -> list[str]:
    """List maps of files, prints, finalizers in classes and catches of everything."""
    found = [(each.line, "maps a file") for each in imports(source) if each.parts & MAPS_FILES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in MAPS_FILES:
            found.append((node.lineno, "maps a file"))
        elif isinstance(node, ast.FunctionDef) and node.name == "__del__":
            found.append((node.lineno, "has a __del__"))
        elif isinstance(node, ast.Name) and node.id == "print" and not is_within(module, "cli"):
            found.append((node.lineno, "prints"))
        elif isinstance(node, ast.ExceptHandler) and not is_within(module, *MAY_CATCH_ALL):
            names = set() if node.type is None else {ast.unparse(each) for each in ast.walk(node.type)}
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if node.type is None or "Exception" in names or ("BaseException" in names and not raises_again):
                found.append((node.lineno, "catches everything"))
    return [f"{module}:{line} {what}" for line, what in found]


CHECKS = (
    layer_breaches,
    purity_breaches,
    environment_breaches,
    code_from_file_breaches,
    habit_breaches,
)


@pytest.mark.parametrize("check", CHECKS)
def test_package_keeps(check: Callable[[str, str], list[str]]) -> None:
    assert [breach for module, source in sources() for breach in check(module, source)] == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("layout", "from weightcache.transfer import Transfer", "which is not below it"),
        ("layout", "from weightcache import chunking", "which is not below it"),
        ("layout", "def f():\n    import weightcache.cache", "layout:2 imports weightcache.cache"),
        ("layout", "if TYPE_CHECKING:\n    from weightcache.cache import load", "which is not below it"),
        ("layout", "from weightcache import load_model", "the package root"),
        ("cache", "import weightcache", "the package root"),
        ("cache", "from weightcache.cli import main", "a face"),
        ("cache", "from . import digest", "relatively"),
        ("chunks", "", "has no layer"),
        ("cli.show", "from weightcache.cache import load", "a face imports the root alone"),
        ("cli.show", "from weightcache.loaders.vllm import load", "a face imports the root alone"),
        ("loaders.vllm", "from weightcache import cache", "a face imports the root alone"),
        ("loaders.vllm", "from weightcache.errors import FormatError", "a face imports the root alone"),
        ("planning", "import time", "is pure and imports time"),
        ("chunking", "from os import path", "is pure and imports os.path"),
        ("tiers.eviction", "from weightcache import _engine", "is pure and imports weightcache._engine"),
        ("files", "import os\nos.environ['HOME']", "files:2 touches the environment"),
        ("files", "from os import getenv", "touches the environment"),
        ("cli", "import os\nos.getenv('HOME')", "touches the environment"),
        ("files", "import pickle", "uses pickle"),
        ("files", "from marshal import loads", "uses marshal.loads"),
        ("files", "eval(text)", "uses eval"),
        ("files", "import importlib\nimportlib.import_module(name)", "uses import_module"),
        ("files", "from importlib import import_module", "uses importlib.import_module"),
        ("files", "torch.load(path)", "uses torch.load"),
        ("files", "np.load(path, allow_pickle=True)", "uses allow_pickle"),
        ("files", "import mmap", "maps a file"),
        ("files", "np.memmap(path)", "maps a file"),
        ("files", "print(1)", "prints"),
        ("files", "class A:\n    def __del__(self): pass", "has a __del__"),
        ("files", "try: f()\nexcept Exception: pass", "catches everything"),
        ("files", "try: f()\nexcept (OSError, Exception): pass", "catches everything"),
        ("files", "try: f()\nexcept: pass", "catches everything"),
        ("files", "try: f()\nexcept BaseException: pass", "catches everything"),
    ],
)
def test_checker_fires_on_a_breach(module: str, source: str, says: str) -> None:
    assert says in "\n".join(breach for check in CHECKS for breach in check(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layout", "from weightcache.manifest import Manifest"),
        ("layout", "import re\nre.compile('a')\nmodel.eval()"),
        ("files", "from weightcache import _engine"),
        ("files", "try: f()\nexcept BaseException:\n    g()\n    raise"),
        ("config", "import os\nos.environ"),
        ("upkeep", "from weightcache import cache"),
        ("", "from weightcache import cache"),
        ("cli.show", "import weightcache\nfrom weightcache.cli.table import show\nprint(1)"),
        ("loaders.vllm", "from weightcache import load_model, errors"),
    ],
)
def test_checker_passes_what_is_allowed(module: str, source: str) -> None:
    assert [breach for check in CHECKS for breach in check(module, source)] == []


def test_import_is_light() -> None:
    script = f"import sys, weightcache; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("name", weightcache.__all__)
def test_public_name_has_a_docstring(name: str) -> None:
    assert name == "__version__" or inspect.getdoc(getattr(weightcache, name))


def test_only_the_binding_knows_python() -> None:
    knows = {
        path.name
        for path in (ROOT / "ext").iterdir()
        if "Python.h" in path.read_text() or "module.h" in path.read_text()
    }
    assert knows == {"module.h", "module.c", "module_memory.c", "module_device.c", "module_run.c"}
