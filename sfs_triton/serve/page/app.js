// Wiring: what a click does, and what is drawn after it.

import { keep, key } from "./access.js";
import { Run } from "./canvas.js";
import { Chat, describe } from "./chat.js";
import { Choices, Common, nameOf } from "./controls.js";
import { Replay } from "./replay.js";
import { ask, model } from "./stream.js";
import { summarize } from "./summary.js";
import { CanvasView, make } from "./view.js";

// What the embedded model was trained for; others will find something to say to anything.
const EXAMPLES = {
  "a table as JSON": "Rewrite as JSON:\nid,name,age\n1,Ann,31\n2,Bob,45\n3,Kim,77\n4,Leo,12",
  "a word problem":
    "Ann has 12 apples. Ann buys 7 more apples at the market. Then Ann loses 4 apples. How many apples does Ann have?",
  countdown: "15,44,79,50",
};

const find = (id) => document.getElementById(id);
const order = find("order").querySelector("select");
const common = new Common(find("common"));
const sides = [side("A", "slowfast"), side("B", "vanilla")];
const replay = new Replay(find("replay"), draw);
const chat = new Chat(find("log"), open);
let running = null; // what aborts the turn that runs
let name = null; // of the model

/** One canvas with the controls above it. */
function side(title, sampler) {
  const root = find("side").content.cloneNode(true).querySelector(".side");
  find("sides").append(root);
  root.setAttribute("aria-label", `Canvas ${title}`);
  const choices = new Choices(root.querySelector(".choices"), title, sampler);
  return { title, root, choices, view: new CanvasView(root), run: new Run() };
}

/** Draw each side after so many of its steps. */
function draw(shown) {
  sides.forEach(({ view, run }, n) => view.draw(run, shown[n] ?? 0));
}

/** The sides that the next turn asks. */
function asked() {
  return sides.slice(0, find("compare").checked ? 2 : 1);
}

/** Show the runs of a turn; two canvases if it has two, or the next one will. */
function open(runs) {
  const two = runs.length === 2 || find("compare").checked;
  document.body.classList.toggle("comparing", two);
  for (const element of [find("scale"), sides[1].root]) element.hidden = !two;
  find("order").hidden = !find("compare").checked;
  if (!two) replay.scale.value = "steps";
  sides.forEach((side, n) => (side.run = runs[n] ?? new Run()));
  replay.open(runs);
  heads();
}

/** What is said above the canvases. */
function heads() {
  const names = sides.map(({ run, choices }) => (run.start ? nameOf(run.start.sampler) : choices.label));
  sides.forEach(({ title, root, run }, n) => {
    root.querySelector("h3").textContent = sides[1].root.hidden ? names[n] : `${title}: ${names[n]}`;
    root.querySelector(".used").textContent = run.start ? settings(run.start) : "";
  });
  summarize(find("summary"), replay.runs, names[0] === names[1] ? ["A", "B"] : names);
}

function settings({ sampler, cache, seed, prompt_length }) {
  const preset = sampler.preset ? `${sampler.preset}, ` : "";
  return `${preset}cache ${cache.kind}, prompt ${prompt_length}, seed ${seed}`;
}

// ---------------------------------------------------------------------------------------------------------- a turn

/** Ask one side; what goes wrong is thrown once the run has its state. */
async function stream({ choices }, run, messages, shared, signal) {
  const body = { model: name, messages, ...shared, ...choices.read(), stream: true, frames: true };
  try {
    for await (const chunk of ask(body, key(), signal)) {
      run.take(chunk);
      if (chunk.diffusion?.type === "start") choices.learn(run.start);
      redraw();
    }
  } catch (error) {
    run.state = signal.aborted ? "stopped" : "failed";
    throw error;
  }
}

/** Ask the sides, one after the other or together, and show what comes. */
async function turn(prompt) {
  const [shown, messages, shared] = [asked(), chat.messages(prompt), common.read()];
  const runs = shown.map(() => new Run());
  const { signal } = (running = new AbortController());
  const begin = (side, n) => stream(side, runs[n], messages, shared, signal);
  const current = chat.begin(prompt, runs);
  open(runs);
  say("Sent.");
  try {
    if (order.value === "together") await all(shown.map(begin));
    else for (const [n, side] of shown.entries()) await begin(side, n);
    say(`Finished: ${runs.map(describe).join("; against ")}.`);
  } catch (error) {
    if (signal.aborted) say("Stopped.");
    else failed(error, prompt);
  } finally {
    for (const run of runs.filter((run) => !run.over)) run.state = "stopped";
    running = null;
    chat.draw(current);
    redraw();
  }
}

/** Wait for all, and then throw what the first that failed has thrown. */
async function all(promises) {
  const ends = await Promise.allSettled(promises);
  const bad = ends.find((end) => end.status === "rejected");
  if (bad) throw bad.reason;
}

async function send() {
  if (running || !valid()) return;
  const prompt = find("prompt").value;
  find("prompt").value = "";
  complain("");
  busy(true);
  await turn(prompt);
  busy(false);
}

/** Whether the prompt and all numbers are; what is folded away is opened to be corrected. */
function valid() {
  const roots = [find("ask"), ...asked().map(({ root }) => root)];
  const [bad] = roots.flatMap((root) => [...root.querySelectorAll(":is(input, textarea):invalid")]);
  bad?.closest("details")?.setAttribute("open", "");
  bad?.reportValidity();
  return !bad;
}

function busy(is) {
  const held = document.activeElement === find("stop"); // a button that is disabled loses the focus to nowhere
  find("send").disabled = is;
  find("stop").disabled = !is;
  if (held && !is) find("prompt").focus();
}

function failed(error, prompt) {
  const full = error.code === "context_length_exceeded" && chat.turns.length > 1;
  complain(error.message + (full ? " (The conversation counts as well; New chat drops it.)" : ""));
  say("");
  if (!find("prompt").value) find("prompt").value = prompt; // to be mended
  if (error.status === 401) needKey();
}

let due = false;

/** Draw what has come, once a screen frame: steps may come faster than that. */
function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    const last = chat.turns.at(-1);
    if (last) chat.draw(last);
    replay.refresh();
    heads();
  });
}

// ------------------------------------------------------------------------------------------------- all around it

/** Say something that screen readers are to read: what was begun and how it ended, not each token. */
function say(text) {
  find("status").textContent = text;
}

function complain(text) {
  find("error").textContent = text;
}

function needKey() {
  find("access").hidden = false;
  find("key").select();
}

/** Find out what is served. */
async function meet() {
  try {
    const card = await model(key());
    name = card.id;
    common.limit(card.context_length);
    find("model").textContent = `${card.id}, context ${card.context_length}`;
    document.title = `${card.id} \u00b7 sfs_triton`;
    find("examples").hidden = card.id !== "embedded";
    complain("");
    return true;
  } catch (error) {
    complain(error.message);
    if (error.status === 401) needKey();
    return false;
  }
}

async function useKey() {
  keep(find("key").value);
  if (!(await meet())) return;
  find("access").hidden = true;
  find("prompt").focus();
}

function reset() {
  running?.abort();
  chat.clear();
  open(asked().map(() => new Run()));
  complain("");
  say("New chat.");
  find("prompt").focus();
}

/** Call `then` for an event, instead of what the browser does. */
function on(id, event, then) {
  find(id).addEventListener(event, (happened) => {
    happened.preventDefault();
    then();
  });
}

function listen() {
  on("ask", "submit", send);
  on("access", "submit", useKey);
  on("stop", "click", () => running?.abort());
  on("new", "click", reset);
  on("compare", "change", () => open(replay.runs.slice(0, asked().length)));
  find("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  for (const { root } of sides) root.querySelector(".choices").addEventListener("change", heads);
}

function offer(text, prompt) {
  const button = make("button", { type: "button", text });
  button.addEventListener("click", () => {
    find("prompt").value = prompt;
    find("prompt").focus();
  });
  find("examples").append(button);
}

for (const [text, prompt] of Object.entries(EXAMPLES)) offer(text, prompt);
find("common").closest("details").open = matchMedia("(min-width: 900px)").matches;
listen();
open([new Run()]);
meet();
