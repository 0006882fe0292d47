"""torch.func and torch.fx."""

from torch.func import functional_call

from .cells import cell
from .checks import freeze_by, keeps_its_promise, train


@cell("`torch.func.functional_call`")
def test_a_functional_call_trains_what_is_not_held(model, images, policy):
    freeze_by(model, policy)

    def forward(images):
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return functional_call(model, values, (images,))

    with keeps_its_promise(model, policy):
        train(model, images, forward=forward)
