// A table whose columns sort by the numbers behind the text.
element.addEventListener("click", (event) => {
  const button = event.target.closest("th button");
  if (!button) return;
  const cell = button.closest("th"), body = cell.closest("table").querySelector("tbody");
  const column = [...cell.parentNode.children].indexOf(cell);
  const down = cell.getAttribute("aria-sort") !== "descending";
  cell.parentNode.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
  cell.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.children[column].dataset.v;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    const order = x === "" || y === "" ? (x === "") - (y === "") : isNaN(x) ? x.localeCompare(y) : x - y;
    return down && x !== "" && y !== "" ? -order : order;
  });
  rows.forEach((row) => body.append(row));
});
