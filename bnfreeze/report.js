// Sorts, filters and folds the table of each report. Without it, the table is whole.
"use strict";
for (const report of document.querySelectorAll(".bnfreeze:not([data-ready])")) {
  report.dataset.ready = "";
  const table = report.querySelector("table");
  if (!table) continue;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const isBranch = row => row.classList.contains("branch");
  const depth = row => Number(row.dataset.depth || 0);
  const leaves = rows.filter(row => !isBranch(row)), branches = rows.filter(isBranch);
  const create = (name, text = "") =>
    Object.assign(document.createElement(name), {textContent: text});
  const short = new Map(leaves.map(row => [row, row.cells[0].textContent]));
  const full = row => row.cells[0].dataset.name ?? short.get(row);
  const value = (row, i) => i ? row.cells[i].dataset.value ?? row.cells[i].textContent : full(row);
  const words = new Map(leaves.map(row =>
    [row, heads.map((_, i) => value(row, i)).join(" ").toLowerCase()]));
  const natural = new Intl.Collator("en", {numeric: true});
  const closed = new Set();
  let column = 0, order = "none";

  const tools = create("div"), filter = create("input"), fold = create("button"),
    count = create("output");
  tools.className = "tools";
  filter.type = "search";
  filter.placeholder = "Filter";
  filter.setAttribute("aria-label", "Show the rows with these words only");
  count.className = "dim";
  tools.append(filter, ...(branches.length ? [fold] : []), count);
  table.parentElement.before(tools);

  function sorted() {
    if (order === "none") return rows;
    const isNumber = column > 0 && leaves.every(row => /^([-+\u2013]?$|[-+]?\.?\d)/.test(
      value(row, column)));
    const keys = new Map(leaves.map(row => {
      const text = value(row, column);
      return [row, /^[-\u2013]?$/.test(text) ? null : isNumber ? parseFloat(text) : text];
    }));
    const sign = order === "ascending" ? 1 : -1;
    return [...leaves].sort((one, other) => {
      const a = keys.get(one), b = keys.get(other);
      if (a === null || b === null) return (a === null) - (b === null);  // empty cells are last
      return sign * (isNumber ? a - b : natural.compare(a, b));
    });
  }

  function draw() {
    const wanted = filter.value.toLowerCase().split(/\s+/);
    const flat = order !== "none", filtered = filter.value.trim() !== "";
    for (const row of leaves) {
      row.hidden = !wanted.every(word => words.get(row).includes(word));
      row.cells[0].textContent = flat ? full(row) : short.get(row);
    }
    count.textContent = filtered
      ? `${leaves.filter(row => !row.hidden).length} of ${leaves.length}` : "";
    let below = -1;  // the depth of the shown row that comes next
    for (const row of [...rows].reverse()) {
      if (isBranch(row)) row.hidden = flat || below <= depth(row);
      if (!row.hidden) below = depth(row);
    }
    let shut = Infinity;
    for (const row of flat || filtered ? [] : rows) {
      if (depth(row) <= shut) shut = closed.has(row) ? depth(row) : Infinity;
      else row.hidden = true;
    }
    for (const row of branches)
      row.querySelector("button").setAttribute("aria-expanded", filtered || !closed.has(row));
    fold.textContent = closed.size ? "Unfold all" : "Fold all";
    fold.disabled = flat || filtered;
    table.classList.toggle("flat", flat);
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === column ? order : "none"));
    body.replaceChildren(...sorted(), ...(flat ? branches : []));
  }

  heads.forEach((head, i) => {
    const button = create("button");
    button.append(...head.childNodes);
    button.title = "Sort";
    head.append(button);
    button.onclick = () => {
      const next = {none: "ascending", ascending: "descending", descending: "none"};
      order = i === column ? next[order] : "ascending";
      column = i;
      draw();
    };
  });
  for (const row of branches) {
    const head = row.cells[0], button = create("button", head.textContent);
    head.replaceChildren(button);
    button.onclick = () => {
      if (!closed.delete(row)) closed.add(row);
      draw();
    };
  }
  fold.onclick = () => {
    if (closed.size) closed.clear();
    else branches.forEach(row => closed.add(row));
    draw();
  };
  filter.oninput = draw;
  draw();
}
