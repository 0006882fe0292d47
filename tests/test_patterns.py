import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfreeze import PolicyError
from bnfreeze.freezing.rules import parse_rules
from bnfreeze.patterns import Pattern, hint


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("", ["", "a", "a.b.c"], []),
        ("a", ["a", "a.b", "a.b.c"], ["", "ab", "b.a"]),
        ("a.b", ["a.b", "a.b.c"], ["a", "a.bc", "x.a.b"]),
        ("*", ["a", "a.b"], [""]),
        ("layer?", ["layer1", "layer4.0.bn1"], ["layer", "layer10", "x.layer1"]),
        ("*.bn1", ["a.bn1"], ["bn1", "a.b.bn1"]),
        ("**.bn1", ["bn1", "a.bn1", "a.b.bn1", "a.bn1.inner"], ["a.bn2"]),
        ("head.**.bn?", ["head.bn1", "head.a.b.bn2"], ["head", "bn1", "head.bn10", "head.a"]),
        ("a.**", ["a", "a.b"], ["b"]),
        ("a.**.**.c", ["a.c", "a.b.c"], ["a.b"]),
        ("downsample*", ["downsample", "downsample_1.0"], ["x.downsample"]),
        ("a+(b)", ["a+(b)"], ["aab", "ab"]),
        ("a[1]", ["a[1]", "a[1].b"], ["a1"]),
        ("[!a]*", ["[!a]", "[!a]x"], ["b"]),
        ("a\nb?", ["a\nb\n"], ["a\nb"]),
        # A key of a checkpoint may have empty segments. ``**`` spans none of them.
        ("a.*.b", ["a..b", "a.x.b"], ["a.b"]),
        ("**.b", ["b", "a.b"], [".b", "a..b"]),
        ("**.**", ["", "a", "a..b"], []),
    ],
)
def test_a_pattern_stands_for_what_matches_and_all_below(pattern, names, others):
    pattern = Pattern.parse(pattern)
    assert [name for name in names if not pattern.matches(name)] == []
    assert [name for name in others if pattern.matches(name)] == []


def test_many_spans_over_a_long_name_come_to_an_end():
    name = ".".join("a" * 3000)
    assert not Pattern.parse("**.a." * 8 + "b").matches(name)
    assert Pattern.parse("**.a." * 8 + "**").matches(name)
    assert not Pattern.parse("*a" * 8 + "b").matches("a" * 3000)
    assert Pattern.parse("*a" * 8).matches("a" * 3000)


segments = st.text("ab1_", min_size=1, max_size=4)
names = st.lists(segments, min_size=1, max_size=5)


@given(names)
def test_a_name_is_its_own_pattern_and_that_of_all_below_it(parts):
    name = ".".join(parts)
    for depth in range(1, len(parts) + 1):
        assert Pattern.parse(".".join(parts[:depth])).matches(name)
    assert Pattern.parse("**." + parts[-1]).matches(name)
    assert Pattern.parse(".".join("*" * len(parts))).matches(name)
    assert not Pattern.parse(name + "x").matches(name)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("a..b", "empty segment"),
        (".a", "empty segment"),
        ("a.", "empty segment"),
        ("layer**", "stands alone between dots"),
        (3, "not int"),
    ],
)
def test_a_malformed_pattern_says_what_is_wrong(wrong, says):
    with pytest.raises(PolicyError, match=says):
        Pattern.parse(wrong)


def test_an_error_inside_a_rule_names_the_rule():
    with pytest.raises(PolicyError, match=r"Rule 'layer1': .*no policy 'evil'"):
        parse_rules({"layer1": "evil"})
    with pytest.raises(PolicyError, match="empty"):
        parse_rules({})


def test_the_nearest_names_are_found_whole_and_by_their_last_segment():
    names = ["backbone", "backbone.layer3", "backbone.layer4", "head.norm"]
    assert "mean 'backbone.layer" in hint("backbone.layer5", names)
    assert "'backbone.layer4'" in hint("layer4", names)
    assert hint("zzzzzz", names) == ""
