"use strict";
// Draws the charts of the page's own data. All texts come from saved runs: they reach the document through textContent,
// and plotly, which reads some markup, through plain().
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const DIMENSIONS = ["model", "gpu", "batch", "torch", "attention"];
  const NAMES = { model: "Model", gpu: "GPU", batch: "Batch", torch: "torch", attention: "Attention" };
  const VERDICT = { SLOWER: "triangle-up-open", FASTER: "triangle-down-open", SAME: "circle-open", INCONCLUSIVE: "diamond-open", INVALID: "x-open" };
  const hidden = Object.fromEntries(DIMENSIONS.map((name) => [name, new Set()]));
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const shown = (facets) => facets === null || DIMENSIONS.every((name, at) => !hidden[name].has(DATA.facets[facets][at]));
  // A roof alone, which no filter hides, is nothing to look at.
  const hasResults = (chart) => chart.series.some((series) => series.points.some((p) => p[4] !== null && shown(p[4])));
  const digits = (value) => Number(value.toPrecision(4)).toString();

  const isNarrow = () => window.innerWidth < 600;

  function look(series) {
    return DATA.looks[series.look] || { colour: "#7a7a7a", dash: "solid", marker: "circle", hatch: "" };
  }

  // A label in a few short lines. What is longer ends in an ellipsis: the whole of it is in the hover text and the tables.
  function wrapped(text, most = 22, lines = 3) {
    const found = [""];
    for (const word of text.split(/(?<=[-_+ ,])/).flatMap((one) => one.match(new RegExp(`.{1,${most}}`, "gu")) || [])) {
      if (found[found.length - 1] && (found[found.length - 1] + word).trimEnd().length > most) found.push("");
      found[found.length - 1] += word;
    }
    const kept = found.slice(0, lines).map((one) => one.trimEnd());
    if (found.length > lines) kept[lines - 1] = kept[lines - 1].slice(0, most - 1) + "…";
    return kept.map(plain).join("<br>");
  }

  // The places of a chart of bars that are shown, as its axis has them.
  function places(chart) {
    const there = new Set(chart.series.flatMap((series) => series.points.filter((p) => shown(p[4])).map((p) => String(p[0]))));
    return chart.places.length ? chart.places.filter((one) => there.has(one)) : [...there];
  }

  // On a phone bars whose labels have no room under them lie on their side, with the labels beside them.
  function lies(chart) {
    const labels = chart.scale === "category" ? places(chart) : [];
    return isNarrow() && labels.length * Math.max(0, ...labels.map((one) => one.length)) > 40;
  }

  // Bars beside each other share their place's width among those that stand there: others leave no gap.
  function slots(chart) {
    const counts = {}, done = {};
    for (const series of chart.series) for (const p of series.points) if (shown(p[4])) counts[p[0]] = (counts[p[0]] || 0) + 1;
    const most = Math.max(1, ...Object.values(counts)), width = 0.86 / most;
    return { width: width * 0.94, offset: (at) => {
      const place = done[at] = (done[at] ?? -1) + 1;
      return (place - counts[at] / 2 + 0.03) * width;
    } };
  }

  function traces(chart) {
    const made = [];
    const bars = chart.scale === "category", beside = bars && !chart.stacked ? slots(chart) : null;
    const own = new Set(chart.series.filter((one) => !one.faint && one.points.some((p) => shown(p[4]))).map((one) => one.look));
    for (const series of chart.series) {
      const points = series.points.filter((point) => shown(point[4]));
      if (!points.length) continue;
      const as = look(series);
      const xs = points.map((p) => (chart.scale === "time" ? new Date(p[0] * 1000).toISOString() : bars ? plain(p[0]) : p[0]));
      const trace = {
        name: plain(series.name), x: xs, hoverinfo: "text", customdata: points.map((p) => p[1]),
        hovertext: points.map((p) => plain(series.name) + "<br>" + digits(p[1]) +
          (p[2] === null ? "" : " [" + digits(p[2]) + ", " + digits(p[3]) + "]") + " " + plain(chart.y_label) + "<br>" + plain(p[5]).slice(0, 400)),
      };
      const known = points.some((p) => p[2] !== null);
      const whiskers = { type: "data", symmetric: false, thickness: 1.3, width: 3, color: bars ? colour("--ink") : as.colour,
        array: points.map((p) => (p[2] === null ? 0 : Math.max(0, p[3] - p[1]))),
        arrayminus: points.map((p) => (p[2] === null ? 0 : Math.max(0, p[1] - p[2]))) };
      if (known && series.form !== "curve" && !chart.stacked) trace.error_y = whiskers;
      if (bars) {
        Object.assign(trace, { type: "bar", opacity: series.faint ? 0.5 : 1, base: chart.stacked ? undefined : points.map((p) => p[6]),
          y: points.map((p) => p[1] - p[6]), marker: { color: as.colour, pattern: { shape: as.hatch, solidity: 0.25, fillmode: "overlay", fgcolor: "rgba(255,255,255,0.75)" } },
          showlegend: !(series.faint && own.has(series.look)) });
        if (beside) Object.assign(trace, { width: points.map(() => beside.width), offset: points.map((p) => beside.offset(p[0])) });
      } else {
        Object.assign(trace, { type: "scatter", y: points.map((p) => p[1]), marker: { color: as.colour, symbol: as.marker, size: 8 },
          line: { color: as.colour, dash: as.dash, width: series.form === "curve" ? 1.2 : 2 },
          mode: series.form === "markers" ? "markers" : series.form === "curve" ? "lines" : "lines+markers" });
      }
      made.push(trace);
      if (known && chart.stacked) made.push(asideWhiskers(chart, series, points, xs, whiskers));
      for (const [verdict, symbol] of Object.entries(VERDICT)) {
        const judged = points.map((p, i) => [p, xs[i]]).filter(([p]) => p[7] === verdict);
        if (judged.length) made.push({ type: "scatter", mode: "markers", name: verdict, legendgroup: verdict, hoverinfo: "skip",
          showlegend: !made.some((one) => one.name === verdict), x: judged.map((j) => j[1]), y: judged.map(([p]) => p[1]),
          marker: { symbol, size: 15, color: DATA.verdicts[verdict], line: { width: 2 } } });
      }
    }
    return made;
  }

  // The whiskers of a stack's pieces stand beside each other, for the ends of small pieces lie close together: they belong
  // to bars without height, at the end of each piece.
  function asideWhiskers(chart, series, points, xs, whiskers) {
    const count = chart.series.length, number = chart.series.indexOf(series), width = 0.8 / (count + 1);
    const under = chart.series.slice(0, number + 1).flatMap((one) => one.points.filter((p) => shown(p[4])));
    const ends = points.map((point) => under.filter((p) => p[0] === point[0]).reduce((sum, p) => sum + p[1], 0));
    return { type: "bar", name: plain(series.name), x: xs, y: ends.map(() => 0), base: ends, error_y: whiskers, hoverinfo: "skip",
      showlegend: false, width: ends.map(() => width), offset: ends.map(() => (number - count / 2) * width), marker: { color: "rgba(0,0,0,0)" } };
  }

  // The same chart on its side, a label having the pixels that its bars and lines need: 12 for each of several bars, 26 for one.
  function turned(chart, made, upright) {
    const labels = places(chart), counts = labels.map((label) => chart.stacked ? 1 : chart.series.reduce((sum, series) =>
      sum + series.points.filter((p) => String(p[0]) === label && shown(p[4])).length, 0));
    const most = Math.max(1, ...counts), scale = most === 1 ? 26 : 12 * most / 0.86, texts = labels.map((one) => wrapped(one));
    const middles = {};
    let height = 0;
    labels.forEach((label, at) => {
      const room = Math.max(most === 1 ? 26 : 12 * counts[at], 13 * texts[at].split("<br>").length) + 8;
      middles[plain(label)] = height + room / 2;
      height += room;
    });
    const data = made.map(({ x, y, error_y, width, offset, ...rest }) => ({ ...rest, x: y, y: x.map((one) => middles[one]), error_x: error_y,
      ...(rest.type === "bar" ? { orientation: "h", width: width ? width.map((one) => one * scale) : 22, offset: offset && offset.map((one) => one * scale) } : {}) }));
    const swap = { x0: "y0", x1: "y1", y0: "x0", y1: "x1", xref: "yref", yref: "xref" };
    const shapes = upright.shapes.map((one) => Object.fromEntries(Object.entries(one).map(([key, value]) => [swap[key] || key, value])));
    const annotations = upright.annotations.map(({ y, text, showarrow }) =>
      ({ x: y, text, showarrow, yref: "paper", y: 1, yanchor: "top", xanchor: "left", textangle: 90, font: { size: 10 } }));
    const { gridcolor, ...line } = upright.xaxis;
    return [data, { ...upright, shapes, annotations, xaxis: upright.yaxis, height: height + 110 + legendHeight(chart, made),
      yaxis: { ...line, type: "linear", title: undefined, showgrid: false, zeroline: false, range: [height, 0], fixedrange: true,
        tickmode: "array", tickvals: Object.values(middles), ticktext: texts, tickangle: 0, tickfont: { size: 10 } } }];
  }

  // A bar over its own name needs no legend.
  function alone(chart, made) {
    return made.length === 1 || (chart.scale === "category" && !chart.stacked && made.every((t) => t.x.length === 1 && t.x[0] === t.name));
  }

  function legendHeight(chart, made) {
    const width = Math.max(200, Math.min(window.innerWidth, 1280) / (isNarrow() ? 1 : 2) - 100);
    const listed = made.filter((trace) => trace.showlegend !== false).map((trace) => 50 + 7 * trace.name.length);
    return alone(chart, made) ? 0 : 21 * Math.ceil(listed.length / Math.max(1, Math.floor(width / Math.max(1, ...listed))));
  }

  function layout(chart, made) {
    const narrow = isNarrow();
    const ink = colour("--ink"), line = colour("--line");
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
    const type = { category: "category", linear: "linear", log: "log", time: "date" }[chart.scale];
    const shapes = [], annotations = [];
    for (const series of chart.series) {
      if (series.band && series.points.some((p) => shown(p[4]))) shapes.push({ type: "rect", xref: "paper", x0: 0, x1: 1,
        y0: series.band[0], y1: series.band[1], fillcolor: look(series).colour, opacity: 0.18, line: { width: 0 }, layer: "below" });
    }
    for (const [name, level] of chart.levels) {
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level, line: { color: ink, dash: "dash", width: 1 } });
      annotations.push({ xref: "paper", x: 1, xanchor: "right", yanchor: "bottom", y: chart.y_log ? Math.log10(level) : level, text: plain(name), showarrow: false });
    }
    chart.marks.forEach(([at, words], place) => {
      const x = chart.scale === "time" ? new Date(at * 1000).toISOString() : at;
      shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, line: { color: ink, dash: "dot", width: 1 } });
      if (chart.labelled.includes(place)) annotations.push({ x, yref: "paper", y: 1, yanchor: "top", xanchor: "left", textangle: 90, text: plain(words).slice(0, 60), showarrow: false, font: { size: 10 } });
    });
    const labels = chart.scale === "category" ? Math.min(160, 3 * Math.max(...places(chart).map((one) => one.length))) : 0;
    return {
      barmode: chart.stacked ? "stack" : "overlay", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: narrow ? 11 : 12 },
      height: (narrow ? 340 : 380) + legendHeight(chart, made) + labels, margin: { l: 56, r: 12, t: 28, b: 56 }, showlegend: !alone(chart, made), shapes, annotations,
      legend: { orientation: "h", maxheight: 0.9, yref: "container", y: 0, yanchor: "bottom", x: 0, xanchor: "left", font: { size: narrow ? 10 : 11 } },
      xaxis: { ...axis, type, title: { text: plain(chart.x_label), standoff: 8 }, rangemode: chart.scale === "linear" ? "tozero" : "normal",
        ...(chart.scale === "category" ? { categoryorder: "array", categoryarray: chart.places.map(plain), tickangle: "auto" } : {}) },
      yaxis: { ...axis, type: chart.y_log ? "log" : "linear", title: { text: narrow ? wrapped(chart.y_label, 40, 2) : plain(chart.y_label), standoff: 8 }, rangemode: chart.zero ? "tozero" : "normal" },
      hovermode: "closest", modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--faint") }, hoverlabel: { align: "left" },
    };
  }

  const drawn = new Set();
  function draw(number) {
    const place = Number(number);
    const figure = document.getElementById("chart-" + place), chart = DATA.charts[place];
    figure.classList.toggle("empty", !hasResults(chart));
    if (!hasResults(chart)) return;
    const made = traces(chart);
    const upright = layout(chart, made);
    const [data, how] = lies(chart) ? turned(chart, made, upright) : [made, upright];
    figure.querySelector(".plot").style.minHeight = how.height + "px"; // the page's own is for charts not drawn yet
    Plotly.react(figure.querySelector(".plot"), data, how,
      { displaylogo: false, responsive: true, displayModeBar: isNarrow() ? false : "hover",
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
    drawn.add(place);
  }

  const waiting = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { waiting.unobserve(entry.target); draw(Number(entry.target.dataset.chart)); }
  }, { rootMargin: "600px" });

  function update() {
    DATA.charts.forEach((chart, place) => {
      document.getElementById("chart-" + place).classList.toggle("empty", !hasResults(chart));
      if (drawn.has(place)) draw(place);
    });
    for (const row of document.querySelectorAll("[data-facets]")) row.hidden = !shown(Number(row.dataset.facets));
    for (const section of document.querySelectorAll("section[data-charts]"))
      section.querySelector(".nothing").hidden = Boolean(section.querySelector("figure:not(.empty)"));
  }

  function buildFilters() {
    const sets = document.querySelector("#filters .sets");
    DIMENSIONS.forEach((name, at) => {
      const values = [...new Set(DATA.facets.map((one) => one[at]))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      const set = document.createElement("fieldset");
      set.appendChild(document.createElement("legend")).textContent = NAMES[name];
      for (const value of values) {
        const label = set.appendChild(document.createElement("label"));
        label.className = "chip";
        const box = label.appendChild(document.createElement("input"));
        Object.assign(box, { type: "checkbox", checked: true, name, value });
        label.append(value);
        box.addEventListener("change", () => { box.checked ? hidden[name].delete(value) : hidden[name].add(value); update(); });
      }
      sets.appendChild(set);
    });
    document.getElementById("all").addEventListener("click", () => {
      for (const box of document.querySelectorAll("#filters input")) { box.checked = true; hidden[box.name].clear(); }
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
      for (const place of drawn) draw(place);
    };
    set(system.matches);
    system.addEventListener("change", (event) => set(event.matches));
    button.addEventListener("click", () => set(document.documentElement.dataset.theme !== "dark"));
  }

  async function download(raw) {
    const bytes = Uint8Array.from(atob(raw.gzip), (one) => one.charCodeAt(0));
    let blob = new Blob([bytes], { type: "application/gzip" }), name = raw.name + ".gz";
    if (window.DecompressionStream) {
      blob = await new Response(blob.stream().pipeThrough(new DecompressionStream("gzip"))).blob();
      name = raw.name;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    return blob.text ? blob.text() : null;
  }
  for (const button of document.querySelectorAll("button[data-raw]"))
    button.addEventListener("click", () => download(DATA.raw[Number(button.dataset.raw)]));

  window.matchMedia("(max-width: 599px)").addEventListener("change", () => { for (const place of drawn) draw(place); });
  buildFilters();
  theme();
  for (const figure of document.querySelectorAll("figure[data-chart]")) waiting.observe(figure);
  update();
  window.report = { data: DATA, draw, download };
})();
