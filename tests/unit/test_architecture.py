"""The rules of the tree: which room may import which, and how large a file or a function may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "slime_opd"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room with the rooms below it. A room is a folder or a file of slime_opd.
GROUND = {"types", "fields", "errors", "schedule", "config", "lifetimes", "stopping"}
TOOLS_OF_THE_TRADE = {"engine", "data", "checkpoint", "distill", "algorithm", "observe", "memory_estimate", "hooks"}
STAGES = {"rollout", "reward", "teacher", "megatron", "weights"}
LEVELS: tuple[set[str], ...] = (
    GROUND,
    TOOLS_OF_THE_TRADE,
    STAGES,
    {"cluster", "preflight", "rehearsal"},
    {"train"},
    {"__main__"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Who alone may import what, by the room or file that may.
ONLY_IN = {
    "ray": ("cluster", "train"),
    "megatron": ("megatron", "weights", "rehearsal"),
    "mbridge": ("megatron", "weights"),
    "httpx": ("engine",),
    "aiohttp": ("engine",),
    "requests": ("engine",),
}
HEAVY = ("ray", "megatron", "sglang", "transformers")
PURE = ("distill", "algorithm", "data.plan")  # and no HEAVY
LIGHT = (
    "types",
    "fields",
    "errors",
    "schedule",
    "config",
    "lifetimes",
    "stopping",
    "checkpoint",
)  # and no torch either

LONGEST_FILE = 450
LONGEST_FUNCTION = 80
LONGEST_LOOP = 120
TOO_LONG_FILES: set[str] = set()  # only shrinks
TOO_LONG_FUNCTIONS: set[str] = set()  # only shrinks


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def name_of(file: Path) -> str:
    """`slime_opd/config/parser.py` is `config.parser`, a package is the name of its folder."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.partition(".")[0]


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
        assert allowed is None or room_of(module) in allowed, f"{module} imports {imported}"


@pytest.mark.parametrize(("modules", "forbidden"), [(LIGHT, (*HEAVY, "torch")), (PURE, HEAVY)], ids=["light", "pure"])
def test_a_fresh_process_that_imports_a_pure_room_has_no_heavy_module(modules, forbidden):
    names = [name for name in map(name_of, FILES) if any(name == m or name.startswith(f"{m}.") for m in modules)]
    assert {room_of(name) for name in names} == {room_of(module) for module in modules}
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
