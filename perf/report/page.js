"use strict";
// Filters, themes, tooltips for touch screens and downloads. Texts of saved runs reach the document only through textContent.
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const NAMES = { model: "Model", gpu: "GPU", batch: "Batch", torch: "torch", attention: "Attention" };
  const hidden = Object.fromEntries(Object.keys(NAMES).map((name) => [name, new Set()]));
  const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
  const isNarrow = () => window.innerWidth < 600;

  function update() {
    const shown = DATA.facets.map((facets) => Object.keys(NAMES).every((name) => !hidden[name].has(facets[name])));
    // A mark needs all of its results (a line, both ends), a legend entry any of them.
    for (const mark of all("[data-facets]"))
      mark.toggleAttribute("hidden", !mark.dataset.facets.split(" ").every((number) => shown[number]));
    for (const entry of all("[data-legend]"))
      entry.toggleAttribute("hidden", !entry.dataset.legend.split(" ").some((number) => shown[number]));
    for (const figure of all("[data-chart]")) figure.hidden = !figure.querySelector("[data-facets]:not([hidden])");
    for (const section of all("[data-charts]"))
      section.querySelector(".nothing").hidden = Boolean(section.querySelector("[data-chart]:not([hidden])"));
  }

  function buildFilters() {
    for (const name of Object.keys(NAMES)) {
      const values = [...new Set(DATA.facets.map((facets) => facets[name]))];
      const set = document.createElement("fieldset");
      set.appendChild(document.createElement("legend")).textContent = NAMES[name];
      for (const value of values.sort((a, b) => a.localeCompare(b, "en", { numeric: true }))) {
        const label = set.appendChild(document.createElement("label"));
        const box = label.appendChild(document.createElement("input"));
        label.className = "chip";
        Object.assign(box, { type: "checkbox", checked: true, name, value });
        label.append(value);
        box.addEventListener("change", () => { box.checked ? hidden[name].delete(value) : hidden[name].add(value); update(); });
      }
      document.querySelector("#filters .sets").appendChild(set);
    }
    document.getElementById("all").addEventListener("click", () => {
      for (const box of all("#filters input")) { box.checked = true; hidden[box.name].clear(); }
      update();
    });
    if (isNarrow()) document.querySelector("#filters details").open = false;
  }

  function theme() {
    const button = document.getElementById("theme"), system = window.matchMedia("(prefers-color-scheme: dark)");
    const set = (dark) => {
      document.documentElement.dataset.theme = dark ? "dark" : "light";
      button.textContent = dark ? "Light" : "Dark";
      button.setAttribute("aria-label", dark ? "Use light colours" : "Use dark colours");
    };
    set(system.matches);
    system.addEventListener("change", (event) => set(event.matches));
    button.addEventListener("click", () => set(document.documentElement.dataset.theme !== "dark"));
  }

  async function download(raw) {
    const bytes = Uint8Array.from(atob(raw.gzip), (character) => character.charCodeAt(0));
    let blob = new Blob([bytes], { type: "application/gzip" }), name = raw.name + ".gz";
    if (window.DecompressionStream) {
      blob = await new Response(blob.stream().pipeThrough(new DecompressionStream("gzip"))).blob();
      name = raw.name;
    }
    const link = document.createElement("a");
    Object.assign(link, { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    return blob.text ? blob.text() : null;
  }

  for (const button of all("button[data-raw]")) button.addEventListener("click", () => download(DATA.raw[Number(button.dataset.raw)]));
  for (const figure of all("[data-chart]")) // a finger has no hover: a tap shows the tooltip below the chart
    figure.addEventListener("click", (event) => {
      const title = event.target.closest("g:has(> title)")?.querySelector("title");
      figure.querySelector("output").textContent = title ? title.textContent : "";
    });
  buildFilters();
  theme();
  update();
  window.report = { data: DATA, download };
})();
