"use strict";
(() => {
  const table = document.getElementById("settings");
  const body = table.tBodies[0];
  const lines = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const shown = document.getElementById("shown");
  const filter = document.getElementById("filter");

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

  function sieve() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const line of lines) {
      const text = [...line.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      line.hidden = !words.every((word) => text.includes(word));
      count += line.hidden ? 0 : 1;
    }
    shown.textContent = `${count} of ${lines.length} lines`;
  }

  filter.addEventListener("input", sieve);
  sieve();
})();
