"""Reports as HTML: what a browser shows, and what a hostile name cannot do."""

import copy
import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from torch import nn

from bnfreeze import diff, freeze, html, inspect, snapshot, verify
from bnfreeze.findings import finding, finding_kind
from bnfreeze.histograms import Histogram
from bnfreeze.sheets import Sheet

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-sync", "--disable-component-update", "--no-first-run", "--disable-quic"]
FLAGS += ["--enable-logging=stderr"]  # errors of scripts are written there
HOSTILE = "</td><script>document.title='owned'</script>\"'<img src=x onerror=alert(1)>\u202e\x1b"

# What a test may do with the page; it is put into the page and runs in the browser.
DRIVER = """
const all = (what, where = document) => [...where.querySelectorAll(what)];
const one = what => document.querySelector(what);
const seen = () => all("tbody tr").filter(row => row.offsetParent !== null)
  .map(row => row.cells[0].innerText.trim());
const click = (what, text) => all(what).find(x => x.innerText.trim() === text).click();
const type = text => { one("input").value = text; one("input").oninput(); };
"""


@pytest.fixture
def browser(tmp_path):
    """A function that opens a page in Chromium and gives the value of a JavaScript expression."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")

    def dump(page):
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [CHROMIUM, *FLAGS, profile, "--dump-dom", (tmp_path / "page.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        return done.stdout

    def value(page, *steps):
        # The page lets only its own script run; for the driver that is lifted.
        page = re.sub(r"<meta http-equiv[^>]*>", "", page)
        parts = "".join(f"{step};\n" for step in steps[:-1])
        driver = f"{DRIVER}{parts}const told = JSON.stringify({steps[-1]});"
        tell = "document.documentElement.innerHTML = '<pre></pre>'; one('pre').textContent = told;"
        found = dump(
            f"{page}<script>addEventListener('load', () => {{ {driver} {tell} }})</script>"
        )
        return json.loads(unescape(re.search("<pre>(.*)</pre>", found, re.S)[1]))

    value.dump = dump
    return value


def histogram(median):
    """Three bins; nothing is said of values beyond them."""
    return Histogram((0.5, 0.0, 0.5), (-1.0, 0.0, 1.0, 2.0), median)


SHEET = Sheet(
    "A model",
    ("layer", "C", "range", "-1 2", "uses"),
    [
        ("stem", "64", "-0.5…1", histogram(3.0), "batch"),
        *((f"body.{i}.bn", str(8 + i), f"{i}e-05…1", histogram(-i), "running") for i in range(11)),
        ("head", "", "-", "", ""),
    ],
    [
        finding("never-trained", "stem"),
        finding("never-trained", HOSTILE),
        *(finding("stats-var-tiny", f"body.{i}.bn", f"{i + 1} are tiny.") for i in range(6)),
    ],
    "13 layers.",
    legend="C: channels",
)
BODY = [f"{i}.bn" for i in range(11)]


def reports(model):
    """One of each, with something to say."""
    before, moved = snapshot(model, tensors="norm"), copy.deepcopy(model)
    moved.stem[1].running_mean += 1
    yield inspect(model)
    yield inspect(model.state_dict())
    yield diff(model, moved)
    yield verify(moved, before)
    yield freeze(model, {"stem": "fused", "backbone.0": "stats"})


class Outline(HTMLParser):
    """The elements of a page: which are open, which were seen, and where they lead."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)


def test_every_report_is_a_page_and_a_fragment_that_fetch_nothing(model, tmp_path):
    for report in reports(model):
        report.save_html(tmp_path / "report.html")
        page, fragment = (tmp_path / "report.html").read_text("utf-8"), report._repr_html_()
        for text in (page, fragment):
            outline = Outline(text)
            assert outline.tags.count("script") == 1
            assert outline.links == []
            assert not re.search(r"url\(|@import", text)
            assert escape(report.sheet().verdict) in text
        assert page.startswith("<!doctype html>")
        assert "default-src 'none'" in page


def test_rules_of_a_fragment_reach_no_further_than_the_report():
    style = re.search("<style>(.*)</style>", html.fragment(SHEET), re.S)[1]
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.S)
    depth, outer = 0, ""
    for char in style:
        outer += char if depth == 0 else ""
        depth += (char == "{") - (char == "}")
    rules = [rule.strip(" {}\n") for rule in outer.split("{")]
    assert all(".bnfreeze" in rule for rule in rules if rule)


def test_names_are_never_markup():
    sheet = Sheet(HOSTILE, ("layer", HOSTILE), [(HOSTILE, HOSTILE), (HOSTILE,)], [], HOSTILE)
    for text in (html.page([sheet]), html.fragment(sheet)):
        assert Outline(text).tags.count("script") == 1
        assert Outline(text).tags.count("img") == 0
        assert not re.search("[\u202e\x1b]", text)


def test_a_finding_says_what_it_means():
    assert escape(finding_kind("never-trained").why) in html.page([SHEET])


def test_a_browser_runs_the_page_as_it_is(browser):
    shown = browser.dump(html.page([SHEET, SHEET]))
    assert shown.count('type="search"') == 2
    assert "<title>bnfreeze: A model" in shown
    assert "<script>document.title" not in shown


def test_several_reports_of_a_notebook_work_side_by_side(browser):
    found = browser(
        "<!doctype html><body>" + html.fragment(SHEET) * 2,
        "const [left, right] = all('table')",
        "all('thead button', right)[1].click()",
        "[all('input').length, left.className, right.className]",
    )
    assert found == [2, "", "flat"]


def test_layers_that_were_sorted_are_no_tree():
    rows = [(f"body.{i}", "1") for i in (3, 1, 0, 2)]
    sheet = Sheet("", ("layer", "C"), rows, [], "", outlined=False)
    assert "branch" not in html.page([sheet]).split("<body>")[1].split("<script>")[0]


def test_a_browser_sorts(browser):
    order = browser(
        html.page([SHEET]),
        "const found = {tree: seen()}",
        "click('thead button', 'C'); found.up = seen()",
        "found.mark = one('thead th:nth-child(2)').getAttribute('aria-sort')",
        "click('thead button', 'C'); found.down = seen()",
        "click('thead button', 'C'); found.again = seen()",
        "click('thead button', 'layer'); found.names = seen()",
        "click('thead button', 'range'); found.range = seen()",
        "one('thead .axis button').click(); found.median = seen()",
        "found",
    )
    body = [f"body.{i}.bn" for i in range(11)]
    assert order["tree"] == order["again"] == ["stem", "body", *BODY, "head"]
    assert order["up"] == [*body, "stem", "head"]  # an empty cell is last
    assert order["mark"] == "ascending"
    assert order["down"] == ["stem", *reversed(body), "head"]
    assert order["names"] == [*body, "head", "stem"]  # 10 after 9
    assert order["range"] == ["stem", *body, "head"]
    assert order["median"] == [*reversed(body), "stem", "head"]


def test_a_browser_filters(browser):
    rows = browser(
        html.page([SHEET]),
        "const found = []",
        "for (const text of ['body.1', 'RUNNING body.7', 'batch', 'nothing', '']) {"
        "  type(text); found.push([seen(), one('output').textContent]) }",
        "found",
    )
    assert rows[0] == [["body", "1.bn", "10.bn"], "2 of 13"]
    assert rows[1] == [["body", "7.bn"], "1 of 13"]
    assert rows[2] == [["stem"], "1 of 13"]
    assert rows[3] == [[], "0 of 13"]
    assert rows[4] == [["stem", "body", *BODY, "head"], ""]


def test_a_browser_folds(browser):
    nested = [(f"{key}:",) if part is None else (f"{part}.{i}.bn", "1") for key in "ab"
              for part, i in [(None, 0), *(("x", i) for i in range(4)), ("y", 0)]]  # fmt: skip
    rows = browser(
        html.page([Sheet("two", ("layer", "C"), nested, [], "")]),
        "const found = [seen()]",
        "click('tbody button', 'x'); found.push(seen())",
        "click('tbody button', 'a:'); found.push(seen())",
        "type('x.1'); found.push(seen()); type('')",
        "click('.tools button', 'Unfold all'); found.push(seen())",
        "click('.tools button', 'Fold all'); found.push(seen())",
        "found.push(all('tbody button').map(x => x.getAttribute('aria-expanded')))",
        "found",
    )
    one = ["x", "0.bn", "1.bn", "2.bn", "3.bn", "y.0.bn"]
    assert rows[0] == ["a:", *one, "b:", *one] == rows[4]
    assert rows[1] == ["a:", "x", "y.0.bn", "b:", *one]
    assert rows[2] == ["a:", "b:", *one]
    assert rows[3] == ["a:", "x", "1.bn", "b:", "x", "1.bn"]  # what is found is shown
    assert rows[5] == ["a:", "b:"]
    assert set(rows[6]) == {"false"}


def test_a_bar_says_what_is_in_it(browser):
    bars = browser(
        html.page([SHEET]),
        "all('tbody tr:first-child rect').map(x => [x.textContent, x.getBBox().width])",
    )
    assert bars == [["-1 to 0: 50%", 1], ["1 to 2: 50%", 1]]


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_on_a_phone_and_in_the_dark(browser, dark):
    """The page stands in a frame as wide as a phone."""
    inner = re.sub(r"<meta http-equiv[^>]*>", "", html.page([SHEET]))
    if dark:
        inner = inner.replace("(prefers-color-scheme: dark)", "all")
    frame = f'<iframe style="width:360px;height:800px" srcdoc="{escape(inner)}"></iframe>'
    wide, colours = browser(
        f"<!doctype html><body>{frame}",
        "const inside = one('iframe').contentDocument",
        "const style = x => one('iframe').contentWindow.getComputedStyle(x)",
        "const cell = all('tbody td', inside)[0]",
        "[inside.documentElement.scrollWidth, [style(inside.documentElement).backgroundColor, "
        "style(cell).color]]",
    )
    assert wide <= 360
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 384 for colour in colours]
    assert light == ([False, True] if dark else [True, False])


def test_the_page_of_a_large_model_is_small(tmp_path):
    layers = nn.ModuleDict(
        {f"layer{i}": nn.ModuleList([nn.BatchNorm2d(64) for _ in range(13)]) for i in range(4)}
    )
    for number, layer in enumerate(layers.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 1 + number)
            layer.running_var.uniform_(0.1, 2 + number)
    inspect(layers.state_dict()).save_html(tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 300_000
