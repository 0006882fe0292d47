import contextlib
import re
from dataclasses import astuple

import pytest
import torch

from .cells import cell_of, section_of
from .models import prepared


def pytest_itemcollected(item):
    """Note on the test which cell it is, for whoever writes the table."""
    # What other packages do that is deprecated is theirs to mend.
    item.add_marker(
        pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    )
    cell = cell_of(item)
    if cell is not None:
        section = section_of(item)
        item.user_properties += [
            ("cell", astuple(cell)),
            ("section", (section.title, section.versions)),
            ("gpu", item.get_closest_marker("gpu") is not None),
        ]


@pytest.fixture(autouse=True)
def device(request):
    """Skip what is marked ``gpu`` where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16)


@pytest.fixture
def loader():
    """Two batches of images, each with its class."""
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)
    return torch.utils.data.DataLoader(data, 4)


@pytest.fixture
def model():
    return prepared()


@pytest.fixture
def refused(record_property):
    """``with refused(error, says):`` the block must raise it; the cell is a refusal that says so.

    `says` is a part of the message, word for word.
    """

    @contextlib.contextmanager
    def refused(error, says):
        with pytest.raises(error, match=re.escape(says)):
            yield
        record_property("refused", f"{error.__name__}: “{says}”")

    return refused


@pytest.fixture
def needs_gpu(record_property):
    """``needs_gpu()``: skip what is left of a test for some policies only."""

    def needs_gpu():
        if not torch.cuda.is_available():
            record_property("gpu", True)
            pytest.skip("needs a CUDA device")

    return needs_gpu


@pytest.fixture
def thaws(record_property):
    """``thaws(text)``: it makes live layers of frozen ones, as `text` says; the test shows how."""
    return lambda text: record_property("thaws", text)


@pytest.fixture
def remark(record_property):
    """``remark(text)``: what a person should know of a cell that works."""
    return lambda text: record_property("remark", text)
