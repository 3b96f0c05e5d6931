// One slider over the runs that are shown.

import { timeline } from "./canvas.js";

const LONGEST = 8000; // milliseconds that a replay by steps takes at most
const PACES = [30, 400]; // and its shortest and longest step

export class Replay {
  /** `draw` is called with how many steps of each run are to be shown. */
  constructor(root, draw) {
    const find = (id) => root.querySelector(`#${id}`);
    [this.slider, this.where] = [find("slider"), find("where")];
    [this.back, this.forth, this.button] = [find("back"), find("forth"), find("play")];
    this.scale = root.querySelector("#scale select");
    this.draw = draw;
    this.runs = [];
    this.places = timeline([], "steps");
    this.timer = null;
    this.slider.addEventListener("input", () => this.moved());
    this.back.addEventListener("click", () => this.step(-1));
    this.forth.addEventListener("click", () => this.step(1));
    this.button.addEventListener("click", () => (this.timer === null ? this.play() : this.pause()));
    this.scale.addEventListener("change", () => this.rescale());
    this.refresh();
  }

  get place() {
    return this.slider.valueAsNumber;
  }

  get last() {
    return this.places.length - 1;
  }

  /** Show other runs, from their last step on. */
  open(runs) {
    this.pause();
    this.runs = runs;
    this.follow = true;
    this.refresh();
  }

  /** There may be more steps: stay at the end if that is where the slider was. */
  refresh() {
    this.places = timeline(this.runs, this.scale.value);
    this.slider.max = this.last;
    if (this.follow) this.slider.value = this.last;
    this.slider.disabled = this.button.disabled = this.last === 0;
    this.shown();
  }

  moved() {
    this.pause();
    this.follow = this.place === this.last;
    this.shown();
  }

  step(by) {
    this.slider.value = this.place + by;
    this.moved();
  }

  rescale() {
    this.pause();
    this.follow = true;
    this.refresh();
  }

  shown() {
    const { shown, time } = this.places[this.place];
    const steps = this.runs.map((run, side) => `${shown[side]} of ${run.steps.length}`).join(" and ");
    const stages = this.runs.map((run, side) => run.steps[shown[side] - 1]?.phase);
    const phases = stages.filter(Boolean).join(" and ");
    const when = time === null ? "" : `${time.toFixed(2)} s: `;
    this.where.textContent = when + steps;
    this.slider.setAttribute("aria-valuetext", `${when}step ${steps}${phases && `, ${phases}`}`);
    this.back.disabled = this.place === 0;
    this.forth.disabled = this.place === this.last;
    this.draw(shown);
  }

  play() {
    if (this.place === this.last) this.slider.value = 0;
    this.follow = false;
    this.button.textContent = "Pause";
    this.shown();
    this.wait();
  }

  /** By steps at an even pace, by time as it was. */
  wait() {
    const [now, next] = [this.places[this.place], this.places[this.place + 1]];
    const even = Math.min(PACES[1], Math.max(PACES[0], LONGEST / this.places.length));
    this.timer = setTimeout(() => this.go(), now.time === null ? even : 1000 * (next.time - now.time));
  }

  go() {
    this.slider.value = this.place + 1;
    this.shown();
    if (this.place < this.last) this.wait();
    else this.pause();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.button.textContent = "Play";
  }
}
