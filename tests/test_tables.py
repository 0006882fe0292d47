"""What a person sees: at any width, in any encoding, without colour, and never as markup."""

import copy
import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from html import unescape

import pytest
from rich.console import Console
from torch import nn

from bnfreeze import freeze, inspect, snapshot, unfreeze, verify
from bnfreeze.findings import Finding
from bnfreeze.histograms import Histogram
from bnfreeze.sheets import Sheet
from bnfreeze.tables import Printable, svg_of
from bnfreeze.text import encodable, escaped


class Fixed(Printable):
    """A sheet that is what it is."""

    def __init__(self, *columns, rows, findings=(), verdict="", **more):
        self._sheet = Sheet("title", columns, rows, findings, verdict, **more)

    def sheet(self):
        return self._sheet


def shown(what, width, encoding="utf-8"):
    """The lines on a terminal of this width and encoding."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    Console(file=file, width=width, color_system=None, force_terminal=False).print(what)
    file.flush()
    return [line.rstrip() for line in file.buffer.getvalue().decode(encoding).splitlines()]


def reports(model):
    """One of each that can be printed, with something to say."""
    model.head[2].running_var[0] = -1
    before = snapshot(model, tensors="norm")
    moved = copy.deepcopy(model)
    moved.stem[1].running_mean += 1
    moved.backbone[0][1].running_mean += 1
    yield inspect(model)
    yield inspect(model.state_dict())
    yield verify(moved, before)
    yield freeze(model, {"stem": "fused", "backbone.0": "stats"})


def test_the_inspection_at_80_columns(model):
    freeze(model, {"stem": "eval+affine", "backbone.0": "stats"})
    lines = shown(inspect(model), 80)
    assert lines[:8] == [
        "What the next training step does",
        "",
        " layer         kind         C  policy       uses     statistics  affine",
        " " + "─" * 70,
        " stem.1        BatchNorm2d  4  eval+affine  running  frozen      frozen",
        " backbone.0.1  BatchNorm2d  6  stats        batch    frozen      train",
        " backbone.1.1  BatchNorm2d  6  none         batch    update      train",
        " head.2        BatchNorm1d  5  none         batch    update      train",
    ]
    assert "note batch-stats-in-train  backbone.0.1" in lines


def test_at_160_columns_the_inspection_gives_reasons(model):
    freeze(model, {"stem": "eval+affine"})
    text = "\n".join(shown(inspect(model), 160))
    assert "statistics, because" in text
    assert re.search(r"1e-05 +frozen by policy eval\+affine +frozen by policy eval\+affine", text)
    assert re.search(r"1e-05 +train mode +requires_grad", text)


LONG = "layer1.0.downsample_of_the_residual.BatchNormAct2d"


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100, 160])
def test_no_line_is_too_wide_and_no_cell_loses_its_end(width):
    row = (LONG, "value", "0.20712", "64 of 64 differ, first at [0] qzx")
    what = Fixed("tensor", "kind", "largest", "what changed", rows=[row])
    lines = shown(what, width)
    assert max(map(len, lines)) <= width
    there = Counter("".join("".join(lines).split()))
    assert Counter("".join("".join(row).split())) - there == Counter()


@pytest.mark.parametrize("columns", [3, 6, 9])
def test_at_80_columns_no_word_of_a_name_is_broken(columns):
    names = [LONG, "a.b", f"{LONG}.running_mean"]
    rows = [(name, *["BatchNorm2d"] * columns) for name in names]
    finding = Finding("note", "some-code", f"{LONG}.{LONG}.{LONG}", "seen", "mend it")
    lines = shown(Fixed("layer", *"abcdefghi"[:columns], rows=rows, findings=[finding]), 80)
    assert max(map(len, lines)) <= 80
    # A name may end its line after a dot, and what follows begins the next one.
    words = {word for line in lines for word in re.split(r"[.\s]+", line)}
    assert set(LONG.split(".")) | {"running_mean"} <= words


def test_a_word_wider_than_the_line_is_broken_where_its_parts_meet():
    lines = shown(Fixed("layer", rows=[("aaaaaaaaaaaa_bbbbbbbbbbbb-ccccCcccc.dddd",)]), 18)
    assert lines[-5:-1] == [" aaaaaaaaaaaa_", " bbbbbbbbbbbb-", " ccccCcccc.dddd", ""]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "koi8-r", "utf-8"])
def test_every_report_prints_in_every_encoding_and_stays_aligned(model, encoding, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for report in reports(model):
        lines = shown(report, 80, encoding)
        assert max(map(len, lines)) <= 80
        assert "\\u" not in "".join(lines)
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", file)
        print(report)
        print(repr(report))
        monkeypatch.undo()
        monkeypatch.setenv("COLUMNS", "80")
        file.flush()
        printed = file.buffer.getvalue().decode(encoding).splitlines()
        assert [line.rstrip() for line in printed[:-1]] == lines


def test_columns_are_aligned_where_characters_are_replaced():
    rows = [("größe.水", "▁█ ▄", "1…2"), ("b", "█▁▂▃", "1…20")]
    what = Fixed("layer", "picture", "range", rows=rows)
    for encoding in ("ascii", "cp437", "cp1252", "utf-8"):
        *_, first, second, _, _ = shown(what, 80, encoding)
        cells = [re.split(r"\s{2,}", line.strip()) for line in (first, second)]
        assert [len(row) for row in cells] == [3, 3]
        width = 1 if encoding == "utf-8" else 0  # 水 takes two columns, and is one character
        assert first.index(cells[0][2]) + width == second.index(cells[1][2])
    assert encodable("größe → 水 ▁█", "ascii") == r"gr\xf6\xdfe -> \u6c34 .@"
    assert encodable("größe … ▁█", "cp437") == "größe .. .@"


def test_a_script_on_a_terminal_of_ascii_may_print_a_report():
    code = (
        "import torch, bnfreeze as b; r = b.freeze(torch.nn.BatchNorm2d(2), 'eval'); print(r, [r])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.stderr == b""
    assert b"Statistics frozen: 1 of 1" in done.stdout


def test_the_repr_of_a_report_is_short_whatever_its_size():
    model = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(300)])
    before = snapshot(model, tensors="norm")
    for layer in model:
        layer.running_mean += 1
    several = [
        inspect(model),
        verify(model, before),
        inspect(model.state_dict()),
        freeze(model, "eval"),
    ]
    several.append(Fixed("layer", rows=[], verdict="x" * 1000))
    for report in several:
        assert len(repr(report)) <= 400
        assert "\n" not in repr(report)
        assert repr(report).startswith(f"<{type(report).__name__}")


def test_one_kind_of_layer_stands_in_the_title(model):
    model.head[2] = nn.Identity()
    assert shown(inspect(model), 80)[0] == "What the next training step does · 3 × BatchNorm2d"


def test_printing_gives_the_table_without_colour(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    report = freeze(model, "eval")
    assert "\x1b" not in str(report)
    assert "stem.1" in str(report)
    assert "stem.1" in str(unfreeze(model))


def test_weights_of_other_modules_are_counted_and_not_listed(model):
    report = freeze(model, "eval+weights")
    assert "stem.0" not in str(report)
    assert "stem.0" in {row.name for row in report.layers}


def test_layers_with_the_same_finding_are_shown_together_with_their_own_numbers():
    model = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(5)])
    model[0].running_var[:2] = -0.5
    model[1].running_var[0] = -0.25
    lines = shown(inspect(model), 80)
    assert sum("stats-var-nonpositive" in line for line in lines) == 1
    assert "  0: 2 of 3 running variances are negative, the lowest -0.5." in lines
    assert "  1: 1 of 3 running variances are negative, the lowest -0.25." in lines
    assert "warning never-trained  2, 3, 4" in lines


def test_names_are_never_markup_and_never_obeyed_by_a_terminal():
    name = "[bold]x[/foo]\x1b[31m\u202egpj"
    model = nn.ModuleDict({name: nn.BatchNorm2d(2)})
    text = "\n".join(shown(inspect(model), 160))
    assert r"[bold]x[/foo]\x1b[31m\u202egpj" in text
    assert "\x1b" not in text
    assert escaped("größe.bn1") == "größe.bn1"


def test_in_an_svg_each_word_has_its_place_and_a_bar_is_a_rectangle():
    bars = Histogram((0.0, 0.25, 0.5, 0.25), (0.0, 1.0, 2.0, 3.0, 4.0), 2.0)
    svg = svg_of([Fixed("layer", "0 4", "end", rows=[("  a & b", bars, "x"), ("水", bars, "y")])])
    words = {m[2]: float(m[1]) for m in re.finditer(r'<text [^>]* x="([\d.]+)"[^>]*>([^<]*)<', svg)}
    assert not any(re.search(r"\s", unescape(word)) for word in words)
    assert words["a"] == pytest.approx(words["layer"] + 2 * 12.2)
    assert words["&amp;"] == pytest.approx(words["a"] + 2 * 12.2)
    assert words["x"] == words["y"] == words["end"]
    places = re.findall(
        r'<rect class="\S+" x="([\d.]+)" y="[\d.]+" width="\S+" height="(\d+)"', svg
    )
    first = words["0"] + 2 * 12.2  # a mark of values beyond the axis, and an empty bin, are before
    bar = [(f"{first + i * 12.2:g}", height) for i, height in enumerate(["8", "16", "8"])]
    assert places == bar * 2


def test_librsvg_draws_bars_where_the_svg_says(tmp_path):
    program, image = shutil.which("rsvg-convert"), pytest.importorskip("PIL.Image")
    if program is None:
        pytest.skip("rsvg-convert (librsvg2-bin) is not installed")
    bars = Histogram((0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 2.0, 3.0, 4.0), 3.5)
    (tmp_path / "a.svg").write_text(svg_of([Fixed("layer", "0 4", rows=[("name", bars)])]))
    subprocess.run([program, "a.svg", "-o", "a.png"], cwd=tmp_path, check=True)
    svg = (tmp_path / "a.svg").read_text()
    x, y = map(float, re.search(r'<rect class="\S+" x="([\d.]+)" y="([\d.]+)"', svg).groups())
    left, top = map(float, re.findall(r"<g transform=\"translate\(([\d.]+), ([\d.]+)\)", svg)[-1])
    drawn = image.open(tmp_path / "a.png").convert("RGB")
    row = [drawn.getpixel((i, int(top + y + 8))) for i in range(drawn.width)]
    bar = drawn.getpixel((int(left + x + 5), int(top + y + 8)))
    where = [i for i, pixel in enumerate(row) if pixel == bar]
    assert where[0] == pytest.approx(left + x, abs=1.5)
    assert len(where) == pytest.approx(11, abs=1.5)


def test_the_picture_can_be_saved(model, tmp_path):
    freeze(model, "eval").save_svg(tmp_path / "report.svg")
    svg = (tmp_path / "report.svg").read_text()
    assert svg.startswith("<svg")
    assert "url(http" not in svg
    assert "stem.1" in svg
