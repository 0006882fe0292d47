import pytest
import torch

from .models import prepared


def pytest_itemcollected(item):
    # Deprecation warnings of other packages are not ours to fix.
    item.add_marker(
        pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    )


@pytest.fixture(autouse=True)
def device(request):
    """Skip a test that is marked ``gpu`` on a machine without one."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16)


@pytest.fixture
def loader():
    """Two batches of images with their classes."""
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)
    return torch.utils.data.DataLoader(data, 4)


@pytest.fixture
def model():
    return prepared()
