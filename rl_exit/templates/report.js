"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let split = document.body.dataset.split;

  // Figures name theme colours as var(--name); plotly wants the colour itself.
  const resolved = (value, css) => {
    if (typeof value === "string") {
      const match = /^var\((--[a-z-]+)\)$/.exec(value);
      return match ? css.getPropertyValue(match[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolved(item, css));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, css)]));
    }
    return value;
  };

  const axis = { gridcolor: "var(--line)", linecolor: "var(--line)", zeroline: false, automargin: true, ticks: "",
    title: { standoff: 10 } };
  const merged = (base, extra) => {
    const out = { ...base };
    for (const [key, value] of Object.entries(extra || {})) {
      const both = value && typeof value === "object" && !Array.isArray(value) && out[key];
      out[key] = both ? merged(out[key], value) : value;
    }
    return out;
  };

  const draw = (node) => {
    const found = figures[node.dataset.figure];
    if (!found) return;
    const figure = found.data ? found : found[split];
    const css = getComputedStyle(document.documentElement);
    const layout = merged({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 16, t: 30, b: 48 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "var(--ink)" },
      hoverlabel: { bgcolor: "var(--card)", bordercolor: "var(--muted)", font: { color: "var(--ink)" }, namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "var(--muted)", activecolor: "var(--ink)" },
      legend: { itemsizing: "constant", font: { size: 12.5 } }, xaxis: axis, yaxis: axis, autosize: true,
    }, figure.layout);
    const narrow = node.clientWidth < 520;
    const data = figure.data.map((trace) =>
      narrow && trace.type === "heatmap" ? { ...trace, showscale: false } : trace);
    Plotly.react(node, resolved(data, css), resolved(layout, css), {
      responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
      toImageButtonOptions: { filename: node.dataset.figure, scale: 2 },
    });
  };

  const shown = (node) => node.closest("details:not([open])") === null;
  const drawAll = () => document.querySelectorAll("[data-figure]").forEach((node) => shown(node) && draw(node));

  document.querySelectorAll("details").forEach((details) =>
    details.addEventListener("toggle", () => details.open && details.querySelectorAll("[data-figure]").forEach(draw)));
  document.querySelectorAll("input[name=split]").forEach((input) =>
    input.addEventListener("change", () => { split = input.value; drawAll(); }));
  dark.addEventListener("change", drawAll);
  drawAll();
})();
