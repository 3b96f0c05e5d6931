// What is known of a run: its frames, from which the canvas at any step is rebuilt. Nothing here touches the page.

/** One answer on its way. */
export class Run {
  constructor() {
    this.start = null;
    this.steps = [];
    this.end = null;
    this.text = "";
    this.state = "waiting"; // then "running", and "done", "stopped" or "failed"
  }

  /** Take in a chunk of the stream. */
  take(chunk) {
    this.text += chunk.choices?.[0]?.delta?.content ?? "";
    const frame = chunk.diffusion;
    if (frame?.type === "start") {
      this.start = frame;
      this.state = "running";
    } else if (frame?.type === "step") {
      this.steps.push(frame);
    } else if (frame?.type === "end") {
      this.end = frame;
      this.text = frame.text;
      this.state = "done";
    }
  }

  get over() {
    return this.state !== "waiting" && this.state !== "running";
  }

  get length() {
    return this.start?.response_length ?? 0;
  }

  /** The canvas after its first `count` steps. */
  at(count) {
    const commits = new Array(this.length).fill(null);
    for (const step of this.steps.slice(0, count)) {
      for (const commit of step.committed) commits[commit.position] = { ...commit, step: step.step, phase: step.phase };
    }
    const step = count > 0 ? this.steps[count - 1] : null;
    return { commits, step, closed: step?.closed_from ?? this.length, length: this.length };
  }

  /** Forwards, seconds, and tokens for each of them up to there. What follows an end-of-text does not count. */
  counts(count) {
    if (this.end && count === this.steps.length) {
      const { nfe, completion_tokens, tokens_per_forward, seconds } = this.end;
      return { nfe, tpf: tokens_per_forward, seconds, speed: per(completion_tokens, seconds) };
    }
    const { commits, step } = this.at(count);
    if (!step) return { nfe: 0, tpf: null, seconds: 0, speed: null };
    const end = commits.findIndex((commit) => this.start.end_ids.includes(commit?.token));
    const tokens = commits.slice(0, end < 0 ? this.length : end + 1).filter(Boolean).length;
    const nfe = step.step + 1;
    return { nfe, tpf: tokens / nfe, seconds: step.seconds, speed: per(tokens, step.seconds) };
  }
}

function per(count, seconds) {
  return seconds > 0 ? count / seconds : null;
}

/** Whether the span of a state holds a position; one without an end reaches as far as its block. */
export function inside(run, step, position) {
  const [first, end] = step.span;
  return first <= position && position < (end ?? blockEnd(run, first));
}

export function blockEnd(run, first) {
  const block = run.start.sampler.block_length ?? run.length;
  return Math.min(run.length, (Math.floor(first / block) + 1) * block);
}

/**
 * The places of a slider over several runs: how many steps of each are shown there, and when that was.
 *
 * By "steps" the longest run has a place for each of its steps, and of the others an equal share is shown. By "time"
 * there is a place for each step of any of them, as if all had begun together.
 */
export function timeline(runs, scale) {
  if (scale === "time") {
    const times = new Set([0, ...runs.flatMap((run) => run.steps.map((step) => step.seconds))]);
    const sorted = [...times].sort((one, other) => one - other);
    return sorted.map((time) => ({ time, shown: runs.map((run) => until(run, time)) }));
  }
  const most = Math.max(0, ...runs.map((run) => run.steps.length));
  const share = (place, run) => (most ? Math.round((place / most) * run.steps.length) : 0);
  return Array.from({ length: most + 1 }, (_, place) => ({ time: null, shown: runs.map((run) => share(place, run)) }));
}

/** How many steps a run had taken at a time; times never fall. */
function until(run, time) {
  let [low, high] = [0, run.steps.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (run.steps[middle].seconds <= time) low = middle + 1;
    else high = middle;
  }
  return low;
}

const UNSHOWN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

/** A token on one line: none of its control or direction characters may reach the page's layout. */
export function readable(text) {
  const shown = text.replaceAll("\n", "\u21b5").replaceAll("\t", " ").replace(UNSHOWN, "\ufffd");
  return shown || "\ufffd";
}

const LEVELS = [0.5, 0.7, 0.85, 0.95];

/** Which of five levels a confidence has; null where there is none. Entropies are negative, 0 is certainty. */
export function level(confidence, metric) {
  if (confidence === null) return null;
  const share = metric === "entropy" ? Math.exp(confidence) : confidence;
  return LEVELS.filter((least) => share >= least).length;
}
