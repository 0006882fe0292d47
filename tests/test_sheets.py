"""Names as a tree and values as a histogram: exact."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfreeze.histograms import Scale
from bnfreeze.sheets import grouped, outline


def lines(names):
    """How far each line of a tree is indented, its text, and its whole name if it is no heading."""
    return [(depth, text, *cells) for depth, text, cells in outline([(name,) for name in names])]


def test_names_that_begin_alike_stand_under_a_heading():
    names = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2", "fc.bn"]
    assert lines(names) == [
        (0, "bn1", "bn1"),
        (0, "layer1"),
        (1, "0.bn1", "layer1.0.bn1"),
        (1, "0.bn2", "layer1.0.bn2"),
        (1, "1.bn1", "layer1.1.bn1"),
        (1, "1.bn2", "layer1.1.bn2"),
        (0, "fc.bn", "fc.bn"),
    ]


def test_a_heading_takes_all_that_is_shared():
    names = [f"model.backbone.{i}.bn{j}" for i in range(2) for j in range(2)]
    assert lines(names)[:2] == [(0, "model.backbone"), (1, "0.bn0", "model.backbone.0.bn0")]


def test_few_names_need_no_heading():
    assert lines(["a.x", "a.y"]) == [(0, "a.x", "a.x"), (0, "a.y", "a.y")]
    assert lines([]) == []
    assert lines(["", "running"]) == [(0, "", ""), (0, "running", "running")]


@given(st.lists(st.text("ab01.", max_size=8), max_size=12))
def test_every_name_is_listed_once_and_in_order(names):
    assert [line[2] for line in lines(names) if len(line) == 3] == names
    assert sorted(i for group in grouped(names).values() for i in group) == list(range(len(names)))


def test_tensors_are_grouped_where_their_names_part():
    assert list(grouped(["conv1.weight", "layer1.0.w", "layer1.1.w", "fc.w"])) == [
        "conv1",
        "layer1",
        "fc",
    ]
    assert list(grouped(["model.a.w", "model.b.w", "model.b.c.w"])) == ["model.a", "model.b"]
    assert list(grouped(["bn.weight", "bn.bias"])) == ["bn"]
    assert list(grouped(["weight", "bias"])) == ["weight", "bias"]


def test_a_spread_is_drawn_on_the_scale_of_all():
    low, high = [float(10**-3)] * 11, [10.0] * 11
    even = [10 ** (-3 + 4 * i / 10) for i in range(11)]
    scale = Scale([low, high], positive=True)
    assert str(scale.draw(low, 8)) == " █       "
    assert str(scale.draw(high, 8)) == "        █"
    assert str(scale.draw(even, 10)) == " ██████████"
    assert scale.draw(None, 8) == ""
    assert scale.ends(12) == " 0.001     10"
    assert Scale([[1.0] * 11], positive=True).ends(12) == " 1"
    # The axis leaves out each layer's outermost tenths, unless others reach as far.
    narrow = Scale([[-9.0, *[0.0] * 4, 0.5, *[1.0] * 4, 3.0]], positive=False)
    assert narrow.draw([-9.0, *[1.0] * 10], 8).below
    assert narrow.draw([*[0.0] * 10, 3.0], 8).above


@given(
    st.lists(
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=11, max_size=11).map(
            sorted
        ),
        max_size=4,
    ),
    st.booleans(),
)
@pytest.mark.filterwarnings("error")
def test_any_values_can_be_drawn(spreads, positive):
    scale = Scale(spreads, positive=positive)
    for deciles in spreads:
        drawn = scale.draw(deciles, 8)
        assert (len(drawn.shares), len(drawn.edges), max(drawn.heights())) == (8, 9, 8)
        assert not any(map(math.isnan, drawn.edges))
    assert scale.ends(12)
