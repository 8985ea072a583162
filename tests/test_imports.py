"""Imports point one way, and nothing loads an engine before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import emlocal

PACKAGE = Path(emlocal.__file__).parent
ENGINES = {
    "llama_cpp": "backends/llama_cpp",
    "mlx": "backends/mlx",
    "mlx_lm": "backends/mlx",
    "torch": "backends/torch",
    "transformers": "backends/torch",
    "peft": "backends/torch",
}
HEAVY = {*ENGINES, "huggingface_hub"}
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("api", "chat", "diagnosis", "measure", "plotting", "serve"),
    ("remote",),
    ("evaluation", "training"),
    ("batch",),
    ("loading",),
    ("rendering",),
    ("methods",),
    ("generation",),
    ("backends",),
    ("sampling",),
    ("identity",),
    ("settings",),
    ("answers", "em"),
    ("console", "machine", "questions", "sandbox"),
    ("models",),
    ("cancel", "files"),
    ("text",),
    ("backends/__init__", "settings/table"),
    ("errors",),
)
"""Rooms (packages and modules of emlocal) in layers; each may import those of the layers below its own.

Two parts are lower than the rest of their rooms: the table of engines' names, and the definition of a
setting.
"""
UPWARD = {("models", "identity")}
"""The exception: identity.py has all names and digests in files, including those of models."""
PRINT = {"chat", "cli", "console", "plotting", "rendering"}
"""Rooms that may print, or make text that is printed.

Others return, raise, or call a function they were given.
"""


def modules_after(code: str) -> set[str]:
    """Returns what a fresh interpreter loads for this code: top-level names, and modules of emlocal."""
    report = "import sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60, check=True
    )
    return {name if name.startswith("emlocal") else name.split(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import emlocal", HEAVY | {"numpy", "jinja2", "rich", "typer"}),
        ("import emlocal.settings, emlocal.errors", HEAVY | {"numpy"}),
        ("import emlocal.em.steps", HEAVY | {"numpy"}),
        ("import emlocal.em.fast", HEAVY | {"rich", "typer", "jinja2", "emlocal.sampling"}),
        ("import emlocal.sampling", HEAVY | {"rich", "typer", "jinja2", "emlocal.generation"}),
        ("import emlocal.generation", HEAVY | {"rich", "typer", "jinja2", "emlocal.cli"}),
        ("import emlocal.backends.base, emlocal.backends.engine, emlocal.backends.fake", HEAVY),
        ("import emlocal.models.templates", HEAVY | {"jinja2", "numpy"}),
        ("import emlocal.models.resolve", HEAVY | {"jinja2", "numpy"}),
        ("import emlocal.training.settings", HEAVY | {"numpy"}),
        ("import emlocal.answers.gold, emlocal.answers.programs", HEAVY | {"numpy"}),
        (
            "import emlocal.cli.generate, emlocal.cli.options, emlocal.loading, emlocal.settings.resolve",
            HEAVY | {"numpy", "jinja2"},
        ),
        ("import emlocal.backends.llama_cpp.loading", HEAVY | {"numpy", "jinja2"}),
        ("import emlocal.cli.app", HEAVY | {"numpy", "jinja2", "prompt_toolkit"}),
        (
            "import emlocal.cli.app; emlocal.cli.app.run(['--help'])",
            HEAVY | {"numpy", "jinja2", "matplotlib"},
        ),
        ("import emlocal.cli.app; emlocal.cli.app.run(['chat', '--help'])", HEAVY | {"numpy", "jinja2"}),
        ("import emlocal.cli.app; emlocal.cli.app.run(['adapter', '--help'])", HEAVY | {"numpy", "gguf"}),
        ("import emlocal.models.adapters", HEAVY | {"gguf", "safetensors"}),
        ("import emlocal.cli.app; emlocal.cli.app.run(['finetune', '--help'])", HEAVY | {"numpy", "jinja2"}),
        ("import emlocal.cli.app; emlocal.cli.app.run(['eval', '--help'])", HEAVY | {"numpy", "matplotlib"}),
        ("import emlocal.cli.app; emlocal.cli.app.run(['plot', '--help'])", HEAVY | {"numpy", "matplotlib"}),
        ("import emlocal.cli.app; emlocal.cli.app.run(['--version'])", HEAVY | {"numpy", "jinja2"}),
    ],
)
def test_what_an_import_does_not_load(code: str, absent: set[str]) -> None:
    loaded = modules_after(code)
    assert "emlocal" in loaded
    assert not loaded & absent


def test_em_imports_numpy_alone() -> None:
    known = {"numpy", "emlocal", *sys.stdlib_module_names}
    for path in sorted((PACKAGE / "em").rglob("*.py")):
        for module, _ in imports(path):
            top, *rest = module.split(".")
            assert top in known, (path, module)
            if top == "emlocal" and rest:
                assert rest[0] in {"em", "errors", "settings"}, (path, module)


def imports(path: Path, *, at_load: bool = False) -> Iterator[tuple[str, int]]:
    """Yields (module, line) of each import statement in a file; `at_load`: only those that run on loading."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module or "", node.lineno
        elif at_load and runs_later(node):
            continue
        todo += ast.iter_child_nodes(node)


def runs_later(node: ast.AST) -> bool:
    """Whether this part does not run when the file is loaded."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_the_sources_were_found() -> None:
    assert len(SOURCES) > 40
    assert ("numpy", 12) not in list(imports(PACKAGE / "settings/table.py"))
    assert any(m == "llama_cpp" for m, _ in imports(PACKAGE / "backends/llama_cpp/loading.py"))
    assert not any(
        m == "llama_cpp" for m, _ in imports(PACKAGE / "backends/llama_cpp/loading.py", at_load=True)
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_an_engines_own_folder_imports_it(path: Path) -> None:
    inside = path.relative_to(PACKAGE).as_posix()
    for module, line in imports(path):
        home = ENGINES.get(module.split(".")[0])
        assert home is None or inside.startswith(f"{home}/"), f"{inside}:{line} imports {module}"


HEIGHT = {room: -i for i, layer in enumerate(LAYERS) for room in layer}
ROOMS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}


def room_of(parts: Sequence[str]) -> str:
    """Returns the room of emlocal.<parts>.

    Names in capitals, as emlocal.backends.ENGINES, belong to the table there.
    """
    if parts[0] == "backends" and len(parts) > 1 and (parts[1].isupper() or parts[1] == "__init__"):
        return "backends/__init__"
    part = "/".join(parts[:2])
    return part if part in HEIGHT else parts[0]


def test_every_room_has_a_place() -> None:
    assert ROOMS | {"__init__"} == {room for room in HEIGHT if "/" not in room}
    for part in (room for room in HEIGHT if "/" in room):
        assert (PACKAGE / f"{part}.py").is_file()


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (room, line) of a file's imports from emlocal, apart from those for types only."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        todo += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "emlocal" and rest and rest[0] in ROOMS:
                yield room_of(rest), node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    own = room_of(inside.with_suffix("").parts)
    for room, line in imported(path):
        below = HEIGHT[room] < HEIGHT[own] or room.split("/")[0] == own.split("/")[0] or (own, room) in UPWARD
        assert below, f"{inside}:{line}: {own} imports {room}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_else_prints(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    if inside.parts[0].removesuffix(".py") in PRINT:
        return
    found = {module.split(".")[0] for module, _ in imports(path)} & {"rich", "typer"}
    assert not found, f"{inside} imports {found}"
    assert "console" not in {room for room, _ in imported(path)}, f"{inside} imports the console"
