// Drawing a run. All text goes through textContent or title, so whatever a model writes stays text.

import { blockEnd, inside, level, readable } from "./canvas.js";

/** A number with so many digits after the point, or a dash where there is none. */
export function number(value, digits) {
  return value === null ? "\u2013" : value.toFixed(digits);
}

/** An element with a text, a class, and other elements inside. */
export function make(tag, { text, kind, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** One canvas with its counters. Only cells that have changed are touched: there may be a thousand of them. */
export class CanvasView {
  constructor(root) {
    this.root = root;
    this.cells = root.querySelector(".cells");
    this.counters = [...root.querySelectorAll("[data-of]")];
    this.details = root.querySelector("details.step");
    this.looks = [];
    this.drawn = [null, 0, 0];
    this.details.addEventListener("toggle", () => this.listTokens());
  }

  /** Show a run after `count` of its steps. */
  draw(run, count) {
    if (this.drawn[0] === run && this.drawn[1] === count && this.drawn[2] === run.state) return;
    this.drawn = [run, count, run.state];
    const state = run.at(count);
    this.resize(run);
    this.root.setAttribute("aria-busy", String(run.state === "running"));
    for (let position = 0; position < run.length; position++) this.drawCell(position, lookOf(run, state, position));
    this.drawStrip(run, state);
    this.count(run, count, state);
    this.step = state.step;
    this.listTokens();
  }

  resize(run) {
    const missing = run.length - this.looks.length;
    for (let more = 0; more < missing; more++) this.cells.append(make("span"));
    for (let less = missing; less < 0; less++) this.cells.lastChild.remove();
    if (missing) this.looks = new Array(run.length).fill("");
    const waiting = run.state === "waiting" ? "waiting for the server" : "empty";
    this.cells.setAttribute("aria-label", run.start ? `Canvas of ${run.length} positions` : `Canvas, ${waiting}`);
  }

  drawCell(position, { text, kind, title, masked }) {
    const look = `${kind}\n${title}\n${text}`;
    if (this.looks[position] === look) return;
    this.looks[position] = look;
    const cell = this.cells.children[position];
    cell.textContent = text;
    cell.className = kind;
    cell.title = title;
    // A reader that spells out a hundred dots tells less than the counter of masks does.
    if (masked) cell.setAttribute("aria-hidden", "true");
    else cell.removeAttribute("aria-hidden");
  }

  /** The span and what is settled, as parts of the whole canvas. */
  drawStrip(run, { step }) {
    const [done, span] = this.root.querySelector(".strip").children;
    const percent = (position) => `${(100 * position) / Math.max(1, run.length)}%`;
    const [first, end] = step?.span ?? [0, 0];
    done.style.width = percent(step?.settled ?? 0);
    span.style.left = percent(first);
    span.style.width = percent((end ?? blockEnd(run, first)) - first);
    span.classList.toggle("open", end === null);
    span.hidden = !step;
  }

  count(run, count, { step }) {
    const { nfe, tpf, speed, seconds } = run.counts(count);
    const values = {
      step: run.start ? `${nfe} / ${run.steps.length ? run.steps.at(-1).step + 1 : 0}` : "\u2013",
      phase: step?.phase ?? "\u2013",
      span: step ? `[${step.span[0]}, ${step.span[1] ?? "?"})` : "\u2013",
      masks: run.start ? String(step ? step.masks_left : run.length) : "\u2013",
      tpf: number(tpf, 2),
      speed: number(speed, 1),
      seconds: number(run.start ? seconds : null, 2),
    };
    for (const counter of this.counters) {
      const value = values[counter.dataset.of];
      if (counter.textContent !== value) counter.textContent = value;
    }
    this.root.dataset.phase = step?.phase ?? "";
  }

  /** The step's tokens as a table, while it is open. */
  listTokens() {
    if (!this.details.open) return;
    const rows = (this.step?.committed ?? []).map((commit) =>
      make("tr", {}, cell(commit.position), cell(readable(commit.text), "token"), cell(commit.confidence ?? "\u2013")),
    );
    this.details.querySelector("tbody").replaceChildren(...rows);
  }
}

function cell(value, kind) {
  return make("td", { text: String(value), kind });
}

/** How a position looks: its text, classes and tooltip. */
function lookOf(run, state, position) {
  const { step, closed } = state;
  const commit = state.commits[position];
  const edges = step && !(run.over && step === run.steps.at(-1)) ? edgesOf(step, position) : "";
  if (position >= closed) {
    return { text: "\u220e", kind: `cell ended${edges}`, title: `${position}: after the end-of-text`, masked: false };
  }
  if (!commit) {
    const within = step !== null && inside(run, step, position);
    const title = `${position}: masked`;
    return { text: within ? "\u2022" : "\u00b7", kind: `cell mask${within ? " in" : ""}${edges}`, title, masked: true };
  }
  const text = run.start.end_ids.includes(commit.token) ? "\u220e" : readable(commit.text);
  const height = level(commit.confidence, run.start.sampler.metric);
  const colour = height === null ? "" : ` c${height}`;
  const fresh = commit.step === step.step ? " now" : "";
  const kind = `cell ${commit.phase}${colour}${fresh}${edges}`;
  return { text, kind, title: titleOf(commit, position), masked: false };
}

function edgesOf(step, position) {
  const [first, end] = step.span;
  return (position === first ? " opens" : "") + (position + 1 === end ? " closes" : "");
}

function titleOf(commit, position) {
  const sure = commit.confidence === null ? "no confidence" : `confidence ${commit.confidence}`;
  return `${position}: ${JSON.stringify(readable(commit.text))}, ${sure}, ${commit.phase} step ${commit.step + 1}`;
}
