"use strict";
(() => {
  const body = document.getElementById("classes").tBodies[0];
  const told = document.getElementById("told");
  const write = document.getElementById("write");
  const rowOf = (name) => [...body.rows].find((row) => row.dataset.name === name);
  const nameIn = (row) => row.cells[0].firstElementChild.value.trim();

  const changes = () => {
    const said = [];
    for (const row of body.rows) {
      const before = row.dataset.name;
      if (row.dataset.into !== undefined && row.dataset.into) said.push(`${before} goes into ${row.dataset.into}`);
      else if (row.dataset.out) said.push(`${before} goes`);
      else if (before === undefined) said.push(`${nameIn(row)} is new`);
      else if (nameIn(row) !== before) said.push(`${before} becomes ${nameIn(row)}`);
    }
    return said;
  };
  const update = () => {
    const said = changes();
    told.textContent = said.length ? `${said.length} change${said.length > 1 ? "s" : ""}: ${said.join("; ")}` : "Nothing is changed.";
    write.disabled = !said.length;
  };
  const drop = (row, out, into = "") => {
    row.dataset.out = out ? "yes" : "";
    row.dataset.into = into;
    row.cells[0].firstElementChild.disabled = out;
    row.cells[2].firstElementChild.textContent = out ? "Keep" : "Take out";
    update();
  };
  const add = (name) => {
    const row = body.rows[0].cloneNode(true);
    for (const key of Object.keys(row.dataset)) delete row.dataset[key];
    const input = row.cells[0].firstElementChild;
    input.disabled = false;
    input.value = name;
    input.setAttribute("aria-label", "Name of a new class");
    row.cells[1].textContent = "new";
    row.cells[2].firstElementChild.setAttribute("aria-label", "Take out a new class");
    row.cells[2].firstElementChild.textContent = "Take out";
    body.append(row);
    update();
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { drop: name, into } = button.dataset;
    if (name !== undefined) drop(rowOf(name), true, into);
    else if (button.dataset.add !== undefined) {
      const input = button.closest("article").querySelector("input");
      if (input.value.trim()) add(input.value.trim());
    } else if (button.dataset.toggle !== undefined) {
      const row = button.closest("tr");
      if (row.dataset.name === undefined) { row.remove(); update(); } else drop(row, !row.dataset.out);
    }
  });
  body.addEventListener("input", update);

  write.addEventListener("click", async () => {
    const classes = [...body.rows].filter((row) => !row.dataset.out).map(nameIn);
    write.disabled = true;
    try {
      const answer = await fetch("classes", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ classes }),
      });
      const found = await answer.json();
      told.textContent = answer.ok ? found.told : `${found.error}: ${found.what_to_do}`;
    } catch (error) {
      told.textContent = `The service does not answer (${error.message}); start latteflow review again.`;
    }
    write.disabled = false;
  });
})();
