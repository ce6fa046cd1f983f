"""The house rules, as a test: who may import whom, what no room may hold, and how long things may get.

A room is a real folder at the root and a link in src/baton; it has no __init__.py, so that `./kernels` cannot shadow
the package of that name that libraries import. That makes one import package out of folders that stay at the top.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BOTTOM = {"core"}
KERNELS = BOTTOM | {"wire"}
ENGINE_ROOM = KERNELS | {"kernels", "models"}
JOINED = ENGINE_ROOM | {"cluster", "kv_transfer", "engine"}
NODES = JOINED | {"worker"}
EVERYTHING = NODES | {"router", "prefill_node", "decode_node", "cli", "sim", "bench"}
MAY_IMPORT = {
    "core": set(),
    "wire": BOTTOM,
    "kernels": BOTTOM,
    "models": BOTTOM | {"kernels"},
    "cluster": KERNELS,
    "kv_transfer": KERNELS,
    "engine": ENGINE_ROOM - {"wire"},
    "worker": JOINED,
    "router": BOTTOM | {"wire", "cluster"},
    "prefill_node": NODES,
    "decode_node": NODES,
    "cli": EVERYTHING,
    "sim": EVERYTHING,
    "bench": EVERYTHING,
    "chaos": EVERYTHING,
}
ROOMS = sorted(MAY_IMPORT)

TORCH_ROOMS = {"engine", "models", "kernels", "kv_transfer", "worker", "prefill_node", "decode_node", "bench"}
"""bench may: it runs the peer Baton is measured against."""
ONLY_IN = {  # package -> where it may be imported
    "torch": lambda path: path.parts[0] in TORCH_ROOMS,
    "numpy": lambda path: path.parts[0] in TORCH_ROOMS | {"sim"},
    "transformers": lambda path: path.parts[0] == "bench",
    "ray": lambda path: path.as_posix() == "cluster/ray_pool.py",
    "redis": lambda path: path.as_posix() == "cluster/store.py",
    "grpc": lambda path: path.parts[0] == "wire" or path.name == "server.py",
    "pickle": lambda path: False,
    "cloudpickle": lambda path: False,
    "marshal": lambda path: False,
    "shelve": lambda path: False,
}
CLOCKS = {"time.sleep", "datetime.now", "datetime.datetime.now", "datetime.utcnow", "datetime.datetime.utcnow"} | {
    f"time.{name}{ns}" for name in ("time", "monotonic", "perf_counter", "process_time") for ns in ("", "_ns")
}
CLOCKS_ALLOWED = {
    "core/once.py": "waits for a file lock in a thread, where no loop runs",
    "router/server.py": "hands the wall clock to the HTTP front for OpenAI's `created`, which nothing reads again",
}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
GLOBAL_RANDOM = re.compile(r"random\.(?!Random$)\w+|(np|numpy)\.random\.(?!default_rng$)[a-z_]+")
"""Functions over a state that everybody shares; generators that somebody seeds are fine."""
UNSAFE_LOADS = {"torch.load", "torch.save", "numpy.load", "np.load"}
VAGUE_NAMES = ("Manager", "Handler", "Helper", "Util", "Utils", "Base", "Mixin")

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SETTINGS = 500, 60, 80


@cache
def sources() -> dict[Path, ast.Module]:
    """Every module of ours, generated code left out, by path from the root."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                found[path.relative_to(ROOT)] = ast.parse(path.read_text(), str(path))
    return found


@cache
def sources_of_tests() -> dict[Path, ast.Module]:
    return {p.relative_to(ROOT): ast.parse(p.read_text(), str(p)) for p in sorted((ROOT / "tests").rglob("*.py"))}


@cache
def nodes(tree: ast.Module) -> list[ast.AST]:
    """All of them: a dozen rules look."""
    return list(ast.walk(tree))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives both a and a.b."""
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


@cache
def dotted_names(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, a.b.c) of each attribute chain, and each `from a import b` as a.b: what is used, however it came in."""
    found = []
    for node in nodes(tree):
        if isinstance(node, ast.Attribute):
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def complain(wrong: list[str]) -> None:
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_room_is_a_linked_folder_without_an_init_file() -> None:
    links = {p.name for p in (ROOT / "src/baton").iterdir() if p.is_symlink()}
    assert links == set(ROOMS), f"links in src/baton and rooms differ: {links ^ set(ROOMS)}"
    for room in ROOMS:
        link = ROOT / "src/baton" / room
        assert link.readlink() == Path("../..") / room, f"{link} must be a relative link"
        assert link.resolve() == ROOT / room
        assert not (ROOT / room / "__init__.py").exists(), f"delete {room}/__init__.py: it would shadow PyPI's {room!r}"


def test_every_folder_with_python_in_it_is_a_known_room() -> None:
    outside = {"src", "tests", "docs", "deploy", "build", "dist"}
    strays = {p.parent.name for p in ROOT.glob("*/*.py")} - set(ROOMS) - outside
    assert not strays, f"give {strays} a line in MAY_IMPORT and a link in src/baton"


def test_rooms_import_only_what_stands_below_them() -> None:
    wrong = []
    for path, tree in sources().items():
        room = path.parts[0]
        for line, module in imports(tree):
            parts = module.split(".")
            target = parts[1] if parts[0] == "baton" and len(parts) > 1 else ""
            if target in MAY_IMPORT and target not in MAY_IMPORT[room] | {room}:
                wrong.append(f"{path}:{line}: {room} may not import {target}")
    complain(wrong)


def test_imports_are_absolute_because_a_room_has_two_paths() -> None:
    complain(
        [
            f"{path}:{node.lineno}: write the absolute import"
            for path, tree in {**sources(), **sources_of_tests()}.items()
            for node in nodes(tree)
            if isinstance(node, ast.ImportFrom) and node.level
        ]
    )


def test_rooms_import_each_other_through_the_package_only() -> None:
    complain(
        [
            f"{path}:{line}: write baton.{module}"
            for path, tree in {**sources(), **sources_of_tests()}.items()
            for line, module in imports(tree)
            if module.split(".")[0] in MAY_IMPORT
        ]
    )


def test_heavy_and_dangerous_packages_stay_in_their_places() -> None:
    wrong = []
    for path, tree in sources().items():
        for line, module in imports(tree):
            allowed = ONLY_IN.get(module.split(".")[0])
            if allowed is not None and not allowed(path):
                wrong.append(f"{path}:{line}: {module.split('.')[0]} may not be imported here")
    complain(sorted(set(wrong)))


def test_only_core_config_reads_the_environment() -> None:
    complain(
        [
            f"{path}:{line}: {name}; core/config.py is the only reader of the environment"
            for path, tree in sources().items()
            if path.as_posix() != "core/config.py"
            for line, name in dotted_names(tree)
            if name in ENVIRONMENT
        ]
    )


def test_no_wall_clock_outside_cli_and_bench() -> None:
    complain(
        [
            f"{path}:{line}: {name}; take `now` as an argument or ask the running loop"
            for path, tree in sources().items()
            if path.parts[0] not in {"cli", "bench"} and path.as_posix() not in CLOCKS_ALLOWED
            for line, name in dotted_names(tree)
            if name in CLOCKS
        ]
    )


def test_no_module_level_random_outside_cli_and_bench() -> None:
    complain(
        [
            f"{path}:{line}: {name}; pass a seeded random.Random"
            for path, tree in sources().items()
            if path.parts[0] not in {"cli", "bench"}
            for line, name in dotted_names(tree)
            if GLOBAL_RANDOM.fullmatch(name)
        ]
    )


def test_nothing_loads_code_from_data() -> None:
    complain(
        [
            f"{path}:{line}: {name} may run code from a file; use safetensors"
            for path, tree in sources().items()
            for line, name in dotted_names(tree)
            if name in UNSAFE_LOADS
        ]
    )
    complain(
        [
            f"{path}:{node.lineno}: {node.func.id}()"
            for path, tree in sources().items()
            for node in nodes(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}
        ]
    )


def test_files_and_functions_stay_short() -> None:
    wrong = []
    for path, tree in {**sources(), **sources_of_tests()}.items():
        lines = (ROOT / path).read_text().count("\n")
        if lines > MAX_FILE_LINES:
            wrong.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in nodes(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and path.parts[0] != "tests":
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    complain(wrong)


def test_every_module_says_what_it_owns() -> None:
    complain([f"{path}: no module docstring" for path, tree in sources().items() if not ast.get_docstring(tree)])


def test_no_class_has_a_name_that_says_nothing() -> None:
    complain(
        [
            f"{path}:{node.lineno}: {node.name}"
            for path, tree in sources().items()
            for node in nodes(tree)
            if isinstance(node, ast.ClassDef) and node.name.endswith(VAGUE_NAMES)
        ]
    )


def test_settings_stay_few() -> None:
    from baton.core.config import settings

    assert len(list(settings())) <= MAX_SETTINGS


LIGHT = ["baton.router.server", "baton.sim.simulate", "baton.cli.main", "baton.wire.client", "baton.cluster.store"]
PURE = [
    "baton.engine.scheduler",
    "baton.engine.block_pool",
    "baton.kv_transfer.lease",
    "baton.kv_transfer.puller",
    "baton.worker.node",
]
HEAVY = {"torch", "numpy", "ray", "transformers", "safetensors", "gguf", "nixl", "nixl_cu13", "triton"}
IMPORT_ALL = """
import importlib, sys, traceback
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(name + " is not part of the light core")
sys.meta_path.insert(0, Blocked())
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except ImportError:
        print(module, traceback.format_exc(limit=-3))
"""


def test_the_light_core_imports_without_torch_or_ray() -> None:
    script = IMPORT_ALL.format(heavy=HEAVY, modules=LIGHT + PURE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-1500:]


def test_lines_per_room(capsys: pytest.CaptureFixture[str]) -> None:
    """Not a limit but a look: `make check` prints it, and a change that adds 300 lines says what they buy."""
    counts = {room: sum((ROOT / p).read_text().count("\n") for p in sources() if p.parts[0] == room) for room in ROOMS}
    tests = sum((ROOT / p).read_text().count("\n") for p in sources_of_tests())
    with capsys.disabled():
        if sys.stdout.isatty() or "-s" in sys.argv:
            print(
                "\nlines per room: "
                + ", ".join(f"{r} {n:,}" for r, n in counts.items())
                + f"; all {sum(counts.values()):,}, tests {tests:,}"
            )
    assert sum(counts.values()) > 0
