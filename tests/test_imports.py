"""Imports point one way, and nothing loads an engine before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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
BELOW = {
    "cli": {
        "batch",
        "chat",
        "training",
        "evaluation",
        "plotting",
        "generation",
        "sampling",
        "em",
        "backends",
        "models",
    },
    "plotting": {"evaluation", "generation", "sampling"},
    "chat": {"generation", "sampling", "em", "backends", "models"},
    "evaluation": {"batch", "generation", "sampling", "em", "backends", "models"},
    "training": {"generation", "sampling", "em", "backends", "models"},
    "generation": {"sampling", "em", "backends", "models"},
    "backends": {"sampling", "em", "models"},
    "sampling": {"em"},
    "models": set(),
    "em": set(),
}
"""What each room may import of the others."""


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has loaded after this code: top-level names, and modules of emlocal."""
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
        ("import emlocal.em.fast_em_inf", HEAVY | {"rich", "typer", "jinja2", "emlocal.sampling"}),
        ("import emlocal.sampling", HEAVY | {"rich", "typer", "jinja2", "emlocal.generation"}),
        ("import emlocal.generation", HEAVY | {"rich", "typer", "jinja2", "emlocal.cli"}),
        ("import emlocal.backends.base, emlocal.backends.select, emlocal.backends.fake", HEAVY),
        ("import emlocal.models.templates", HEAVY | {"jinja2", "numpy"}),
        ("import emlocal.models.resolve", HEAVY | {"jinja2", "numpy"}),
        ("import emlocal.training.settings", HEAVY | {"numpy"}),
        (
            "import emlocal.cli.generate, emlocal.cli.engine, emlocal.settings.files",
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
        ("import emlocal.models.adapters.reading", HEAVY | {"gguf", "safetensors"}),
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
    """(module, line) of each import statement in a file; `at_load`: of those only that run when it loads."""
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
    """Whether loading a file leaves this part of it out."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_the_sources_were_found() -> None:
    assert len(SOURCES) > 40
    assert ("numpy", 12) not in list(imports(PACKAGE / "settings/table.py"))
    assert any(m == "llama_cpp" for m, _ in imports(PACKAGE / "backends/llama_cpp/library.py"))
    assert not any(
        m == "llama_cpp" for m, _ in imports(PACKAGE / "backends/llama_cpp/library.py", at_load=True)
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_an_engines_own_folder_imports_it(path: Path) -> None:
    inside = path.relative_to(PACKAGE).as_posix()
    for module, line in imports(path):
        home = ENGINES.get(module.split(".")[0])
        assert home is None or inside.startswith(f"{home}/"), f"{inside}:{line} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    room = inside.parts[0]
    if room not in BELOW:
        return
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] == "emlocal" and len(parts) > 1 and parts[1] in BELOW and parts[1] != room:
            assert parts[1] in BELOW[room], f"{inside}:{line}: {room} imports {module}"
