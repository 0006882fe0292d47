"""A check across ranks: two processes, gloo."""

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    from tests.verification import two_ranks

    return two_ranks.run(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scene", ["ddp_with_broadcast", "ddp_without_broadcast"])
def test_a_frozen_model_under_ddp_passes(seen, scene):
    assert [rank[scene] for rank in seen] == [(3, True, 5)] * 2


def test_ddp_that_overwrites_a_buffer_is_seen_on_the_rank_that_it_overwrote(seen):
    for rank in seen:
        drifts, message = rank["ddp_broadcast_overwrites"]
        assert drifts == [("value", "1.running_mean", 1)]
        assert message.startswith("1.running_mean drifted on rank 1: 6 of 6 elements differ")


@pytest.mark.parametrize("which", [0, 1])
def test_all_ranks_learn_what_drifted_on_one(seen, which):
    for number, rank in enumerate(seen):
        alone, together = rank[f"a_drift_on_rank_{which}"]
        assert alone is (number != which)
        assert together == [("value", "1.running_var", which)]


def test_a_trace_sees_a_write_to_a_shard(seen):
    for rank in seen:
        assert rank["a_trace_of_a_shard"] == ([("value", "0.bias", None)], "two_ranks.py")


def test_ranks_that_started_apart_are_named(seen):
    for rank in seen:
        drifts, message = rank["ranks_that_started_apart"]
        assert drifts == [("value", "1.running_mean", 1)]
        assert "on rank 1: other bits than on rank 0" in message


def test_a_guard_raises_on_all_ranks_at_the_same_step(seen):
    for rank in seen:
        assert rank["a_guard_raises_on_all_ranks"] == ([("value", "1.running_mean", 1)], 2)


def test_sharded_tensors_are_checked_shard_by_shard(seen):
    for rank in seen:
        alone, both, drifted = rank["sharded"]
        assert alone == {"unverified"}
        assert both == [True, True]
        assert drifted == [[("value", "0.weight", 1)]] * 2


def test_what_was_sharded_since_the_snapshot_is_unverified(seen):
    assert seen[0]["sharded_after_the_snapshot"] == [
        ("replaced", "0.weight"),
        ("unverified", "0.weight"),
    ]
