// Layer by head map: one number per button, the chosen head's map over the picture.
const within = (selector) => [...element.querySelectorAll(selector)];

function paint(canvas, node) {
  const bytes = Uint8Array.from(atob(node.dataset.map), (c) => c.charCodeAt(0));
  canvas.width = +node.dataset.cols; canvas.height = +node.dataset.rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  bytes.forEach((value, n) => {
    image.data.set([16, 14, 34, Math.round(225 * (1 - Math.pow(value / 255, 0.6)))], 4 * n);
  });
  context.putImageData(image, 0, 0);
  canvas.dataset.shown = node.dataset.map;
}

function choose(head) {
  within(".head").forEach((one) => one.setAttribute("aria-pressed", String(one === head)));
  within(".head").forEach((one) => (one.tabIndex = one === head ? 0 : -1));
  const where = head.dataset.where ? `; most at the ${head.dataset.where}` : "";
  element.querySelector(".look").textContent = head.getAttribute("aria-label") + where;
  if (head.dataset.map) paint(element.querySelector("canvas"), head);
}

function measure(name) {
  within(".head").forEach((one) => one.style.setProperty("--v", one.dataset[name] || 0));
  within(".measure").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.name === name)));
  within(".scale").forEach((one) => (one.hidden = one.dataset.name !== name));
}

function begin() {
  const first = element.querySelector('.head[data-first="1"]');
  if (!first) return;
  measure("mass");
  choose(first);
}

element.addEventListener("click", (event) => {
  const head = event.target.closest(".head");
  if (head) choose(head);
  const button = event.target.closest(".measure");
  if (button) measure(button.dataset.name);
});
element.addEventListener("keydown", (event) => {
  const head = event.target.closest(".head");
  if (!head) return;
  const row = +head.dataset.layer, column = +head.dataset.head;
  const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [-1, 0], ArrowUp: [1, 0] }[event.key];
  if (!move) return;
  event.preventDefault();
  const next = element.querySelector(`.head[data-layer="${row + move[0]}"][data-head="${column + move[1]}"]`);
  if (next) { choose(next); next.focus(); }
});
watch("value", begin);
begin();
