// Before the page is drawn: the theme that was chosen here, else the system's.
"use strict";
try {
  const chosen = localStorage.getItem("theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch (refused) {
  // Storage is off: the system's theme stays.
}
