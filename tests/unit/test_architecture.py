"""The rules of the tree: which room may import which, and how large a file or a function may grow."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "slime_opd"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room with the rooms below it. A room is a folder or a file of slime_opd.
GROUND = {"types", "fields", "metrics", "errors", "schedule", "config", "lifetimes", "stopping"}
PURE_ROOMS = {"algorithm", "distill", "objective", "observe", "hooks"}
PARTS = {"engine", "data", "batch", "head", "model", "checkpoint"}
STAGES = {"rollout", "reward", "teacher", "trainer", "weights"}
LEVELS: tuple[set[str], ...] = (
    GROUND,
    PURE_ROOMS,
    PARTS,
    STAGES,
    {"cluster", "preflight", "rehearsal"},
    {"train"},
    {"commands"},
    {"__main__"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# What only some rooms or packages may import.
ONLY_IN = {
    "ray": ("cluster", "train"),
    "megatron": ("model", "checkpoint.formats", "trainer", "weights", "rehearsal"),
    "mbridge": ("model",),
    "httpx": ("engine",),
    "aiohttp": ("engine",),
    "requests": ("engine",),
}
HEAVY = ("ray", "megatron", "sglang", "transformers")
PURE = ("distill", "algorithm", "objective", "batch", "head")  # and no HEAVY
LIGHT = (
    "types",
    "fields",
    "metrics",
    "errors",
    "schedule",
    "config",
    "lifetimes",
    "stopping",
    "checkpoint",
)  # and no torch either
HEAVY_PART = "checkpoint.formats"  # of a light room

LONGEST_FILE = 450
LONGEST_FUNCTION = 80
LONGEST_LOOP = 120
TOO_LONG_FILES: set[str] = set()  # only shrinks
TOO_LONG_FUNCTIONS: set[str] = set()  # only shrinks


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def name_of(file: Path) -> str:
    """`slime_opd/config/parser.py` is `config.parser`, a package is the name of its folder."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imports_of(file: Path) -> list[str]:
    """Modules that a file imports, anywhere in it, other than for a type checker alone."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import: write it in full"
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree_of(file))
    return found


def upward(module: str, imported: list[str]) -> list[str]:
    """Of the modules a module imports, those of a room that is not below its own."""
    own = [name.removeprefix("slime_opd.") for name in imported if name.startswith("slime_opd.")]
    level, room = LEVEL_OF[room_of(module)], room_of(module)
    return [name for name in own if room_of(name) != room and LEVEL_OF[room_of(name)] > level]


def test_every_room_has_a_level():
    rooms = {room_of(name_of(file)) for file in FILES} - {""}
    assert rooms <= set(LEVEL_OF)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_only(file):
    module = name_of(file)
    if module:
        assert upward(module, imports_of(file)) == []


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of nodes that reach one another."""
    reached: dict[str, set[str]] = {}
    for node in edges:
        seen, to_do = set(), [node]
        while to_do:
            new = edges.get(to_do.pop(), set()) - seen
            seen |= new
            to_do.extend(new)
        reached[node] = seen
    found = {frozenset(other for other in reached[node] if node in reached.get(other, ())) for node in edges}
    return [set(circle) for circle in found if circle]


def import_graph() -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports."""
    modules = {name_of(file) for file in FILES}
    graph: dict[str, set[str]] = {}
    for file in FILES:
        own = [name.removeprefix("slime_opd.") for name in imports_of(file) if name.startswith("slime_opd.")]
        targets = {name if name in modules else name.rpartition(".")[0] for name in own}
        graph[name_of(file)] = targets - {name_of(file), ""}
    return graph


def test_no_import_goes_in_a_circle():
    graph = import_graph()
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        rooms.setdefault(room_of(module), set()).update({room_of(target) for target in targets} - {room_of(module)})
    assert circles(graph) == []
    assert circles(rooms) == []


def test_a_circle_would_be_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


def test_an_upward_import_would_be_seen():
    assert upward("distill.penalty", ["slime_opd.teacher.sglang", "slime_opd.types.Sample", "numpy"]) == [
        "teacher.sglang"
    ]
    assert upward("train", ["slime_opd.cluster.run", "slime_opd.config.parse"]) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_ray_http_and_megatron_stay_in_their_rooms(file):
    module = name_of(file)
    for imported in imports_of(file):
        allowed = ONLY_IN.get(imported.partition(".")[0])
        assert allowed is None or is_in(module, allowed), f"{module} imports {imported}"


@pytest.mark.parametrize(("modules", "forbidden"), [(LIGHT, (*HEAVY, "torch")), (PURE, HEAVY)], ids=["light", "pure"])
def test_a_fresh_process_that_imports_a_pure_room_has_no_heavy_module(modules, forbidden):
    names = [name for name in map(name_of, FILES) if is_in(name, modules) and not is_in(name, (HEAVY_PART,))]
    assert {room_of(name) for name in names} == set(modules)
    program = f"import importlib, sys\nfor name in {names}: importlib.import_module('slime_opd.' + name)\n"
    program += f"print(*(name for name in {forbidden} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


def test_the_help_of_training_imports_nothing_heavy():
    program = "import sys\nfrom slime_opd import train\n"
    program += "try: train.main(['--help'])\nexcept SystemExit as left: assert left.code == 0\n"
    program += f"print(*(name for name in {(*HEAVY, 'torch')} if name in sys.modules), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.strip()) == (0, "")
    assert run.stdout.startswith("usage: ")


def test_no_file_is_two_rooms():
    long = {name_of(file) for file in FILES if len(file.read_text(encoding="utf-8").splitlines()) > LONGEST_FILE}
    assert long == TOO_LONG_FILES


def test_no_function_is_two_functions():
    long = {
        f"{name_of(file)}.{node.name}"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }
    assert long == TOO_LONG_FUNCTIONS


def test_the_loop_fits_on_a_screen():
    assert len((PACKAGE / "train.py").read_text(encoding="utf-8").splitlines()) <= LONGEST_LOOP


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler takes every exception and does nothing with it."""
    names = {ast.unparse(node) for node in ast.walk(handler.type)} if handler.type else {"Exception"}
    is_silent = all(isinstance(node, ast.Pass | ast.Continue) for node in handler.body)
    return is_silent and bool(names & {"Exception", "BaseException"})


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_exception_is_swallowed(file):
    handlers = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.ExceptHandler)]
    assert [handler.lineno for handler in handlers if swallows(handler)] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("try: f()\nexcept Exception: pass", True),
        ("try: f()\nexcept: pass", True),
        ("try: f()\nexcept (ValueError, Exception): pass", True),
        ("try: f()\nexcept ValueError: pass", False),
        ("try: f()\nexcept Exception: log()", False),
    ],
)
def test_a_swallowed_exception_would_be_seen(source, expected):
    (handler,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler))
    assert swallows(handler) is expected
