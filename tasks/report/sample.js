"use strict";
(() => {
  const [images, names] = ["images", "names"].map((of) => JSON.parse(document.getElementById("images").dataset[of]));
  const [picture, path, typed, told, offered] = ["picture", "path", "typed", "told", "names"].map((id) => document.getElementById(id));
  const OFFERED = 40;
  let place = Math.max(0, images.findIndex((image) => image.answer === null));

  const show = () => {
    const image = images[place];
    picture.src = `images/${image.key}`;
    path.textContent = image.path;
    typed.value = image.answer ?? "";
    if (matchMedia("(pointer: fine)").matches) typed.focus();  // on a phone the keyboard would hide the picture
    typed.select();
    offer();
    const done = images.filter((each) => each.answer !== null).length;
    const all = done === images.length ? ". That is all: end the command, by Ctrl-C, and run again" : "";
    told.textContent = `${done} of ${images.length} answered${image.answer === "" ? "; this one: none of them" : ""}${all}`;
  };
  // The classes that begin with what was typed, to be pressed.
  const offer = () => {
    const answer_of = images[place].answer;
    const wanted = typed.value === answer_of ? "" : typed.value.trim().toLowerCase();
    const fitting = names.filter((name) => name.toLowerCase().startsWith(wanted));
    offered.replaceChildren(...fitting.slice(0, OFFERED).map((name) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: name, ariaPressed: String(name === answer_of) });
      button.addEventListener("click", () => answer(name));
      return button;
    }));
  };
  const go = (step) => { place = Math.min(images.length - 1, Math.max(0, place + step)); show(); };
  // What was typed, if it can only mean one class: as it is, else as the beginning of a single name.
  const meant = () => {
    const wanted = typed.value.trim().toLowerCase();
    const same = names.filter((name) => name.toLowerCase() === wanted);
    const begin = names.filter((name) => wanted && name.toLowerCase().startsWith(wanted));
    return same.length === 1 ? same[0] : begin.length === 1 ? begin[0] : null;
  };
  const answer = async (name) => {
    const image = images[place];
    try {
      const response = await fetch("labels", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ key: image.key, name }),
      });
      const found = await response.json();
      if (!response.ok) { told.textContent = `${found.error}: ${found.what_to_do}`; return; }
    } catch (error) {
      told.textContent = `Not noted: the service does not answer (${error.message}).`;
      return;
    }
    image.answer = name;
    const next = images.findIndex((each, number) => number > place && each.answer === null);
    if (next >= 0) place = next;
    show();
  };

  document.getElementById("answer").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = meant();
    if (name === null) told.textContent = "No class, or several, begin like this.";
    else answer(name);
  });
  typed.addEventListener("input", offer);
  document.getElementById("none").addEventListener("click", () => answer(""));
  document.getElementById("back").addEventListener("click", () => go(-1));
  document.getElementById("forth").addEventListener("click", () => go(1));
  document.addEventListener("keydown", (event) => {
    if (event.target === typed && typed.value) return;  // the arrows are the text's
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  });
  show();
})();
