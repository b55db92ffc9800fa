"""Imports go down the layers only, read from the source; TensorFlow and Keras stand in `training/` and demos alone."""

import ast
from pathlib import Path

import pytest

import streaming_polyak

PACKAGE = Path(streaming_polyak.__file__).parent
MODULES = {
    ".".join(["streaming_polyak", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# The first prefix that fits gives the rank; a module imports from lower ranks, or from its own folder.
RANKS = {
    "streaming_polyak.errors": 0,
    "streaming_polyak.files.descriptors": 0,
    "streaming_polyak.weighting": 1,
    "streaming_polyak.schedule": 1,
    "streaming_polyak.files.disk": 1,
    "streaming_polyak.files.storage": 2,
    "streaming_polyak.files.meter": 2,
    "streaming_polyak.files.checksums": 2,
    "streaming_polyak.files.summation": 2,
    "streaming_polyak.files.source": 2,
    "streaming_polyak.files.tensors": 3,
    "streaming_polyak.files.inputs": 3,
    "streaming_polyak.files.formats": 4,
    "streaming_polyak.files": 5,
    "streaming_polyak.training.accumulators": 6,
    "streaming_polyak.training": 6,
    "streaming_polyak.plots": 3,
    "streaming_polyak.demo": 8,
    "streaming_polyak.user_code": 6,
    "streaming_polyak.cli": 9,
    "streaming_polyak.__main__": 10,
    "streaming_polyak": 7,
}
HEAVY = {"tensorflow", "keras"}
MAY_BE_HEAVY = ("streaming_polyak.training", "streaming_polyak.demo")


def rank(module):
    return next(value for prefix, value in RANKS.items() if f"{module}.".startswith(f"{prefix}."))


def folder(module):
    """The package a module stands in; a package stands in itself."""
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def imports(path):
    """(module, at import time) for each import of a file; those for type checkers only are left out."""
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    for imported in imports(MODULES[module]):
        if imported in MODULES and imported != module:
            lower = rank(imported) < rank(module)
            beside = rank(imported) == rank(module) and imported.rpartition(".")[0] == folder(module)
            assert lower or beside, f"{module} (rank {rank(module)}) imports {imported} (rank {rank(imported)})"


@pytest.mark.parametrize("module", MODULES)
def test_only_training_and_demos_import_tensorflow_and_keras(module):
    heavy = {name.partition(".")[0] for name in imports(MODULES[module])} & HEAVY
    assert not heavy or module.startswith(MAY_BE_HEAVY), f"{module} imports {heavy}"


def test_the_rule_sees_what_it_should():
    assert "tensorflow" in set(imports(MODULES["streaming_polyak.training.loop"]))
    assert "streaming_polyak.files.storage" in set(imports(MODULES["streaming_polyak.training.saving"]))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_opens_with_a_docstring(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))
