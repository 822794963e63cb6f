"use strict";
// For every chart: a dashed line at the pointer, and the values of the nearest points of its lines.
const tip = document.getElementById("tip");
const charts = [...document.querySelectorAll("figure.chart")];
for (const figure of charts) {
  const chart = JSON.parse(figure.querySelector("script").textContent), svg = figure.querySelector("svg"), mark = svg.querySelector(".mark");
  const along = v => chart.log ? Math.log2(v) : v;
  const place = v => chart.left + (along(v) - along(chart.low)) / ((along(chart.high) - along(chart.low)) || 1) * chart.width;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let nearest = null;
    for (const line of chart.lines) for (const point of line.points) {
      const off = Math.abs(place(point[0]) - x);
      if (!nearest || off < nearest.off) nearest = { off, at: point[0] };
    }
    if (!nearest) return;
    const rows = chart.lines.map(line => {
      let best = null;
      for (const point of line.points) { const off = Math.abs(place(point[0]) - place(nearest.at)); if (!best || off < best.off) best = { off, point }; }
      return best && best.off < 6 ? (line.name ? line.name + ": " : "") + best.point[2] : null;
    }).filter(text => text !== null);
    mark.setAttribute("x1", place(nearest.at)); mark.setAttribute("x2", place(nearest.at)); mark.style.visibility = "visible";
    tip.textContent = [chart.axis + " " + nearest.at.toLocaleString("en")].concat(rows).join("\n");
    tip.style.display = "block";
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)) + "px"; tip.style.top = event.clientY + 14 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.style.display = "none"; mark.style.visibility = "hidden"; });
}
document.body.dataset.ready = String(charts.length);
