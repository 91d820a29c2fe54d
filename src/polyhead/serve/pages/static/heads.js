"use strict";

// The table of heads is one stop of the Tab key; arrow keys go from cell to cell.
const oneStop = (chosen) => {
  const cells = [...document.querySelectorAll("table.cells a")];
  const stop = chosen ?? cells.find((cell) => cell.dataset.stop) ?? cells[0];
  cells.forEach((cell) => {
    cell.tabIndex = cell === stop ? 0 : -1;
    if (cell === stop) cell.dataset.stop = "yes";
    else delete cell.dataset.stop;
  });
};
document.addEventListener("DOMContentLoaded", () => oneStop());
document.addEventListener("htmx:afterSettle", () => oneStop());
document.addEventListener("focusin", (event) => {
  if (event.target.matches?.("table.cells a")) oneStop(event.target);
});
const STEPS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
document.addEventListener("keydown", (event) => {
  const cell = event.target.closest?.("table.cells td");
  const step = STEPS[event.key];
  if (!cell || !step) return;
  const row = cell.parentElement;
  const rows = [...row.parentElement.rows];
  const next = rows[rows.indexOf(row) + step[0]]?.cells[cell.cellIndex + step[1]]?.querySelector("a");
  if (next) {
    event.preventDefault();
    next.focus();
  }
});

// A token pointed at or focused shades the others by how much it attends to them.
function look(token) {
  const row = document.querySelector(`table.attention tr[data-row="${token.dataset.row}"]`);
  const weights = [...row.querySelectorAll("td")].map((cell) => Number(cell.dataset.weight));
  const most = Math.max(...weights) || 1;
  const tokens = [...document.querySelectorAll("#strip .token")];
  tokens.forEach((one, at) => {
    one.style.setProperty("--share", (0.4 * weights[at]) / most);
    one.classList.toggle("looking", one === token);
  });
  document.querySelectorAll("table.attention tr.looking").forEach((one) => one.classList.remove("looking"));
  row.classList.add("looking");
  const order = weights.map((weight, at) => [weight, at]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  const said = order.map(([weight, at]) => `${tokens[at].textContent} ${Math.round(100 * weight)}%`);
  document.getElementById("strip-said").textContent = `${token.textContent} attends to ${said.join(", ")}`;
}
for (const kind of ["pointerover", "focusin"]) {
  document.addEventListener(kind, (event) => {
    const token = event.target.closest?.("#strip .token");
    const row = event.target.closest?.("table.attention tbody tr");
    if (token) look(token);
    else if (row) look(document.querySelector(`#strip .token[data-row="${row.dataset.row}"]`));
  });
}

document.addEventListener("input", (event) => {
  if (event.target.id === "gain") document.getElementById("gain-said").textContent = Number(event.target.value).toFixed(1);
});

// The head that was chosen has the focus, so that it is read out and scrolled to; its cell stays marked.
document.addEventListener("htmx:afterSettle", (event) => {
  if (event.detail.target?.id !== "head") return;
  document.getElementById("chosen")?.focus();
});
document.addEventListener("click", (event) => {
  const cell = event.target.closest?.("a[data-cell]");
  if (!cell) return;
  document.querySelectorAll("a[data-cell][aria-current]").forEach((one) => one.removeAttribute("aria-current"));
  cell.setAttribute("aria-current", "true");
});
