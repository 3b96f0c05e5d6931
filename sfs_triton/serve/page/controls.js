// Controls, and the request that they make. What is left empty is left to the server, which has all defaults.

import { make } from "./view.js";

const UNKNOWN = "default"; // what stands in an empty field until a run has told what the server takes
const BLOCK = { name: "block_length", label: "block length", type: "count", help: "Positions decided before the next" };
const WHEN = [["", "free"], ["last", "last"], ["never", "never"]]; // not sent: what the server does without
const EOS = [
  { name: "eos", label: "end-of-text", options: WHEN, help: "Chosen as any token, committed last, or never" },
  { name: "eos_stop", label: "stop at end-of-text", type: "flag", help: "What follows it is not computed" },
];
const METRICS = ["confidence", "maskgit_plus", "topk_margin", "entropy", "origin"];

const SAMPLERS = {
  slowfast: {
    label: "SlowFast",
    fields: [
      { name: "preset", label: "preset", values: ["paper", "fast", "llada-reference", "dream-reference"], front: true },
      { name: "tau_high", label: "\u03c4 high", type: "share", help: "Confidence to be filled in by a fast step" },
      { name: "tau_min", label: "\u03c4 min", type: "share", help: "Confidence of a candidate for the span's end" },
      { name: "tau_slow", label: "\u03c4 slow", type: "share", help: "The same as \u03c4 high in slow steps" },
      { name: "k_max", label: "k max", type: "count", help: "Most slow steps of a cycle" },
      { name: "window", label: "window", type: "count", help: "Estimates of the end that have to agree" },
      BLOCK,
      ...EOS,
    ],
  },
  vanilla: {
    label: "vanilla",
    fields: [{ name: "metric", label: "order by", values: METRICS }, BLOCK, ...EOS],
  },
  fixed: {
    label: "fixed steps",
    fields: [
      { name: "steps", label: "steps", type: "count", help: "Steps in all", front: true },
      { name: "metric", label: "order by", values: METRICS },
      BLOCK,
      ...EOS,
    ],
  },
  threshold: {
    label: "threshold",
    fields: [
      { name: "tau", label: "\u03c4", type: "share", help: "Confidence to be filled in", front: true },
      { name: "steps", label: "steps", type: "count", help: "Sets a quota for each step" },
      BLOCK,
      ...EOS,
    ],
  },
  "": { label: "the server\u2019s", fields: [] },
};

const CACHES = {
  none: { label: "none", fields: [] },
  region: {
    label: "region",
    fields: [
      { name: "capacity", label: "capacity", type: "count", help: "Rows of a step" },
      { name: "refresh_every", label: "refresh every", type: "count", help: "Steps between two whole forwards" },
    ],
  },
  prefix: { label: "prefix (not with SlowFast)", fields: [] },
  dual: { label: "dual (not with SlowFast)", fields: [] },
  refresh: {
    label: "refresh",
    fields: [
      { name: "prompt_interval", label: "prompt every", type: "count", help: "Steps between two of the prompt" },
      { name: "response_interval", label: "response every", type: "count", help: "Steps between two of the response" },
      { name: "ratio", label: "ratio", type: "share", help: "Of positions recomputed between them" },
    ],
  },
  "": { label: "the server\u2019s", fields: [] },
};

const COMMON = [
  { name: "max_tokens", label: "positions", type: "count", value: 128, help: "Length of the canvas" },
  { name: "temperature", label: "temperature", type: "share", most: 2, value: 0, help: "0 takes the likeliest token" },
  { name: "top_p", label: "top-p", type: "share", help: "Over 0, up to 1" },
  { name: "seed", label: "seed", type: "count", least: 0, help: "Of the noise; drawn if empty" },
  { name: "stop", label: "stop string", type: "text", help: "The answer ends before it" },
];

/** What a sampler is called here; the server knows vanilla as fixed steps without a number of them. */
export function nameOf({ kind, steps }) {
  return SAMPLERS[kind === "fixed" && steps === null ? "vanilla" : kind].label;
}

/** What is asked for on both sides. */
export class Common {
  constructor(root) {
    this.inputs = COMMON.map((spec) => append(root, spec));
  }

  /** Lengths that the model has room for. */
  limit(context) {
    this.inputs[0].max = context;
  }

  read() {
    return values(this.inputs);
  }
}

/** Sampler and cache of one side. */
export class Choices {
  constructor(root, name, sampler) {
    this.sampler = new Choice(root, { name: "sampler", label: "sampler" }, SAMPLERS, sampler);
    this.cache = new Choice(root, { name: "cache", label: "cache" }, CACHES, "none");
    const more = make("div", { kind: "row" });
    const summary = make("summary", { text: "Thresholds, lengths and other options" });
    root.append(make("details", { kind: "more" }, summary, more));
    for (const choice of [this.sampler, this.cache]) choice.place(root.querySelector(".front"), more);
    root.addEventListener("change", ({ target }) => target.name === "preset" && this.sampler.forget());
    root.querySelector("legend").textContent = `Sampler and cache of canvas ${name}`;
  }

  get label() {
    return this.sampler.label;
  }

  read() {
    return { ...this.sampler.read(), ...this.cache.read() };
  }

  learn({ sampler, cache }) {
    this.sampler.learn(sampler);
    this.cache.learn(cache);
  }
}

/** A kind, and the options that it has. */
class Choice {
  constructor(root, spec, kinds, kind) {
    this.name = spec.name;
    this.kinds = kinds;
    const front = root.querySelector(".front") ?? root.appendChild(make("div", { kind: "row front" }));
    const labels = Object.entries(kinds).map(([value, { label }]) => [value, label]);
    this.select = append(front, { ...spec, options: labels });
    this.select.value = kind;
    this.inputs = [];
  }

  get label() {
    return this.kinds[this.select.value].label;
  }

  /** Put options where they belong, now and whenever the kind changes. */
  place(front, more) {
    const anchor = this.select.closest("label");
    const fill = () => {
      for (const input of this.inputs) input.closest("label").remove();
      const { fields } = this.kinds[this.select.value];
      this.inputs = fields.map((spec) => append(spec.front ? front : more, spec));
      const fronted = this.inputs.filter((input) => front.contains(input)).map((input) => input.closest("label"));
      anchor.after(...fronted);
    };
    this.select.addEventListener("change", fill);
    fill();
  }

  read() {
    const kind = this.select.value;
    return kind ? { [this.name]: { kind, ...values(this.inputs) } } : {};
  }

  /** Show in empty fields what the server has used for them. */
  learn(used) {
    for (const input of this.numbers) input.placeholder = used[input.name] ?? "none";
  }

  /** What was learnt is of another preset. */
  forget() {
    for (const input of this.numbers) input.placeholder = UNKNOWN;
  }

  get numbers() {
    return this.inputs.filter((input) => input.type === "number");
  }
}

/** A labelled control for a setting. */
function append(root, spec) {
  const input = control(spec);
  input.name = spec.name;
  const label = make("label", { kind: spec.type === "flag" ? "check" : "field" });
  if (spec.help) label.title = spec.help;
  const text = make("span", { text: spec.label });
  label.append(...(spec.type === "flag" ? [input, text] : [text, input]));
  root.append(label);
  return input;
}

function control({ type, values: names, options, value = "", least, most }) {
  const listed = options ?? names?.map((name) => [name, name]);
  if (listed) return make("select", {}, ...listed.map(([value, text]) => make("option", { value, text })));
  if (type === "flag") return make("input", { type: "checkbox" });
  if (type === "text") return make("input", { type: "text", maxlength: 256, autocomplete: "off" });
  const range = type === "share" ? { step: "any", min: 0, max: most ?? 1 } : { step: 1, min: least ?? 1 };
  return make("input", { type: "number", inputmode: "decimal", value, placeholder: UNKNOWN, ...range });
}

/** What was filled in, with the types that the server insists on. */
function values(inputs) {
  const given = {};
  for (const input of inputs) {
    if (input.type === "checkbox") {
      if (input.checked) given[input.name] = true;
    } else if (input.value !== "") {
      given[input.name] = input.type === "number" ? input.valueAsNumber : input.value;
    }
  }
  return given;
}
