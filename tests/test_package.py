import ast
import inspect
import subprocess
import sys
import textwrap
import typing
from collections import defaultdict
from pathlib import Path

import pytest

import bnfreeze


def run(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_bnfreeze_imports_neither_torch_nor_rich():
    code = """
        import sys, bnfreeze
        bnfreeze.Policy.parse("eval+affine")
        print([name for name in ("torch", "rich", "numpy") if name in sys.modules])
    """
    assert run(code) == "[]"


def test_every_public_name_is_there_and_is_listed():
    for name in bnfreeze.__all__:
        assert getattr(bnfreeze, name) is not None
    assert set(bnfreeze.__all__) <= set(dir(bnfreeze))
    assert bnfreeze.__all__ == sorted(bnfreeze.__all__)
    assert bnfreeze.__version__.count(".") == 2


def test_type_checkers_see_every_public_name():
    tree = ast.parse(Path(bnfreeze.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {alias.asname for node in imports for alias in node.names} - {None}
    assert names == set(bnfreeze.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'frieze'"):
        _ = bnfreeze.frieze


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (bnfreeze.PolicyError, bnfreeze.BnfreezeError),
        (bnfreeze.PolicyError, ValueError),
        (bnfreeze.CheckpointError, bnfreeze.BnfreezeError),
        (bnfreeze.UnsafeCheckpointError, bnfreeze.CheckpointError),
        (bnfreeze.CorruptCheckpointError, bnfreeze.CheckpointError),
        (bnfreeze.UnsupportedFormatError, bnfreeze.CheckpointError),
        (bnfreeze.DriftError, bnfreeze.BnfreezeError),
        (bnfreeze.DriftError, AssertionError),
        (bnfreeze.BnfreezeWarning, UserWarning),
    ],
)
def test_errors_can_be_caught_by_their_base(error, base):
    assert issubclass(error, base)


def test_no_two_modules_have_a_class_of_the_same_public_name():
    homes = defaultdict(set)
    package = Path(bnfreeze.__file__).parent
    for path in package.rglob("*.py"):
        # The trainers' callbacks are named alike on purpose: each is the same thing there.
        if path.parent.name == "integrations":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(str(path.relative_to(package)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_inspect_is_typed_for_models_and_for_checkpoints():
    if sys.version_info < (3, 11):
        pytest.skip("typing.get_overloads is of Python 3.11")
    results = [
        inspect.signature(f).return_annotation for f in typing.get_overloads(bnfreeze.inspect)
    ]
    assert results == ["ModelInspection", "CheckpointInspection", "Inspection"]
