"""The fuzzer, a little of it; `python -m tests.fuzz_checkpoints 20000` for much."""

import pytest

from .checkpoints import FORMATS
from .fuzz_checkpoints import fuzz


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_give_a_documented_error_or_the_right_answer(kind, tmp_path):
    outcomes = fuzz(kind, 200, 0, tmp_path)
    assert sum(outcomes.values()) == 200
    # Neither is the damage always fatal, nor is it overlooked.
    assert outcomes["CorruptCheckpoint"] > 50
    assert outcomes["agrees"] + outcomes["answered"] > 5
