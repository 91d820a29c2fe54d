"use strict";

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

document.getElementById("theme").addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("theme", next);
  } catch (refused) {
    // Storage is off: the choice holds for this page.
  }
  document.dispatchEvent(new Event("themechange"));
});

// "/" goes to the first field of the page, as on many search pages.
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    const field = document.querySelector("main input[type=search], main textarea, main input[type=text]");
    if (field) {
      event.preventDefault();
      field.focus();
    }
  }
});

// What was said of the last answer does not hold for an error.
document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.xhr.status >= 400) document.getElementById("said")?.replaceChildren();
});

// A request that never reached the service.
document.addEventListener("htmx:sendError", (event) => {
  document.getElementById("said")?.replaceChildren();
  const target = event.detail.target ?? document.getElementById("main");
  const section = document.createElement("section");
  section.className = "trouble";
  section.setAttribute("role", "alert");
  section.textContent = "The service does not answer. Is `polyhead serve` still running? Ask again when it is.";
  target.replaceChildren(section);
});

// Buttons with data-copy put the text of the element they name on the clipboard.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const text = document.getElementById(button.dataset.copy).textContent;
  const said = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch (refused) {
    button.textContent = "Not allowed to copy";
  }
  setTimeout(() => (button.textContent = said), 1500);
});
