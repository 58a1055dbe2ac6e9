"use strict";
// The page at /: everything a user or a model says goes in as text, never as markup.
const at = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)} %`;

async function describe() {
  const model = await (await fetch("v1/model")).json();
  const several = model.labels.length > 8 ? `${model.labels.length} labels` : model.labels.join(", ");
  at("about").textContent = `${model.name}: ${model.num_layers} layers, ${several}.`;
  at("text").maxLength = model.max_chars;
  for (const name of model.operating_points) at("point").add(new Option(name, name));
}

function cell(row, content) {
  const made = row.insertCell();
  made.append(content);
  return made;
}

function bar(value) {
  const meter = document.createElement("meter");
  meter.value = value;
  const shown = document.createElement("span");
  shown.append(meter, ` ${percent(value)}`);
  return shown;
}

function show(found) {
  at("label").textContent = found.label;
  at("probability").textContent = percent(found.probability);
  at("layer").textContent = found.exit_layer;
  at("layers").textContent = found.num_layers;
  const ratio = found.full_depth_milliseconds / found.milliseconds;
  at("time").textContent =
    `${found.milliseconds.toFixed(2)} ms against ${found.full_depth_milliseconds.toFixed(2)} ms at full depth ` +
    `(${ratio.toFixed(2)} times as fast, the text alone).`;
  at("rows").replaceChildren();
  for (const layer of found.layers) {
    const row = at("rows").insertRow();
    row.className = layer.layer === found.exit_layer ? "exit" : layer.layer > found.exit_layer ? "skipped" : "";
    cell(row, String(layer.layer));
    cell(row, layer.label);
    cell(row, percent(layer.probability));
    cell(row, bar(layer.exit_probability));
    cell(row, layer.layer === found.exit_layer ? "left here" : "");
  }
  at("answer").hidden = false;
}

function refuse(message) {
  at("problem").textContent = message;
  at("problem").hidden = false;
  at("answer").hidden = true;
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("problem").hidden = true;
  at("go").disabled = true;
  try {
    const body = { text: at("text").value };
    if (at("point").value) body.operating_point = at("point").value;
    const response = await fetch("v1/explain", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    const found = await response.json();
    if (response.ok) show(found); else refuse(found.message);
  } catch (error) {
    refuse(`The server does not answer: ${error.message}`);
  } finally {
    at("go").disabled = false;
  }
});

describe().catch((error) => refuse(`The server does not answer: ${error.message}`));
