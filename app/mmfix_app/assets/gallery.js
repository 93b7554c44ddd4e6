// A click on a thumbnail chooses its picture; the one that stands in the picture box is marked.
element.addEventListener("click", (event) => {
  const thumb = event.target.closest(".thumb");
  if (thumb) trigger("choose", { index: +thumb.dataset.index });
});
function mark() {
  const shown = document.querySelector("#picture img")?.src || "";
  element.querySelectorAll(".thumb").forEach((one) => {
    one.setAttribute("aria-pressed", String(shown.endsWith(`/gallery/${one.dataset.name}`)));
  });
}
new MutationObserver(mark).observe(document.body, { // the picture box may come later than the gallery
  childList: true, subtree: true, attributes: true, attributeFilter: ["src"],
});
mark();
