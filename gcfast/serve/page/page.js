"use strict";

const at = (id) => document.getElementById(id);
let latest = 0; // the number of the last picture: answers to earlier ones are dropped

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

function show(id, png, alt) {
  at(id).src = `data:image/png;base64,${png}`;
  at(id).alt = alt;
}

async function ask(path, picture) {
  const form = new FormData();
  form.append("image", picture);
  const answer = await fetch(path, {
    method: "POST",
    body: form,
    headers: { Accept: "application/json" },
  });
  const said = await answer.json();
  if (!answer.ok) {
    const detail = typeof said.detail === "string" ? said.detail : "the request was refused";
    throw Object.assign(new Error(detail), { status: answer.status });
  }
  return said;
}

function fact(name, value) {
  const tile = document.createElement("div");
  for (const [kind, text] of [["dt", name], ["dd", value]]) {
    tile.append(Object.assign(document.createElement(kind), { textContent: text }));
  }
  return tile;
}

function row(neighbor) {
  const line = document.createElement("tr");
  const cells = [neighbor.id, neighbor.label, neighbor.row, neighbor.distance.toPrecision(4)];
  cells.forEach((text, i) => {
    line.append(Object.assign(document.createElement("td"), {
      textContent: text,
      className: i > 1 ? "num" : "",
    }));
  });
  return line;
}

async function explain(picture) {
  const mine = ++latest;
  say("Explaining …");
  at("pair").hidden = true;
  try {
    const started = performance.now();
    const said = await ask("explain?include=overlay&include=picture&include=neighbor", picture);
    if (mine !== latest) return;
    const seconds = (performance.now() - started) / 1000;
    const nearest = said.neighbors[0];
    show("picture", said.picture, "your picture, as the network sees it");
    show("overlay", said.overlay, "heat over your picture");
    at("neighbor-figure").hidden = said.neighbor === null;
    if (said.neighbor !== null) {
      show("neighbor", said.neighbor, "the nearest row's picture");
      at("neighbor-caption").textContent = `Nearest: ${nearest.id}`;
    }
    const facts = [fact("nearest row's label", nearest ? nearest.label : "none")];
    if (nearest) facts.push(fact("squared distance", nearest.distance.toPrecision(3)));
    if (said.confidence !== null) {
      facts.push(fact("probably its own class", `${(100 * said.confidence).toFixed(0)} %`));
    }
    facts.push(fact("answered in", `${seconds.toFixed(2)} s`));
    at("facts").replaceChildren(...facts);
    at("rows").replaceChildren(...said.neighbors.map(row));
    at("result").hidden = false;
    say(said.flat ? "The map is flat: nothing in this picture speaks for its nearest row." : "");
    // What a pair has in common takes more of some networks than they allow: then it is not shown.
    if (said.neighbor !== null) await explainPair(picture, mine).catch(() => {});
  } catch (error) {
    if (mine !== latest) return;
    at("result").hidden = true;
    say(error.status ? `Refused: ${error.message}.` : "The server cannot be reached.", true);
  }
}

async function explainPair(picture, mine) {
  const said = await ask("pair?include=overlay", picture);
  if (mine !== latest) return;
  show("pair-picture", said.overlay, "heat of the pair over your picture");
  show("pair-other", said.other_overlay, "heat of the pair over its neighbor");
  at("pair").hidden = false;
}

function first(files) {
  if (files && files.length) explain(files[0]);
}

const drop = at("drop");
at("file").addEventListener("change", (event) => first(event.target.files));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  first(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => first(event.clipboardData.files));
