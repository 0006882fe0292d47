"""The fuzzers, a little of them; .ci/run runs more."""

import pytest

from . import fuzz_pickles
from .fuzz_checkpoints import ALL_FORMATS, fuzz


@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_damaged_files_give_a_documented_error_or_the_right_answer(kind, tmp_path):
    outcomes = fuzz(kind, 40, 0, tmp_path)
    assert sum(outcomes.values()) == 40
    # Neither is the damage always fatal, nor is it overlooked.
    assert outcomes["CorruptCheckpointError"] > 10
    assert outcomes["agrees"] + outcomes["answered"] > 0


def test_pickles_of_torchs_own_words_are_read_as_torch_loads_them_or_refused():
    outcomes = fuzz_pickles.fuzz(150, 0)
    assert sum(outcomes.values()) == 150
    assert outcomes["agrees"] > 30
    assert outcomes["refused"] > 20
