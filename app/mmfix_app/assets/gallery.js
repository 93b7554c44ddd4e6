// A click on a thumbnail chooses its picture.
element.addEventListener("click", (event) => {
  const thumb = event.target.closest(".thumb");
  if (!thumb) return;
  element.querySelectorAll(".thumb").forEach((one) => one.setAttribute("aria-pressed", String(one === thumb)));
  trigger("choose", { index: +thumb.dataset.index });
});
