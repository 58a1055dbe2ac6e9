"use strict";
// The page at / of a decoder: everything a user or a model says goes in as text, never as markup.
const at = (id) => document.getElementById(id);
let layers = 1;
let running = null;

async function describe() {
  const model = await (await fetch("v1/model")).json();
  layers = model.num_layers;
  at("about").textContent = `${model.name}: a decoder of ${layers} layers; up to ${model.max_context} tokens in all.`;
  at("text").maxLength = model.max_chars;
  at("count").max = model.max_context - 1;
  for (const name of model.operating_points) at("point").add(new Option(name, name));
}

function refuse(message) {
  at("problem").textContent = message;
  at("problem").hidden = false;
}

function show(token) {
  if (token.text) {
    const piece = document.createElement("span");
    piece.className = "token";
    piece.title = `layer ${token.exit_layer} of ${layers}`;
    piece.style.backgroundColor = `rgba(74, 144, 217, ${(0.5 * token.exit_layer / layers).toFixed(2)})`;
    const layer = document.createElement("sub");
    layer.textContent = token.exit_layer;
    piece.append(token.text, layer);
    at("written").append(piece);
  }
}

function summarise(made) {
  const share = made.mean_exit_layer / layers;
  const seconds = (made.milliseconds - made.first_token_milliseconds) / 1000;
  const rate = made.tokens.length > 1 && seconds > 0 ? `, ${((made.tokens.length - 1) / seconds).toFixed(1)} tokens/s` : "";
  at("summary").textContent =
    `${made.tokens.length} tokens (${made.finish}), mean exit layer ${made.mean_exit_layer.toFixed(2)} of ${layers} ` +
    `(${(100 * share).toFixed(0)} %), first after ${made.first_token_milliseconds.toFixed(0)} ms${rate}.`;
}

function take(block) {
  let kind = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) kind = line.slice(7);
    if (line.startsWith("data: ")) data += line.slice(6);
  }
  const found = JSON.parse(data);
  if (kind === "message") show(found);
  else if (kind === "end") summarise(found.generations[0]);
  else refuse(found.message);
}

async function read(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    blocks.forEach(take);
  }
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("problem").hidden = true;
  at("written").replaceChildren();
  at("summary").textContent = "";
  at("answer").hidden = false;
  at("go").disabled = true;
  at("stop").disabled = false;
  running = new AbortController();
  try {
    const body = { prompt: at("text").value, max_new_tokens: Number(at("count").value), stream: true };
    if (at("temperature").value) body.temperature = Number(at("temperature").value);
    if (at("point").value) body.operating_point = at("point").value;
    const response = await fetch("v1/generate", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      signal: running.signal,
    });
    if (response.ok) await read(response); else refuse((await response.json()).message);
  } catch (error) {
    if (error.name !== "AbortError") refuse(`The server does not answer: ${error.message}`);
  } finally {
    at("go").disabled = false;
    at("stop").disabled = true;
  }
});

at("stop").addEventListener("click", () => running.abort());

describe().catch((error) => refuse(`The server does not answer: ${error.message}`));
