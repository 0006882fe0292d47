"""Write the page of each finding, docs/findings/*.md, from bnfreeze/findings.md.

    python docs/make_findings.py

A test says so when a page and the registry differ.
"""

from pathlib import Path

from bnfreeze.findings import KINDS, PAGES

FOLDER = Path(__file__).parent / "findings"


def pages() -> dict[str, str]:
    """The text of each page, by the name of its file."""
    rows = "".join(
        f"| [`{kind.code}`]({kind.code}.md) | {', '.join(kind.levels)} | {kind.title} |\n"
        for kind in KINDS.values()
    )
    index = (
        "# Findings\n\n"
        "A finding is something that you should know about a model or a checkpoint. "
        "`inspect`, `freeze`, `diff` and `probe` report them, each with a level, a code that does "
        "not "
        "change, the layer's name, and how to mend it. "
        "An `error` makes `inspection.ok` false and the command's exit code 1.\n\n"
        "`bnfreeze explain CODE` shows the same text in a terminal.\n\n"
        "A code says first what it is about (`stats-`, `affine-`, `layer-`, `model-`, "
        "`optimizer-`), and then what is wrong with it.\n\n"
        f"| code | level | what was found |\n| --- | --- | --- |\n{rows}"
    )
    return {"index.md": index, **{f"{code}.md": page for code, page in PAGES.items()}}


if __name__ == "__main__":
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
