"""Our Python files, parsed, and what each of them imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("ucm", "tests", "examples", "benchmarks")


@dataclass(frozen=True)
class Module:
    """One Python file, with every name that it imports, wherever in the file it does; `needs` are
    those without which it can't run: not for types only."""

    path: Path
    name: str
    tree: ast.Module
    imports: frozenset[str]
    needs: frozenset[str]

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))


def python_files() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for path in python_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        tree = ast.parse(path.read_bytes(), filename=str(path))
        package = name if is_package else name.rpartition(".")[0]
        imports = frozenset(imported_names(ast.walk(tree), package))
        needs = frozenset(imported_names(run_nodes(tree), package))
        found.append(Module(path, name, tree, imports, needs))
    return tuple(found)


def run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All but what stands under `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from run_nodes(other)
        else:
            yield from run_nodes(child)


def imported_names(nodes: Iterator[ast.AST], package: str) -> Iterator[str]:
    """`import a.b` gives a.b; `from a import b` gives a and a.b, as b may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ours() -> list[Module]:
    return [module for module in modules() if within(module.name, "ucm")]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def our_imports(module: Module) -> list[str]:
    """The modules of `ucm` that it names, also those that it imports for types only."""
    names = {each.name for each in ours() if each.path.name != "__init__.py"}
    return sorted(module.imports & names - {module.name})
