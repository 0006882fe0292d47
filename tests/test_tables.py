"""What a person sees: exact, at 80 columns and at 160, without colour, and never as markup."""

import io
import re
from collections import Counter

import pytest
from rich.console import Console
from torch import nn

from bnfreeze import freeze, inspect, unfreeze
from bnfreeze.tables import Printable, Sheet, escaped


def shown(what, width):
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_report_at_80_columns(model):
    report = freeze(model, {"": "eval+affine", "backbone": "stats", "head": "none"})
    text = "\n".join(shown(report, 80))
    assert re.search(r"stem\.1 +BatchNorm2d +eval\+affine +running +frozen +frozen", text)
    assert re.search(r"backbone\.0\.1 +BatchNorm2d +stats +batch +frozen +train", text)
    assert re.search(r"head\.2 +BatchNorm1d +none +batch +update +train", text)
    assert text.endswith(
        "Of 4 norm layers, 3 have frozen statistics and 1 frozen weight and bias."
    )


def test_the_inspection_at_80_columns(model):
    freeze(model, {"stem": "eval+affine", "backbone.0": "stats"})
    assert shown(inspect(model), 80) == [
        "What the next training step does",
        "",
        " layer         kind         C  policy       uses     statistics  affine",
        " " + "─" * 70,
        " stem.1        BatchNorm2d  4  eval+affine  running  held        held",
        " backbone.0.1  BatchNorm2d  6  stats        batch    held        train",
        " backbone.1.1  BatchNorm2d  6  none         batch    update      train",
        " head.2        BatchNorm1d  5  none         batch    update      train",
        "",
        "note batch-stats-in-train  backbone.0.1",
        "  its statistics are fixed (held by policy stats), but train mode normalises",
        "  with the batch: eval mode is another function.",
        "  → Meant so with policy 'stats'; otherwise use freeze(model, 'eval').",
        "",
        "4 norm layers: 3 normalise with the batch, 2 update their statistics, 3 train",
        "weight or bias.",
    ]


def test_at_160_columns_the_inspection_gives_reasons(model):
    freeze(model, {"stem": "eval+affine"})
    text = "\n".join(shown(inspect(model), 160))
    assert "statistics, because" in text
    assert re.search(r"1e-05 +held by policy eval\+affine +held by policy eval\+affine", text)
    assert re.search(r"1e-05 +train mode +requires_grad", text)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_no_line_is_wider_than_the_terminal_and_no_name_is_cut(width):
    name = "a_rather_long_name_for_a_module_of_a_backbone"
    model = nn.ModuleDict({name: nn.ModuleDict({name: nn.BatchNorm2d(2048)})})
    for what in (inspect(model), freeze(model, "eval+affine")):
        lines = shown(what, width)
        assert max(map(len, lines)) <= width
        # Every letter is there, however it is folded.
        table = "".join("".join(lines).split())
        assert all(table.count(letter) >= f"{name}.{name}".count(letter) for letter in set(name))
        assert f"{name}.{name}" in table or width < 100


@pytest.mark.parametrize("width", [30, 40, 50, 60, 70, 80, 100])
def test_no_cell_loses_its_end(width):
    sheet = Sheet(
        "t",
        ("tensor", "kind", "largest", "what changed"),
        [
            (
                "layer1.0.downsample.1.running_var",
                "value",
                "0.20712",
                "64 of 64 differ, first at [0] qzx",
            )
        ],
        [],
        "",
    )

    class Fixed(Printable):
        def sheet(self):
            return sheet

    lines = shown(Fixed(), width)
    assert max(map(len, lines)) <= width
    body = "".join("".join(lines).split())
    there = Counter(body.replace("tensorkindlargest", "", 1))
    assert Counter("".join("".join(sheet.rows[0]).split())) - there == Counter()


def test_one_kind_of_layer_is_told_in_the_title(model):
    model.head[2] = nn.Identity()
    assert shown(inspect(model), 80)[0] == "What the next training step does · 3 × BatchNorm2d"


def test_printing_gives_the_table_without_colour(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    report = freeze(model, "eval")
    assert "\x1b" not in str(report)
    assert "stem.1" in str(report)
    assert "4 of 4 norm layers restored." in str(unfreeze(model))


def test_weights_of_other_modules_are_counted_and_not_listed(model):
    report = freeze(model, "eval+weights")
    assert " ".join(str(report).split()).endswith("4 other modules have frozen weights.")
    assert "stem.0" not in str(report)
    assert "stem.0" in {row.name for row in report.layers}


def test_layers_with_the_same_finding_are_told_together():
    model = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(5)])
    text = "\n".join(shown(inspect(model), 80))
    assert text.count("never-trained") == 1
    assert "5 layers: 0, 1, … 4" in text


def test_names_are_never_markup_and_never_obeyed_by_a_terminal():
    name = "[bold]x[/foo]\x1b[31m\u202egpj"
    model = nn.ModuleDict({name: nn.BatchNorm2d(2)})
    text = "\n".join(shown(inspect(model), 160))
    assert r"[bold]x[/foo]\x1b[31m\u202egpj" in text
    assert "\x1b" not in text
    assert escaped("größe.bn1") == "größe.bn1"


def test_the_picture_can_be_saved(model, tmp_path):
    freeze(model, "eval").save_svg(tmp_path / "report.svg")
    svg = (tmp_path / "report.svg").read_text()
    assert svg.startswith("<svg")
    assert "url(http" not in svg
    assert "stem.1" in svg
