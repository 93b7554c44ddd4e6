// Light or dark; the visitor's system decides until the button is pressed.
element.addEventListener("click", (event) => {
  if (event.target.closest(".theme")) document.body.classList.toggle("dark");
});
