"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const memory = {
    // A file opened from disk may have no storage: the choice then lasts as long as the page.
    get: () => { try { return localStorage.getItem("latteflow-theme"); } catch { return null; } },
    set: (theme) => { try { localStorage.setItem("latteflow-theme", theme); } catch { /* nothing to keep it in */ } },
  };
  let chosen = memory.get();
  const show = () => {
    const dark = chosen ? chosen === "dark" : system.matches;
    if (chosen) root.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
  };
  button.addEventListener("click", () => {
    chosen = button.getAttribute("aria-pressed") === "true" ? "light" : "dark";
    memory.set(chosen);
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();

  for (const input of document.querySelectorAll("input[data-filter]")) {
    const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
    const output = input.closest("p").querySelector("output");
    input.closest("p").hidden = false;
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      output.textContent = wanted ? `${shown} of ${rows.length}` : "";
    });
  }

  const closed = [];
  addEventListener("beforeprint", () => {
    for (const box of document.querySelectorAll("details:not([open])")) { closed.push(box); box.open = true; }
  });
  addEventListener("afterprint", () => { while (closed.length) closed.pop().open = false; });
})();
