// Behaviour of everything that shows a map over the picture. Delegated to `element`, because its content is replaced
// on every update. `element` and `watch` are given by the page.
const veil = [16, 14, 34];
const state = { pinned: null };

function cells(node) {
  const bytes = Uint8Array.from(atob(node.dataset.map), (c) => c.charCodeAt(0));
  return { rows: +node.dataset.rows, cols: +node.dataset.cols, bytes };
}

// Dark where the node does not look, clear where it does.
function paint(canvas, node) {
  const context = canvas.getContext("2d");
  if (!node || !node.dataset.map) { context.clearRect(0, 0, canvas.width, canvas.height); return; }
  const { rows, cols, bytes } = cells(node);
  canvas.width = cols; canvas.height = rows;
  const image = context.createImageData(cols, rows);
  bytes.forEach((value, n) => {
    image.data.set([...veil, Math.round(225 * (1 - Math.pow(value / 255, 0.6)))], 4 * n);
  });
  context.putImageData(image, 0, 0);
  canvas.dataset.shown = node.dataset.map;
}

const within = (root, selector) => [...root.querySelectorAll(selector)];
const sides = () => within(element, ".side");
const words = (side) => within(side, ".answer .tok");

const said = (word) => word.childNodes[0].textContent;

const isObject = (word) => word.matches(".supported, .contradicted, .unknown");

// The same word on the other side if it is there, else the nearest of its kind.
function partner(side, chosen) {
  const list = words(side), i = +chosen.dataset.i;
  const away = (word) => Math.abs(+word.dataset.i - i);
  const same = list.filter((word) => said(word) === said(chosen));
  const alike = same.length ? same : list.filter((word) => /\w/.test(said(word)) && isObject(word) === isObject(chosen));
  return (alike.length ? alike : list).reduce((best, word) => (best && away(best) <= away(word) ? best : word), null);
}

// The newest word of each side without a choice; otherwise the chosen word and its partner.
function show(chosen, fixed) {
  for (const side of sides()) {
    const list = words(side);
    const word = !chosen ? list[list.length - 1] : side.contains(chosen) ? chosen : partner(side, chosen);
    within(side, ".on").forEach((node) => node.classList.remove("on", "fixed"));
    if (!word) continue;
    word.classList.add("on");
    if (fixed) word.classList.add("fixed");
    within(side, `.bar[data-i="${word.dataset.i}"]`).forEach((bar) => bar.classList.add("on"));
    paint(side.querySelector("canvas"), word);
    const look = side.querySelector(".look");
    if (word.dataset.map) {
      look.textContent = `As it chose “${said(word)}”, ${word.dataset.share} of attention was on the picture, where it is light, most at the ${word.dataset.where}`;
    }
    list.forEach((other) => (other.tabIndex = other === word ? 0 : -1));
  }
}

const wordAt = (side, i) => element.querySelector(`.side[data-side="${side}"] .answer .tok[data-i="${i}"]`);

function rest() {
  const stage = element.querySelector(".stage");
  if (!stage || stage.dataset.state === "empty") return;
  if (stage.dataset.state === "running") { state.pinned = null; show(null, false); return; }
  const [side, i] = state.pinned || [stage.dataset.focusSide, stage.dataset.focus];
  show(wordAt(side, i), true);
}

// The word that an event is about: itself, or that of a bar in the strip.
function target(event) {
  const node = event.target.closest(".answer .tok, .bar");
  if (!node || node.matches(".tok")) return node;
  return wordAt(node.closest(".side").dataset.side, node.dataset.i);
}

function pin(word) {
  state.pinned = [word.closest(".side").dataset.side, word.dataset.i];
  show(word, true);
}

element.addEventListener("mouseover", (event) => {
  const word = target(event);
  if (word) show(word, false);
});
element.addEventListener("mouseleave", rest);
element.addEventListener("click", (event) => {
  const word = target(event);
  if (word) pin(word);
});
element.addEventListener("keydown", (event) => {
  const word = event.target.closest(".answer .tok");
  if (!word) return;
  const list = words(word.closest(".side"));
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key] || 0;
  if (!step && !["Home", "End", "Enter", " "].includes(event.key)) return;
  event.preventDefault();
  const ends = { Home: list[0], End: list[list.length - 1] };
  const next = ends[event.key] || list[list.indexOf(word) + step];
  if (!next) return;
  pin(next);
  next.focus();
});
watch("value", () => {
  const stage = element.querySelector(".stage");
  if (stage && stage.dataset.state !== "done") state.pinned = null;
  if (stage && stage.dataset.state === "running" && !state.seen && innerWidth < 760) element.scrollIntoView();
  state.seen = stage && stage.dataset.state === "running";
  rest();
});
rest();
