"use strict";
// Search, filters, sorting, comparison of two rows, downloads and themes. Texts of saved runs reach the document only
// through textContent. The state is in the fragment of the address, such as #gpu=A100&q=sdpa&sort=time&a=3&b=5.
(() => {
  const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
  const element = (id) => document.getElementById(id);
  const made = (name, text = "", parent = null, attributes = {}) => {
    const node = Object.assign(document.createElement(name), attributes);
    node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const DATA = JSON.parse(element("data").textContent);
  const FACETS = { model: "Model", gpu: "GPU", batch: "Batch", torch: "torch", attention: "Attention" };
  const ORDER = ["INVALID", "SLOWER", "INCONCLUSIVE", "FASTER", "SAME", ""];
  const hidden = Object.fromEntries(Object.keys(FACETS).map((name) => [name, new Set()]));
  const rows = all("tr[data-row]");
  const state = { q: "", sort: "", picked: [] };

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  let parts = null;
  const more = async () => (parts ??= JSON.parse(await unpacked(DATA.packed)));

  // --- filters, search and the address
  function update() {
    const shown = DATA.facets.map((facets) => Object.keys(FACETS).every((name) => !hidden[name].has(facets[name])));
    // A mark needs all of its results (a line, both ends), a legend entry any of them.
    for (const mark of all("[data-facets]"))
      mark.toggleAttribute("hidden", !mark.dataset.facets.split(" ").every((number) => shown[number]));
    for (const entry of all("[data-legend]"))
      entry.toggleAttribute("hidden", !entry.dataset.legend.split(" ").some((number) => shown[number]));
    for (const figure of all("[data-chart]:has([data-facets])"))
      figure.hidden = !figure.querySelector("[data-facets]:not([hidden])");
    for (const section of all("[data-charts]"))
      section.querySelector(".nothing").hidden = Boolean(section.querySelector("[data-chart]:not([hidden])"));
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      if (!words.every((word) => text.includes(word))) row.hidden = true;
      if (row.nextElementSibling?.matches(".detail")) row.nextElementSibling.hidden = row.hidden;
    }
    for (const table of all("table.results"))  {
      let note = table.nextElementSibling;
      while (!note.matches(".nothing")) note = note.nextElementSibling;
      note.hidden = Boolean(table.querySelector("tr[data-row]:not([hidden])"));
      if (words.length) table.classList.add("all"); // a match is never folded away
    }
    const count = Object.values(hidden).filter((values) => values.size).length;
    element("active").textContent = count ? ` (${count} active)` : "";
    remember();
  }

  function remember(at) {
    const parameters = new URLSearchParams();
    for (const [name, values] of Object.entries(hidden))
      for (const value of values) parameters.append(`not-${name}`, value);
    if (state.q) parameters.set("q", state.q);
    if (state.sort) parameters.set("sort", state.sort);
    state.picked.forEach((row, place) => parameters.set("ab"[place], row.id));
    if (at) parameters.set("at", at);
    const text = parameters.toString();
    if (text !== location.hash.slice(1)) history.replaceState(null, "", text ? `#${text}` : "#");
  }

  function buildFilters() {
    for (const name of Object.keys(FACETS)) {
      const values = [...new Set(DATA.facets.map((facets) => facets[name]))];
      if (values.length < 2) continue;
      const set = made("fieldset", "", document.querySelector("#filters .sets"));
      made("legend", FACETS[name], set);
      for (const value of values.sort((a, b) => a.localeCompare(b, "en", { numeric: true }))) {
        const label = made("label", "", set, { className: "value" });
        const box = made("input", "", label, { type: "checkbox", checked: true, name, value });
        label.append(value);
        box.addEventListener("change", () => { box.checked ? hidden[name].delete(value) : hidden[name].add(value); update(); });
      }
    }
    element("filters").hidden = !document.querySelector("#filters input");
    element("all").addEventListener("click", () => {
      for (const box of all("#filters input")) { box.checked = true; hidden[box.name].clear(); }
      element("search").value = state.q = "";
      update();
    });
    element("link").addEventListener("click", () => navigator.clipboard?.writeText(location.href));
    element("search").addEventListener("input", (event) => { state.q = event.target.value; update(); });
  }

  function restore() {
    if (!location.hash.includes("=")) return reveal(location.hash.slice(1));
    const parameters = new URLSearchParams(location.hash.slice(1));
    for (const box of all("#filters input"))
      if (parameters.getAll(`not-${box.name}`).includes(box.value)) { box.checked = false; hidden[box.name].add(box.value); }
    element("search").value = state.q = parameters.get("q") ?? "";
    const column = parameters.get("sort");
    if (column) sort(column.replace("-", ""), column.startsWith("-"));
    for (const name of "ab") {
      const row = element(parameters.get(name) ?? "");
      if (row?.dataset.row) { row.querySelector(".pick input").checked = true; state.picked.push(row); }
    }
    return reveal(parameters.get("at"));
  }

  function reveal(id) { // open what contains the target, and mark a row
    const target = id && element(id);
    if (!target) return;
    target.closest("table")?.classList.toggle("all", target.matches(".late") || target.closest("table").matches(".all"));
    if (target.matches("details")) target.open = true;
    for (const row of rows) row.classList.toggle("at", row === target);
    target.scrollIntoView({ block: "center" });
  }

  // --- sorting
  function sort(column, descending) {
    state.sort = (descending ? "-" : "") + column;
    const value = (row) => {
      const cell = row.cells[[...row.closest("table").tHead.rows[0].cells].findIndex((head) => head.dataset.sort === column)];
      const text = cell.dataset.v;
      return column === "id" ? text : column === "verdict" ? ORDER.indexOf(text) : text === "" ? NaN : Number(text);
    };
    for (const table of all("table.results")) {
      for (const head of all("th[data-sort]", table))
        head.setAttribute("aria-sort", head.dataset.sort !== column ? "none" : descending ? "descending" : "ascending");
      const sign = descending ? -1 : 1;
      const entries = all("tr[data-row]", table).map((row) => [value(row), row, row.nextElementSibling]);
      entries.sort(([a], [b]) => {
        if (column === "id") return sign * a.localeCompare(b, "en", { numeric: true });
        return Number.isNaN(a) - Number.isNaN(b) || sign * (a - b) || 0; // unknown values last in both directions
      });
      entries.forEach(([, row, detail], place) => {
        row.classList.toggle("late", place >= entries.length - all(".late", table).length && row.matches(".late"));
        table.tBodies[0].append(row, ...(detail?.matches(".detail") ? [detail] : []));
      });
      if (table.querySelector(".late")) table.classList.add("all");
    }
  }

  function buildSorting() {
    for (const head of all("th[data-sort]")) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        sort(head.dataset.sort, head.getAttribute("aria-sort") === "ascending");
        remember();
      });
    }
  }

  // --- details of a row
  function list(values) {
    const terms = document.createElement("dl");
    for (const [name, value] of values) {
      const pair = made("div", "", terms, { className: value.length > 90 ? "long" : "" });
      made("dt", name, pair);
      const text = made("dd", "", pair);
      if (name === "commit" && DATA.repository && /^[0-9a-f]{7,40}$/.test(value))
        made("a", value, text, { href: `${DATA.repository}/commit/${value}`, rel: "noreferrer" });
      else made(name === "command" ? "pre" : "span", value, text);
    }
    return terms;
  }

  async function toggle(row) {
    const button = row.querySelector(".open"), open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) {
      if (row.nextElementSibling?.matches(".detail")) row.nextElementSibling.remove();
      return;
    }
    const detail = document.createElement("tr"), cell = document.createElement("td");
    detail.className = "detail";
    cell.colSpan = row.cells.length;
    cell.append(list((await more()).details[Number(row.dataset.row)]));
    detail.append(cell);
    if (button.getAttribute("aria-expanded") === "true") row.after(detail);  // not closed meanwhile
  }

  // --- comparison of two rows
  async function compare() {
    for (const row of rows) row.classList.toggle("picked", state.picked.includes(row));
    element("compare").hidden = state.picked.length < 2;
    if (state.picked.length < 2) return;
    const { records, details, pairs } = await more();
    const [i, j] = state.picked.map((row) => Number(row.dataset.row)), [first, second] = [records[i], records[j]];
    const body = document.querySelector("#compare .body");
    body.replaceChildren();
    made("p", sentence(first, second, pairs[`${i}-${j}`] ?? inverse(pairs[`${j}-${i}`])), body, { className: "answer" });
    const table = made("table", "", made("div", "", body, { className: "scroll" }));
    const head = made("tr", "", made("thead", "", table));
    for (const name of ["", first.configuration, second.configuration, "ratio of medians"]) made("th", name, head);
    const lines = made("tbody", "", table);
    const units = { seconds_per_image: [1000, "ms per image"], peak_bytes: [2 ** -20, "peak memory, MiB"], joules_per_image: [1, "J per image"], psnr_db: [1, "image, dB"], flops_fraction: [100, "% of peak FLOP/s"] };
    for (const name of Object.keys(first).filter((key) => key.endsWith("_seconds_per_image")))
      units[name] = [1000, `${name.split("_")[0]}, ms per image`];
    for (const [key, [factor, name]] of Object.entries(units)) {
      if (first[key] == null || second[key] == null) continue;
      const line = made("tr", "", lines);
      made("th", name, line);
      for (const record of [first, second]) made("td", (record[key] * factor).toPrecision(4), line, { className: "number" });
      made("td", key === "psnr_db" ? "" : (first[key] / second[key]).toFixed(3), line, { className: "number" });
    }
    const [ours, theirs] = [i, j].map((number) => new Map(details[number]));
    for (const name of ["command", "attention kernels", "device", "driver", "torch", "CUDA", "commit", "session"]) {
      if (ours.get(name) === theirs.get(name)) continue;
      const line = made("tr", "", lines);
      made("th", name, line);
      for (const [values, others] of [[ours, theirs], [theirs, ours]])
        made("td", only(values.get(name) ?? "unknown", others.get(name) ?? ""), line, { className: "text" });
      made("td", "", line);
    }
  }
  // The options of a command that the other does not have; other values whole.
  const only = (text, other) => {
    const options = (command) => command.split(/ (?=--)/).filter((option) => option.startsWith("--"));
    return text.includes(" --") ? options(text).filter((option) => !options(other).includes(option)).join(" ") : text;
  };
  const inverse = (ratio) => ratio && [1 / ratio[0], 1 / ratio[2], 1 / ratio[1]];

  function sentence(first, second, ratio) {
    const names = `${first.configuration} and ${second.configuration}`;
    if (`${first.marks} ${second.marks}`.includes("INVALID")) return `${names}: one of them is INVALID, so its time is no evidence.`;
    if (first.work !== second.work) return `${names} did different work (${first.work}; ${second.work}): their times are not comparable.`;
    const change = (value) => `${(100 * Math.abs(value - 1)).toFixed(1)} %`, side = (value) => (value > 1 ? "more" : "less");
    if (!ratio)
      return `${first.configuration} took ${change(first.seconds_per_image / second.seconds_per_image)} ${side(first.seconds_per_image / second.seconds_per_image)} time than ${second.configuration}, without an interval: ` +
        (first.session === second.session ? "too few launches." : "the sessions differ, and their rounds did not alternate.");
    const [estimate, low, high] = ratio, source = "from rounds of both that alternate in one session";
    if (low <= 1 && high >= 1)
      return `${names}: no difference is shown. The first took ${change(estimate)} ${side(estimate)} time, 95 % interval ${change(low)} less to ${change(high)} more, ${source}.`;
    const bounds = [low, high].map(change).sort((a, b) => parseFloat(a) - parseFloat(b)).join(" to ");
    return `${first.configuration} takes ${change(estimate)} ${side(estimate)} time than ${second.configuration} (95 % interval ${bounds}, ${source}).`;
  }

  function pick(row, box) {
    state.picked = state.picked.filter((other) => other !== row);
    if (box.checked) state.picked.push(row);
    if (state.picked.length > 2) state.picked.shift().querySelector(".pick input").checked = false;
    remember();
    return compare();
  }

  // --- downloads
  function save(blob, name) {
    const link = document.createElement("a");
    Object.assign(link, { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  async function records(table) { // the visible rows, in their order
    const visible = all("tbody tr:not([hidden]):not(.detail)", table);
    if (table.matches(".results")) {
      const known = (await more()).records;
      return visible.map((row) => known[Number(row.dataset.row)]);
    }
    const names = all("thead th", table).map((head) => head.textContent);
    return visible.map((row) => Object.fromEntries([...row.cells].map((cell, place) => [names[place], cell.textContent])));
  }

  function csv(values) { // a leading sign of a text would be a formula in a spreadsheet
    const cell = (value) => {
      const text = value == null ? "" : typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const names = Object.keys(values[0] ?? {});
    return [names, ...values.map((value) => names.map((name) => value[name]))].map((line) => line.map(cell).join(",")).join("\n") + "\n";
  }

  async function exported(button) {
    const table = all("table").find((one) => button.compareDocumentPosition(one) & Node.DOCUMENT_POSITION_FOLLOWING);
    const values = await records(table), kind = button.dataset.save;
    const text = kind === "csv" ? csv(values) : JSON.stringify(values, null, 1);
    const name = (table.dataset.work ?? table.dataset.name).replace(/[^A-Za-z0-9.]+/g, "-").replace(/^-|-$/g, "");
    save(new Blob([text], { type: kind === "csv" ? "text/csv" : "application/json" }), `${name}.${kind}`);
    return text;
  }

  async function download(raw) {
    const text = await unpacked(raw.gzip);
    save(new Blob([text], { type: "application/json" }), raw.name);
    return text;
  }

  // --- themes, charts and printing
  function theme() {
    const button = element("theme"), system = window.matchMedia("(prefers-color-scheme: dark)");
    const set = (dark) => {
      document.documentElement.dataset.theme = dark ? "dark" : "light";
      button.textContent = dark ? "Light" : "Dark";
      button.setAttribute("aria-label", dark ? "Use light colours" : "Use dark colours");
    };
    set(system.matches);
    system.addEventListener("change", (event) => set(event.matches));
    button.addEventListener("click", () => set(document.documentElement.dataset.theme !== "dark"));
  }

  function unfold(open = true) { for (const section of all("details.section")) section.open = open; }

  for (const figure of all("[data-chart]")) // a finger has no hover: a tap shows the tooltip below the chart
    figure.addEventListener("click", (event) => {
      const title = event.target.closest("g:has(> title)")?.querySelector("title");
      figure.querySelector("output").textContent = title ? title.textContent : "";
    });
  // The address keeps its filters when a link leads to a row or a section.
  document.addEventListener("click", (event) => {
    const term = event.target.closest("abbr[title], .chip[title]");
    element("hint").hidden = !term; // a finger has no hover
    if (term) element("hint").textContent = term.title;
    const link = event.target.closest("a[href^='#']");
    if (!link) return;
    event.preventDefault();
    const id = link.getAttribute("href").slice(1);
    reveal(id);
    remember(id);
  });
  for (const row of rows) {
    row.querySelector(".open").addEventListener("click", () => toggle(row));
    row.querySelector(".pick input").addEventListener("change", (event) => pick(row, event.target));
  }
  for (const button of all("[data-more]"))
    button.addEventListener("click", () => {
      let table = button.parentElement;
      while (!table.matches("table")) table = table.previousElementSibling;
      table.classList.add("all");
      button.parentElement.hidden = true;
    });
  for (const button of all("button[data-raw]")) button.addEventListener("click", () => download(DATA.raw[Number(button.dataset.raw)]));
  for (const button of all("button[data-save]")) button.addEventListener("click", () => exported(button));
  element("unfold").addEventListener("click", () => unfold());
  element("uncompare").addEventListener("click", () => {
    for (const row of state.picked) row.querySelector(".pick input").checked = false;
    state.picked = [];
    remember();
    compare();
  });
  window.addEventListener("beforeprint", () => {
    unfold();
    for (const image of all("img[loading]")) image.loading = "eager";
  });
  buildFilters();
  buildSorting();
  theme();
  restore();
  update();
  window.report = { data: DATA, download, exported, more, ready: compare() };
})();
