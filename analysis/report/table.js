"use strict";
// The table of all settings: sorted by a heading, filtered by words and columns, copied, saved; a line isolates its setting.
(() => {
  const table = document.getElementById("settings");
  const body = table.tBodies[0];
  const lines = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const shown = document.getElementById("shown");
  const filter = document.getElementById("filter");
  const { state, remember, isolate } = window.report;

  function order(column, up) {
    const key = (line) => line.cells[column].dataset.key;
    const numeric = lines.every((line) => key(line) === "" || !Number.isNaN(Number(key(line))));
    lines.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // unknown comes last, either way
      const by = numeric ? Number(x) - Number(y) : x.localeCompare(y);
      return up ? by : -by;
    });
    body.append(...lines);
    heads.forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  }

  heads.forEach((head, i) =>
    head.firstElementChild.addEventListener("click", () => order(i, head.getAttribute("aria-sort") !== "ascending")));

  // A column of few words has a choice of them.
  const chosen = [];
  const row = table.tHead.insertRow();
  heads.forEach((head, i) => {
    const cell = row.insertCell();
    const words = [...new Set(lines.map((line) => line.cells[i].dataset.key))];
    if (words.length < 2 || words.length > 30 || words.every((word) => word === "" || !Number.isNaN(Number(word)))) return;
    const select = document.createElement("select");
    select.setAttribute("aria-label", `only this ${head.textContent}`);
    select.append(new Option("all", ""), ...words.map((word) => new Option(word, word)));
    select.addEventListener("change", sieve);
    chosen.push([i, select]);
    cell.append(select);
  });

  const seen = () => lines.filter((line) => !line.hidden);
  function sieve() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const line of lines) {
      const text = [...line.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      line.hidden = !words.every((word) => text.includes(word)) ||
        chosen.some(([i, select]) => select.value !== "" && line.cells[i].dataset.key !== select.value);
    }
    shown.textContent = `${seen().length} of ${lines.length} lines`;
    state.filter = filter.value;
    remember();
  }

  const text = (between, quoted) => [heads, ...seen().map((line) => [...line.cells])]
    .map((cells) => cells.map((cell) => quoted(cell.textContent.trim())).join(between)).join("\n") + "\n";
  document.getElementById("copy").addEventListener("click", async (event) => {
    const all = text("\t", (word) => word);
    try { await navigator.clipboard.writeText(all); event.target.textContent = "copied"; } catch { event.target.textContent = "the browser does not let it"; }
  });
  document.getElementById("csv").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(text(",", (word) => `"${word.replaceAll('"', '""')}"`));
    link.download = "settings.csv";
    link.click();
  });

  for (const line of lines) {
    line.tabIndex = 0;
    line.addEventListener("click", () => isolate(line.dataset.setting));
    line.addEventListener("keydown", (event) => event.key === "Enter" && isolate(line.dataset.setting));
  }
  filter.addEventListener("input", sieve);
  filter.value = state.filter;
  sieve();
})();
