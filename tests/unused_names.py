"""The public names of `ucm` that nothing uses but tests.

Read from the source: a name of a module is used if something reads it there, or imports it, or
reads it as an attribute where the module is imported. What a door has (`entries`, by their modules'
names) is for everybody.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from tests.source import Module, modules, ours, within

# Bases that call nothing by its name; a method of a class with another one is called by that.
_PLAIN_BASES = {"ABC", "Enum", "str", "Exception", "Generic", "Protocol", "msgspec.Struct"}


def users() -> list[Module]:
    return [module for module in modules() if not within(module.name, "tests")]


def unused_names(entries: set[str]) -> Iterator[str]:
    """Functions, classes and constants of modules, by their module's name and their own."""
    for module in ours():
        if module.name in entries:
            continue
        for name in filter(is_public, top_names(module.tree)):
            known_by = (other for other in users() if module.name in other.imports)
            if name not in names_read(module) and not any(
                f"{module.name}.{name}" in other.imports or name in attributes_read(other)
                for other in known_by
            ):
                yield f"{module.name}.{name}"


def unused_methods(entries: set[str]) -> Iterator[str]:
    """By their names: one is used if anything of that name is."""
    read = frozenset[str]().union(*map(attributes_read, users()))
    classes = [
        (module, node)
        for module in ours()
        if module.name not in entries
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    ]
    called_from_outside = bases_with(classes)
    for module, node in classes:
        if node.name not in called_from_outside:
            for each in node.body:
                is_method = isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))
                if is_method and is_public(each.name) and each.name not in read:
                    yield f"{module.name}.{node.name}.{each.name}"


def bases_with(classes: list[tuple[Module, ast.ClassDef]]) -> set[str]:
    """The classes that have a base which isn't ours, and what they have beside it."""
    bases: dict[str, set[str]] = {}
    for _, node in classes:
        above = {ast.unparse(base).partition("[")[0] for base in node.bases}
        bases.setdefault(node.name, set()).update(above)
    plain = bases.keys() | _PLAIN_BASES
    return {
        name
        for own, above in bases.items()
        if not above <= plain
        for name in (own, *above & bases.keys())
    }


def is_public(name: str) -> bool:
    return not name.startswith("_")


def top_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (each.id for each in node.targets if isinstance(each, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


@cache
def names_read(module: Module) -> frozenset[str]:
    nodes = ast.walk(module.tree)
    return frozenset(
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    )


@cache
def attributes_read(module: Module) -> frozenset[str]:
    return frozenset(node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute))
