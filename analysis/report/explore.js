"use strict";
// The page's interactive part. Its state (link, task, axes, what is isolated, what is filtered) stands in the address behind #.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const unique = (values) => [...new Set(values)];
  const links = unique(data.points.map((p) => p.link));
  const tasks = unique(data.points.map((p) => p.task));
  const names = unique(data.points.map((p) => p.setting));
  const times = data.measures.filter((m) => m.time);
  const qualities = data.measures.filter((m) => !m.time);
  const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#17BECF", "#BCBD22"];
  const SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"];

  const state = { link: links[0], task: tasks[0], x: (times[0] || {}).name || "bytes", y: (qualities[0] || {}).name, only: [], filter: "" };
  for (const [key, value] of new URLSearchParams(location.hash.slice(1)))
    if (key === "only") state.only = value.split("\u001f").filter((name) => names.includes(name));
    else if (key in state) state[key] = value;
  const remember = () => {
    const out = new URLSearchParams();
    for (const key of ["link", "task", "x", "y", "filter"]) if (state[key]) out.set(key, state[key]);
    if (state.only.length) out.set("only", state.only.join("\u001f"));
    history.replaceState(null, "", "#" + out);
  };

  const node = (tag, text, more = {}) => Object.assign(document.createElement(tag), { textContent: text ?? "" }, more);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const theme = () => ({
    background: "transparent", font: "system-ui, sans-serif",
    axis: { labelColor: color("--text"), titleColor: color("--text"), gridColor: color("--line"), domainColor: color("--soft"), tickColor: color("--soft"), labelFontSize: 12, titleFontSize: 13 },
    legend: { labelColor: color("--text"), titleColor: color("--text") }, view: { stroke: null },
  });
  const draw = (where, spec) =>
    typeof vegaEmbed === "undefined" ? Promise.resolve(null)
      : vegaEmbed(where, { $schema: "", config: theme(), ...spec }, { renderer: "svg", actions: false })
          .then((made) => { where.querySelector("svg")?.setAttribute("aria-hidden", "true"); return made; });

  // What nothing else beats in both: sooner (or smaller) and better.
  const front = (points, x, y, more) => {
    const known = points.filter((p) => p[x] !== null && p[y] !== null);
    const better = (a, b) => (more ? a >= b : a <= b);
    return known.filter((p) => !known.some((q) => q !== p && q[x] <= p[x] && better(q[y], p[y]) && (q[x] < p[x] || q[y] !== p[y])))
      .sort((a, b) => a[x] - b[x]);
  };
  const shown = (value, digits = 3) => (value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, 3) }));
  const span = (p, name) => `${shown(p[name])}${p[name + "_lo"] === null || p[name + "_lo"] === undefined ? "" : ` [${shown(p[name + "_lo"])}, ${shown(p[name + "_hi"])}]`}`;

  const titles = { bytes: "payload (bytes)", ...Object.fromEntries(data.measures.map((m) => [m.name, m.title])) };
  let view = null;
  function chart() {
    const where = byId("chart");
    const { x, y } = state;
    const points = data.points.filter((p) => p.link === state.link && p.task === state.task)
      .map((p) => ({ ...p, on: !state.only.length || state.only.includes(p.setting), xs: span(p, x), ys: span(p, y) }));
    const more = (data.measures.find((m) => m.name === y) || {}).more;
    const best = front(points, x, y, more);
    const tooltip = [["setting", "setting"], ["n", "n"], ["xs", titles[x]], ["ys", titles[y]], ["bytes", "payload (bytes)"], ["failed", "failed"]]
      .map(([field, title]) => ({ field, title, type: "nominal" }));
    const scale = { domain: names, range: names.map((_, i) => COLORS[i % COLORS.length]) };
    const shape = { domain: names, range: names.map((_, i) => SHAPES[i % SHAPES.length]) };
    const axis = (field, zero) => ({ field, type: "quantitative", title: titles[field], scale: { zero } });
    const faint = { condition: { test: "datum.on", value: 1 }, value: 0.12 };
    const bar = (low, high, across) => ({
      mark: { type: "rule", strokeWidth: 1.2 },
      transform: [{ filter: `isValid(datum['${low}']) && isValid(datum['${high}'])` }],
      encoding: { ...(across ? { x: { field: low, type: "quantitative" }, x2: { field: high }, y: axis(y, false) } : { x: axis(x, true), y: { field: low, type: "quantitative" }, y2: { field: high } }),
        color: { field: "setting", type: "nominal", scale, legend: null }, opacity: { condition: { test: "datum.on && datum.front", value: 0.7 }, value: 0 } },
    });
    const values = points.map((p, i) => ({ ...p, front: best.some((b) => b.setting === p.setting) }));
    const words = best.map((p) => `${p.setting} (${span(p, x)}; ${span(p, y)}; n ${p.n})`).join(", ");
    const description = `${titles[y]} against ${titles[x]} of ${points.length} settings on ${state.link}. Not beaten in both: ${words || "none"}.`;
    byId("front").textContent = best.length ? `Not beaten in both on ${state.link}: ${words}.` : "No setting has both.";
    return draw(where, {
      description, width: "container", height: 340, data: { values }, autosize: { type: "fit-x", contains: "padding" },
      layer: [
        { mark: { type: "line", strokeDash: [3, 3], color: color("--soft") }, data: { values: best }, encoding: { x: axis(x, true), y: axis(y, false), order: { field: x } } },
        bar(x + "_lo", x + "_hi", true), bar(y + "_lo", y + "_hi", false),
        { mark: { type: "point", filled: true, size: 110, cursor: "pointer" },
          encoding: { x: axis(x, true), y: axis(y, false), color: { field: "setting", type: "nominal", scale, legend: null }, shape: { field: "setting", type: "nominal", scale: shape, legend: null }, opacity: faint, tooltip } },
      ],
    }).then((made) => {
      made?.view.addEventListener("click", (_, item) => item?.datum?.setting && isolate(item.datum.setting));
      view = made?.view;
    });
  }
  byId("svg").addEventListener("click", async () => {
    if (view) node("a", "", { href: "data:image/svg+xml;charset=utf-8," + encodeURIComponent(await view.toSVG()), download: "explore.svg" }).click();
  });

  function legend() {
    const here = data.points.filter((p) => p.link === state.link && p.task === state.task).map((p) => p.setting);
    byId("legend").replaceChildren(...unique(here).map((name) => {
      const button = node("button", name, { type: "button" });
      const mark = node("span", "");
      mark.className = "mark";
      mark.style.background = COLORS[names.indexOf(name) % COLORS.length];
      button.prepend(mark);
      button.setAttribute("aria-pressed", String(state.only.includes(name)));
      button.addEventListener("click", () => isolate(name));
      return button;
    }));
  }

  function isolate(name) {
    state.only = state.only.includes(name) ? state.only.filter((other) => other !== name) : [...state.only, name];
    if (!name) state.only = [];
    refresh();
  }

  function gantt() {
    const select = byId("request");
    const own = data.spans.filter(([link]) => link === state.link);
    const wanted = state.only.length ? own.filter(([, setting]) => state.only.includes(setting)) : own;
    const before = select.value;
    select.replaceChildren(...(wanted.length ? wanted : own).map(([, setting]) => node("option", setting, { value: setting })));
    if ([...select.options].some((o) => o.value === before)) select.value = before;
    const one = own.find(([, setting]) => setting === select.value);
    byId("spans").hidden = !own.length;
    if (!one) return;
    const values = [...one[3]].sort((a, b) => a[5] - b[5]).map(([stage, side, chunk, level, bytes, start, end]) => ({ what: `${side} ${stage}`, stage, side, chunk, level, bytes, start, end, took: shown(end - start) }));
    const longest = [...values].sort((a, b) => b.end - b.start - (a.end - a.start))[0];
    const description = `The request with the median latency of ${select.value} on ${state.link}, question ${one[2]}: ${values.length} spans to ${shown(Math.max(...values.map((v) => v.end)))} s; the longest is ${longest.what}, ${longest.took} s.`;
    draw(byId("gantt"), {
      description, width: "container", height: 24 * unique(values.map((v) => v.what)).length, data: { values }, autosize: { type: "fit-x", contains: "padding" },
      mark: { type: "bar", stroke: color("--page"), height: { band: 0.8 } },
      encoding: {
        x: { field: "start", type: "quantitative", title: "seconds from the request's start" }, x2: { field: "end" },
        y: { field: "what", type: "nominal", sort: null, title: null },
        color: { field: "side", type: "nominal", scale: { domain: ["edge", "link", "cloud"], range: COLORS.slice(0, 3) }, legend: { orient: "top", title: null } },
        tooltip: ["what", "chunk", "level", "bytes", "start", "end", "took"].map((field) => ({ field, type: "nominal" })),
      },
    });
  }

  function examples() {
    const select = byId("example");
    const here = data.answers.filter(([link, task]) => link === state.link && task === state.task);
    const before = select.value;
    select.replaceChildren(...unique(here.map((row) => row[3])).map((id) => node("option", id, { value: id })));
    if ([...select.options].some((o) => o.value === before)) select.value = before;
    const [question, gold] = data.questions[`${state.task}\u001f${select.value}`] || ["", ""];
    byId("question").textContent = question;
    byId("gold").textContent = gold;
    byId("asked").hidden = !question;
    const rows = here.filter((row) => row[3] === select.value && (!state.only.length || state.only.includes(row[2])));
    const cells = rows.map(([, , setting, , score, ttft, answer, , error]) => {
      const line = node("tr");
      line.append(node("th", setting, { scope: "row" }), node("td", error ? `failed: ${error}` : answer), node("td", shown(score)), node("td", shown(ttft)));
      return line;
    });
    const full = node("tr");
    full.append(node("th", "the full cache, on one machine", { scope: "row" }), node("td", rows[0]?.[7]), node("td", ""), node("td", ""));
    byId("answers").tBodies[0].replaceChildren(full, ...cells);
  }

  const choose = (id, values, key, title = (v) => v) => {
    const select = byId(id);
    select.replaceChildren(...values.map((value) => node("option", title(value), { value })));
    if (!values.includes(state[key])) state[key] = values[0];
    select.value = state[key] ?? "";
    select.parentElement.hidden = values.length < 2;
    select.addEventListener("change", () => { state[key] = select.value; refresh(); });
  };
  choose("link", links, "link");
  choose("task", tasks, "task");
  choose("x", [...times.map((m) => m.name), "bytes"], "x", (v) => titles[v]);
  choose("y", qualities.map((m) => m.name), "y", (v) => titles[v]);
  // The address keeps what is looked at: a link within the page moves there, and leaves it.
  for (const link of document.querySelectorAll("nav a"))
    link.addEventListener("click", (event) => { event.preventDefault(); document.querySelector(link.getAttribute("href"))?.scrollIntoView(); });
  byId("everything").addEventListener("click", () => isolate(""));
  byId("request").addEventListener("change", gantt);
  byId("example").addEventListener("change", examples);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => refresh());

  function refresh() {
    remember();
    legend();
    byId("everything").hidden = !state.only.length;
    for (const line of byId("settings").tBodies[0].rows) line.classList.toggle("off", state.only.length > 0 && !state.only.includes(line.dataset.setting));
    if (state.y) chart();
    else byId("explore").hidden = true;
    gantt();
    examples();
  }
  window.report = { state, remember, isolate };
  refresh();
})();
