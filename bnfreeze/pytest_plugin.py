"""The pytest plugin: the fixture `bnfreeze_guard`, and comparisons that explain themselves.

Every pytest run on the machine loads this module, so it imports no torch until a test asks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

    from bnfreeze.verification.guard import Guard

_GUARDS = pytest.StashKey[ExitStack]()


@pytest.fixture
def bnfreeze_guard(request: pytest.FixtureRequest) -> Generator[Callable[..., Guard], None, None]:
    """Watch a model until the end of the test: ``bnfreeze_guard(model, optimizer=optimizer)``.

    Takes what `bnfreeze.guard` takes and gives the `Guard`. A drift fails the test, at the
    optimizer step after which it was seen, or at the end of the test.
    """
    guards = request.node.stash[_GUARDS] = ExitStack()

    def start(model: nn.Module, **options: Any) -> Guard:
        __tracebackhide__ = True
        import bnfreeze

        return guards.enter_context(bnfreeze.guard(model, **options))

    with guards:  # closed at the end of the test already, but for one that was never called
        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Close the guards of a test as part of it: a drift at its end is a failure, not an error."""
    __tracebackhide__ = True
    with item.stash.get(_GUARDS, None) or ExitStack():
        return (yield)


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Explain ``assert snapshot(model) == before`` by the verdict and the first drift."""
    # If nobody has imported the module, neither side is a snapshot.
    home = sys.modules.get("bnfreeze.verification.snapshot")
    if home is None or op != "==":
        return None
    if not isinstance(left, home.Snapshot) or not isinstance(right, home.Snapshot):
        return None
    report = left.compared_to(right)
    return [f"the snapshots differ: {report.verdict}", *report.message.splitlines()]
