"""Rules for the source code of the package."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bnfreeze"
MODULES = sorted(PACKAGE.rglob("*.py"))

# One class for each trainer, chosen by the module that it is imported from.
SAME_NAME_ON_PURPOSE = {"FreezeBatchNorm"}


def test_no_module_is_longer_than_400_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {str(path): lines for path, lines in lengths.items() if lines > 400} == {}


@pytest.mark.parametrize("package", ["bnfreeze", "benchmarks"])
def test_there_are_no_circular_imports(package):
    """Imports for type checkers and inside functions count as well."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph(package, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules


def test_a_public_name_is_defined_in_one_module_only():
    homes = defaultdict(set)
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes[node.name].add(str(path.relative_to(PACKAGE)))
    twice = {name: sorted(paths) for name, paths in homes.items() if len(paths) > 1}
    assert {name: paths for name, paths in twice.items() if name not in SAME_NAME_ON_PURPOSE} == {}


def names_of_torch(tree):
    """Yield every name that a module imports from torch, and every attribute that it reads."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name for alias in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
            names |= {"torch"} if modules else set()
            yield from modules
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in names:
            yield ast.unparse(node)


def test_private_names_of_torch_are_in_one_module():
    found = set()
    for path in MODULES:
        if path.name != "torch_private.py":
            for name in names_of_torch(ast.parse(path.read_text(encoding="utf-8"))):
                if any(part.startswith("_") and part[:2] != "__" for part in name.split(".")):
                    found.add(f"{path.relative_to(PACKAGE)}: {name}")
    assert found == set()
