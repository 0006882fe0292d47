"""Two ranks with different numbers of samples measure what one process measures."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnfreeze
from bnfreeze import CalibrationError

from .test_recalibrate import batches, network


def joined(number, folder, seconds):
    """The group of both ranks, and this rank's batches."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=number,
        world_size=2,
        timeout=timedelta(seconds=seconds),
    )
    data = batches(3, 8, 8)
    return dist.group.WORLD, data[:3] if number == 0 else data[3:]


def rank(number, folder):
    everywhere, own = joined(number, folder, 60)
    model = DistributedDataParallel(network())
    probed = bnfreeze.probe(model, own, process_group=everywhere)
    report = bnfreeze.recalibrate(model, own, process_group=everywhere)
    raised = ""
    try:
        broken = [torch.full((2, 3, 8, 8), torch.nan)] if number else own
        bnfreeze.recalibrate(model, broken, process_group=everywhere)
    except CalibrationError as error:
        raised = str(error)
    torch.save(
        (model.module.state_dict(), probed.to_dict(), report.recalibrated, raised),
        f"{folder}/{number}",
    )
    dist.destroy_process_group()


@pytest.mark.slow  # two processes import torch
def test_uneven_ranks_agree_with_one_process(tmp_path):
    mp.spawn(rank, args=(str(tmp_path),), nprocs=2)
    (states, probes, names, raised) = zip(
        *(torch.load(tmp_path / str(number)) for number in range(2)), strict=True
    )
    alone = network()
    probed = bnfreeze.probe(alone, batches(3, 8, 8)).to_dict()
    bnfreeze.recalibrate(alone, batches(3, 8, 8))
    for name, expected in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], expected, rtol=1e-7, atol=1e-7)
    assert names == (("module.1", "module.5"),) * 2
    for found in probes:
        assert (found["samples"], found["batches"]) == (probed["samples"], probed["batches"])
        for one, other in zip(found["layers"], probed["layers"], strict=True):
            assert one["mean_shift"]["median"] == pytest.approx(
                other["mean_shift"]["median"], rel=1e-9
            )
    assert "NaN" in raised[0]
    assert raised[0].startswith("rank 1")
    assert raised[1].startswith("batch 0")
    assert isinstance(alone, nn.Module)


def differing_rank(number, folder):
    everywhere, own = joined(number, folder, 20)
    model = network()
    model[1].running_mean += number  # as after a training step of DDP
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def score(model):
        if number:
            raise RuntimeError("lights out")
        return 0.0

    with pytest.raises((RuntimeError, CalibrationError), match="lights out"):
        bnfreeze.recalibrate(model, own, process_group=everywhere, score=score)
    probed = bnfreeze.probe(model, own, process_group=everywhere)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for mode in ("keep-function", "replace"):
        bnfreeze.recalibrate(model, own, process_group=everywhere, mode=mode)
        torch.save((probed.to_dict(), model.state_dict()), f"{folder}/{mode}{number}")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes import torch
def test_ranks_whose_statistics_differ_agree_on_those_of_the_first(tmp_path):
    mp.spawn(differing_rank, args=(str(tmp_path),), nprocs=2)
    for mode in ("keep-function", "replace"):
        (one, states), (other, more) = (torch.load(tmp_path / f"{mode}{n}") for n in range(2))
        assert one == other
        assert all(torch.equal(states[name], more[name]) for name in states)
