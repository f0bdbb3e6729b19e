"""The rooms of the project and the direction of imports between them, as tests.

A rule that only a document states is broken by the second change after it.
"""

from __future__ import annotations

import ast
import graphlib
import re

import pytest

from tests.source import FOLDERS, ROOT, modules, our_imports, ours, python_files, within
from tests.unused_names import unused_methods, unused_names

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70
MAX_CONSTRUCTOR_ARGUMENTS = 6

# The floors of `ucm`, from the ground up: a module knows those of its own floor and of the ones
# below. It is on the floor whose name is the longest beginning of its own.
FLOORS = (
    *("ucm.outcome", "ucm.errors", "ucm.handoff", "ucm.config", "ucm.metrics"),
    # The store: what a block is, where its page is kept, the node cache, and its clients.
    *("ucm.store.processes", "ucm.store.blocks"),
    *("ucm.store.tiers.tier", "ucm.store.tiers.wrapper", "ucm.store.tiers.metered"),
    "ucm.store.tiers.per_minute",
    *("ucm.store.tiers.posix", "ucm.store.tiers.s3", "ucm.store.tiers"),
    *("ucm.store.node", "ucm.store.client", "ucm.store.api", "ucm.store.inspect"),
    "ucm.store.pipeline",
    # Engines: the copies of any, the scheduler half of any, what one platform does, and those that
    # we know by name.
    *("ucm.integration.copies", "ucm.integration.engine", "ucm.integration.ascend"),
    *("ucm.integration.vllm", "ucm.integration.tiering", "ucm.integration.sglang"),
    # The proxy, which knows nothing of the store.
    *("ucm.pd.protocol", "ucm.pd.errors", "ucm.pd.security", "ucm.pd.fleet", "ucm.pd.flags"),
    *("ucm.pd.access", "ucm.pd.metrics", "ucm.pd.legs.upstream", "ucm.pd.trace"),
    *("ucm.pd.stopping", "ucm.pd.intake", "ucm.pd.legs", "ucm.pd.health", "ucm.pd.administration"),
    *("ucm.pd.about", "ucm.pd.app", "ucm.pd.server", "ucm.pd"),
    "ucm.cli",
)
# Houses that stand side by side: neither knows the other, whatever their floors.
APART = (
    *(("ucm.pd", "ucm.store"), ("ucm.pd", "ucm.integration"), ("ucm.cli", "ucm.integration")),
    *(("ucm.integration.sglang", f"ucm.integration.{n}") for n in ("copies", "vllm", "tiering")),
)
# What is inside of the process that a room is about; others know its doors alone.
DOORS = {
    "ucm.store.node": (
        *("protocol", "run", "rendezvous", "lock", "trusted_users", "limits", "memory", "notices"),
    ),
}
# Who may import a heavy or foreign package, by the module's name or its package's.
FOREIGN: dict[str, tuple[str, ...]] = {
    "vllm": (
        "ucm.integration.vllm",
        *(f"ucm.integration.tiering.{name}" for name in ("connector", "ucm_tier", "vllm_stats")),
        "ucm.integration.tiering.identity",
    ),
    "sglang": ("ucm.integration.sglang",),
    "torch": (
        *("ucm.store.api.tensors", "ucm.integration.copies"),
        *("ucm.integration.ascend.accelerator", "ucm.integration.vllm"),
    ),
    "yaml": ("ucm.config",),
    "obstore": ("ucm.store.tiers.s3",),
    "aiohttp": ("ucm.pd",),
    "typer": ("ucm.cli", "ucm.pd.toy_proxy_server"),
}
# These run, with all that they need, where a package is not installed.
WITHOUT: dict[str, tuple[str, ...]] = {
    "vllm": (
        *("ucm.store", "ucm.integration.copies", "ucm.integration.engine"),
        *("ucm.integration.ascend", "ucm.integration.sglang", "ucm.pd", "ucm.cli"),
    ),
    "torch": (
        *("ucm.store", "ucm.integration.engine", "ucm.integration.ascend.engine"),
        *("ucm.integration.sglang", "ucm.pd", "ucm.cli"),
    ),
}
# The store API takes tensors where there is torch, and knows so when it is given one.
TENSOR_DOOR = "ucm.store.api.tensors"

# What only one room may speak of, in its names and its texts.
SPOKEN_OF = {"npu": "ucm.integration.ascend", "ascend": "ucm.integration.ascend"}

ENTRY_POINTS = {
    "ucm.cli.main",
    "ucm.integration.sglang.hicache",
    "ucm.integration.tiering.connector",
    "ucm.integration.tiering.ucm_tier",
    "ucm.integration.vllm.describe",
    "ucm.integration.vllm.ucm_connector",
    "ucm.pd.register",
    "ucm.pd.toy_proxy_server",
    "ucm.store.pipeline",
}


def floor_of(name: str) -> int:
    below = [floor for floor in FLOORS if within(name, floor)]
    assert below, f"{name} is on no floor"
    return FLOORS.index(max(below, key=len))


def test_every_module_is_on_one_floor_and_knows_none_above_it() -> None:
    for module in ours():
        if module.path.name == "__init__.py":
            continue
        for name in our_imports(module):
            assert floor_of(name) <= floor_of(module.name), f"{module} imports {name}"


def test_no_package_imports_what_is_in_it() -> None:
    """What a room has is imported from its file: one name has one place."""
    for module in ours():
        if module.path.name == "__init__.py":
            assert not module.imports, f"{module} imports {set(module.imports)}"


def test_houses_that_stand_side_by_side_know_nothing_of_each_other() -> None:
    for module in ours():
        for one, other in APART:
            if within(module.name, one):
                known = [name for name in our_imports(module) if within(name, other)]
                assert not known, f"{module} imports {known}"


@pytest.mark.parametrize("room", DOORS)
def test_what_is_inside_of_a_process_is_known_by_its_doors(room: str) -> None:
    doors = {f"{room}.{name}" for name in DOORS[room]}
    used: set[str] = set()
    for module in ours():
        if not within(module.name, room):
            used |= {name for name in our_imports(module) if within(name, room)}
    assert used == doors


def test_no_two_files_know_each_other() -> None:
    """Not even for types: who wants to understand one has to read all of a circle."""
    graphlib.TopologicalSorter({each.name: our_imports(each) for each in ours()}).prepare()


@pytest.mark.parametrize("package", FOREIGN)
def test_foreign_packages_stay_in_their_rooms(package: str) -> None:
    """The store, the node cache and the proxy run without vLLM and torch."""
    for module in ours():
        if any(name.startswith(package) for name in module.imports):
            assert any(within(module.name, room) for room in FOREIGN[package]), (
                f"{module} imports {package}"
            )


@pytest.mark.parametrize("word", SPOKEN_OF)
def test_only_the_room_of_a_platform_speaks_of_it(word: str) -> None:
    """Others import what that room has, and ask it."""
    of_word = re.compile(rf"(?i:(?<![a-z]){word})|{word.title()}")
    speakers: set[str] = set()
    for module in ours():
        told = {
            text
            for node in ast.walk(module.tree)
            if not isinstance(node, ast.ImportFrom)
            for text in _words_of(node)
            if of_word.search(text)
        }
        if told:
            speakers.add(module.name)
            assert within(module.name, SPOKEN_OF[word]), f"{module} speaks of {word}: {told}"
    assert speakers


def _words_of(node: ast.AST) -> list[str]:
    """Its own, not those of what is in it."""
    found = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "value")]
    return [each for each in found if isinstance(each, str)]


@pytest.mark.parametrize("package", WITHOUT)
def test_rooms_run_without_what_they_have_no_business_with(package: str) -> None:
    by_name = {module.name: module for module in ours()}
    rooms = WITHOUT[package]
    unread = {name for name in by_name if any(within(name, room) for room in rooms)}
    unread.discard(TENSOR_DOOR)
    known: set[str] = set()
    while unread:
        module = by_name[unread.pop()]
        known.add(module.name)
        assert not any(name.startswith(package) for name in module.needs), f"{module}"
        needed = module.needs & by_name.keys()
        unread |= needed - known - ({TENSOR_DOOR} if within(module.name, "ucm.store") else set())


def test_modules_are_imported_by_name_and_by_import_alone() -> None:
    """What is imported otherwise, or as a package with whatever it has, is seen by no rule here."""
    packages = {each.name for each in ours() if each.path.name == "__init__.py"}
    for module in ours():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    assert not node.level and name not in packages, f"{module} imports {name}"
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            hidden = name in ("importlib", "__import__", "pkgutil")
            assert not hidden, f"{module}:{getattr(node, 'lineno', 0)} imports by {name}"


def test_only_the_settings_read_the_environment() -> None:
    """A variable that is read elsewhere is a setting that nobody documents or checks."""
    for module in ours():
        if within(module.name, "ucm.config"):
            continue
        for node in ast.walk(module.tree):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            line = getattr(node, "lineno", 0)
            assert name not in ("environ", "environb", "getenv"), f"{module}:{line} reads {name}"


def test_no_two_classes_have_one_name() -> None:
    """A name that stands twice can't be looked for."""
    places: dict[str, list[str]] = {}
    for module in ours():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(str(module))
    assert {} == {name: where for name, where in places.items() if len(where) > 1}


def test_constructors_take_few_things() -> None:
    """What goes together is one value with a name."""
    for module in ours():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                args = node.args
                count = len([*args.posonlyargs, *args.args, *args.kwonlyargs]) - 1
                assert count <= MAX_CONSTRUCTOR_ARGUMENTS, f"{module}:{node.lineno}: {count}"


def test_tests_stand_in_the_rooms_of_what_they_are_about() -> None:
    """Other folders of tests are about several rooms at once: faults, real vLLM, documents."""
    for house in ("config", "store", "integration", "pd"):
        for folder in {path.parent for path in (ROOT / "tests" / house).rglob("*.py")}:
            room = folder.relative_to(ROOT / "tests")
            assert (ROOT / "ucm" / room).is_dir(), f"there is no ucm/{room}"


def test_files_fit_a_sitting() -> None:
    """A file that grows further is two files."""
    for module in modules():
        num_lines = len(module.path.read_bytes().splitlines())
        assert num_lines <= MAX_FILE_LINES, f"{module} has {num_lines} lines"


def test_functions_fit_a_screen() -> None:
    """Branches in the parent, loops and arithmetic in leaves."""
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                num_lines = node.end_lineno - node.lineno + 1
                assert num_lines <= MAX_FUNCTION_LINES, f"{module}: {node.name}: {num_lines} lines"


def test_every_module_says_what_it_is() -> None:
    """The first line of a file is its docstring, not a license or a mark of byte order."""
    for module in modules():
        text = module.path.read_bytes()
        assert not text.startswith(b"\xef\xbb\xbf"), f"{module} starts with a byte order mark"
    for module in ours():
        assert ast.get_docstring(module.tree), f"{module} has no docstring"


def test_the_license_is_in_one_place() -> None:
    """LICENSE, once."""
    header = re.compile(r"^# *(Copyright|SPDX-|Licensed under|MIT License)", re.MULTILINE)
    for path in python_files():
        assert not header.search(path.read_text()), f"{path.relative_to(ROOT)} has a license header"


def test_nothing_runs_at_the_start_of_every_interpreter() -> None:
    """No .pth file and no sitecustomize: an engine is not patched behind its back."""
    for folder in FOLDERS:
        for pattern in ("*.pth", "sitecustomize.py", "usercustomize.py"):
            assert not list((ROOT / folder).rglob(pattern))


def test_every_module_is_used_or_is_an_entry() -> None:
    """What nobody imports is deleted; a test is no user."""
    used = {
        name for module in modules() if not within(module.name, "tests") for name in module.imports
    }
    for module in ours():
        is_package = module.path.name == "__init__.py"
        is_entry = module.name in ENTRY_POINTS or module.path.name == "__main__.py"
        assert is_package or is_entry or module.name in used, f"{module} is used by nothing"


def test_no_public_name_is_there_for_tests_alone() -> None:
    """What only a test wants of the code stands in the tests, or has an underscore."""
    found = {*unused_names(ENTRY_POINTS), *unused_methods(ENTRY_POINTS)}
    assert not found, "\n".join(sorted(found))


def test_every_file_that_a_comment_names_is_there() -> None:
    """As a path, or by its name alone."""
    paths = [f"/{path.relative_to(ROOT)}" for path in python_files()]
    for module in ours():
        for name in re.findall(r"[\w/]+\.py\b", module.path.read_text()):
            assert any(path.endswith(f"/{name}") for path in paths), f"{module} names {name}"
