"use strict";

// Draws every element with data-plot (a figure's values as JSON) in the colours of the theme, and again when it changes.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Told apart by form too, for whoever sees no colours.
const FORMS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "x", "triangle-down", "circle-open"];
const HUES = { light: ["#17538f", "#a34a00", "#00694c", "#8b2a6b", "#5b4b00", "#a32117", "#3d3d99", "#006680", "#4a5561"],
  dark: ["#8fc0f5", "#ffb57a", "#6fdcb5", "#f0a3d6", "#e8d36a", "#ff9d92", "#b9b9ff", "#7fdcf0", "#b3bdc8"] };

const heatmap = (figure) => [{
  type: "heatmap", x: figure.x, y: figure.y, z: figure.z, xgap: 1, ygap: 1, hoverongaps: false,
  colorscale: [[0, colour("--raised")], [1, colour("--accent")]],
  hovertemplate: "layer %{y}, head %{x}: %{z:.4g}<extra></extra>",
  colorbar: { tickfont: { color: colour("--ink") }, outlinewidth: 0, thickness: 12 },
}];

const scatter = (figure) => figure.groups.map((group, at) => ({
  type: "scatter", mode: "markers", name: group.name, x: group.x, y: group.y, text: group.titles,
  hovertemplate: "%{text}<extra>" + "%{fullData.name}" + "</extra>",
  marker: { size: 9, symbol: FORMS[at % FORMS.length], color: HUES[isDark() ? "dark" : "light"][at % FORMS.length] },
}));

const axis = (title, kind) => ({ title: { text: title }, type: kind, gridcolor: colour("--line"), zerolinecolor: colour("--line"), fixedrange: kind === "category" });

function draw(element) {
  const figure = JSON.parse(element.dataset.plot);
  const cells = figure.kind === "heatmap";
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink") },
    margin: { l: 48, r: 8, t: 8, b: 44 }, height: cells ? 120 + 22 * Math.max(3, figure.y.length) : 460,
    xaxis: axis(cells ? "head" : figure.x, cells ? "category" : "linear"),
    yaxis: axis(cells ? "layer" : figure.y, cells ? "category" : "linear"),
    legend: { orientation: "h", y: -0.2 }, showlegend: !cells, hovermode: "closest",
  };
  if (cells) layout.yaxis.autorange = true;
  const titles = cells ? heatmap(figure) : scatter(figure);
  Plotly.react(element, titles, layout, { displayModeBar: false, responsive: true }).then(() => {
    if (element.dataset.drawn) return;
    element.dataset.drawn = "yes";
    element.on("plotly_click", (event) => {
      const { x, y } = event.points[0];
      if (cells) document.querySelector(`[data-cell="${y}/${x}"]`)?.click();
    });
  });
}

const drawAll = () => document.querySelectorAll("[data-plot]").forEach(draw);
document.addEventListener("DOMContentLoaded", drawAll);
document.addEventListener("htmx:afterSettle", drawAll);
document.addEventListener("themechange", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
