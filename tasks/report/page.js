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
  const isDark = () => (chosen ? chosen === "dark" : system.matches);
  const show = () => {
    if (chosen) root.dataset.theme = chosen;
    button.textContent = isDark() ? "Light" : "Dark";  // what a click brings
  };
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    memory.set(chosen);
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();

  const choosers = [...document.querySelectorAll("select[data-choose]")];
  const choose = (value) => {
    for (const select of choosers) select.value = value;
    for (const block of document.querySelectorAll("[data-method]")) block.hidden = block.dataset.method !== value;
  };
  for (const select of choosers) {
    select.closest("p").hidden = false;
    select.addEventListener("change", () => choose(select.value));
  }
  if (choosers.length) choose("0");

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

  const list = document.querySelector("[data-browsed]");
  if (list) {
    const step = 12;
    const cards = [...list.children];
    const words = cards.map((card) => card.textContent.toLowerCase());
    const bar = document.querySelector(".browse");
    const output = bar.querySelector("output");
    const more = document.getElementById("more");
    const [search, ...selects] = bar.querySelectorAll("[data-by]");
    let limit = step;
    const update = () => {
      const wanted = search.value.trim().toLowerCase();
      const fits = (card, i) => words[i].includes(wanted)
        && selects.every((select) => !select.value || card.dataset[select.dataset.by].split(" ").includes(select.value));
      let found = 0;
      cards.forEach((card, i) => { card.hidden = !fits(card, i) || ++found > limit; });
      output.textContent = `${found} of ${cards.length}`;
      more.hidden = found <= limit;
      more.textContent = `Show ${Math.min(step, found - limit)} more`;
    };
    bar.addEventListener("input", () => { limit = step; update(); });
    more.addEventListener("click", () => {
      const next = cards.filter((card) => !card.hidden).length;
      limit += step;
      update();
      // The button may be gone: whoever works by key goes on with the first new card.
      const card = cards.filter((each) => !each.hidden)[next];
      card.tabIndex = -1;
      card.focus({ preventScroll: true });
    });
    bar.hidden = false;
    update();
  }

  const closed = [];
  addEventListener("beforeprint", () => {
    for (const box of document.querySelectorAll("details:not([open])")) { closed.push(box); box.open = true; }
    for (const block of document.querySelectorAll("[data-method]")) block.hidden = false;
  });
  addEventListener("afterprint", () => {
    while (closed.length) closed.pop().open = false;
    if (choosers.length) choose(choosers[0].value);
  });
})();
