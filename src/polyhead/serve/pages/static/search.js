"use strict";

// j and k go from hit to hit, while nothing is typed into.
document.addEventListener("keydown", (event) => {
  if (!"jk".includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
  const active = document.activeElement;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(active?.tagName ?? "")) return;
  const hits = [...document.querySelectorAll("article.hit")];
  const at = hits.indexOf(active?.closest("article.hit"));
  const next = hits[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
  if (!next) return;
  event.preventDefault();
  next.focus();
  next.scrollIntoView({ block: "nearest" });
});
