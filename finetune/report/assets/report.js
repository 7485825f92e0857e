"use strict";
(() => {
  const panels = JSON.parse(document.getElementById("curves").textContent);
  document.body.classList.add("live");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const several = new Set(panels.flatMap((panel) => panel.lines.map((line) => line.run))).size > 1;
  const number = (value) => (value == null ? "" : String(Number(value.toPrecision(5))));
  const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
  const LOG_FROM = 20; // as in loss.png
  let charts = [];

  function smoothed(values, weight) {
    // Debiased exponential mean, as TensorBoard's.
    let last = 0, norm = 0;
    return values.map((value) => {
      if (value == null) return value;
      last = last * weight + value * (1 - weight);
      norm = norm * weight + (1 - weight);
      return last / norm;
    });
  }

  function colour(line, place) {
    return css(`--run${(several ? line.run : place) % 8}`);
  }

  function intervals(lines) {
    // A bar from end to end of each interval, over the lines.
    return (chart) => {
      const context = chart.ctx;
      context.save();
      context.beginPath();
      context.rect(chart.bbox.left, chart.bbox.top, chart.bbox.width, chart.bbox.height);
      context.clip();
      lines.forEach((line, place) => {
        if (!line.ci || !chart.series[place + 1].show) return;
        context.strokeStyle = colour(line, place);
        context.lineWidth = devicePixelRatio;
        line.ci.forEach((ends, i) => {
          if (!ends) return;
          const x = Math.round(chart.valToPos(line.x[i], "x", true));
          context.beginPath();
          context.moveTo(x, chart.valToPos(ends[0], "y", true));
          context.lineTo(x, chart.valToPos(ends[1], "y", true));
          context.stroke();
        });
      });
      context.restore();
    };
  }

  function draw(panel, weight) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = panel.title;
    const place = document.createElement("div");
    const ends = panel.lines.map((line) => `${several ? line.of + ", " : ""}${line.label}: ` +
      `${number(line.y[0])} at step ${line.x[0]}, ${number(line.y[line.y.length - 1])} at step ${line.x[line.x.length - 1]}`);
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", `${panel.title} over steps. ${ends.join("; ")}`);
    figure.append(caption, place);
    const box = document.querySelector(panel.more ? "#more-charts .charts" : "#charts");
    box.append(figure);
    const data = uPlot.join(panel.lines.map((line) => [line.x, line.held ? line.y : smoothed(line.y, weight)]));
    const values = panel.lines.flatMap((line) => line.y);
    const low = Math.min(...values), high = Math.max(...values);
    const log = panel.title === "loss" && low > 0 && high > LOG_FROM * low;
    const axis = { stroke: css("--faint"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") } };
    const chart = new uPlot({
      width: width(place), height: 220,
      cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick.toLocaleString("en") : "")) },
        { ...axis, size: 66, values: (_, ticks) => ticks.map((tick) => number(tick)) },
      ],
      series: [
        { label: "step" },
        ...panel.lines.map((line, i) => ({
          label: several ? `${line.of} · ${line.label}` : line.label,
          stroke: colour(line, i), width: 1.5, spanGaps: true, value: (_, value) => number(value),
          dash: several ? DASHES[panel.lines.filter((other) => other.run === line.run).indexOf(line) % DASHES.length] : [],
          points: { show: line.held || line.x.length === 1, size: 6 },
        })),
      ],
      hooks: {
        draw: [intervals(panel.lines)],
        setScale: [(self, key) => key === "x" && zoom(self)],
      },
    }, data, place);
    charts.push({ chart, place });
  }

  let zooming = false;
  function zoom(source) {
    // All charts show the same steps.
    if (zooming) return;
    zooming = true;
    const { min, max } = source.scales.x;
    const first = source.data[0][0], last = source.data[0][source.data[0].length - 1];
    for (const { chart } of charts) {
      if (chart === source) continue;
      const xs = chart.data[0];
      const all = min <= first && max >= last;
      chart.setScale("x", all ? { min: xs[0], max: xs[xs.length - 1] } : { min, max });
    }
    zooming = false;
  }

  function width(place) {
    return Math.max(200, Math.floor(place.clientWidth));
  }

  function all() {
    for (const { chart } of charts) chart.destroy();
    charts = [];
    document.querySelectorAll(".charts").forEach((box) => box.replaceChildren());
    const select = document.getElementById("smooth");
    zooming = true;
    for (const panel of panels) draw(panel, select ? Number(select.value) : 0);
    zooming = false;
  }

  const more = document.getElementById("more-charts");
  if (more && panels.some((panel) => panel.more)) {
    more.hidden = false;
    more.addEventListener("toggle", resize);
  }
  function resize() {
    for (const { chart, place } of charts) chart.setSize({ width: width(place), height: 220 });
  }
  if (panels.length) {
    all();
    addEventListener("resize", resize);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
    document.getElementById("smooth").addEventListener("change", all);
    document.getElementById("whole").addEventListener("click", all);
  }

  // --- tables that can be sorted, and filtered ---
  const table = document.querySelector("table.sortable");
  if (table) {
    const body = table.tBodies[0];
    const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      if (head.dataset.kind === "picture") return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const numeric = head.dataset.kind === "number";
        const rows = [...body.rows].map((row) => [value(row, i), row]);
        rows.sort(([a], [b]) => {
          if ((a === "") !== (b === "")) return a === "" ? 1 : -1; // without a value at the end, both ways
          const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
          return up ? order : -order;
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
    document.getElementById("filter").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/);
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
  }
})();
