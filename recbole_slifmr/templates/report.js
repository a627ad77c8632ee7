"use strict";

const NUMBER = /^[-+]?\d+(\.\d+)?(e[-+]?\d+)?%?(\s*[±[].*)?[\s*]*$/i;
const EMPTY = ["", "nan", "-"];

function sortRows(table, column, rising) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({ row, text: row.cells[column].textContent.trim() }));
  const filled = rows.filter(({ text }) => !EMPTY.includes(text));
  const numbers = filled.every(({ text }) => NUMBER.test(text));
  const compare = numbers
    ? (a, b) => parseFloat(a.text) - parseFloat(b.text)
    : (a, b) => a.text.localeCompare(b.text, "en", { numeric: true });
  filled.sort((a, b) => (rising ? compare(a, b) : compare(b, a)));
  const empty = rows.filter(({ text }) => EMPTY.includes(text));
  body.append(...[...filled, ...empty].map(({ row }) => row));
}

// The first click puts numbers with the largest first, words from a to z; the next turns that round.
function makeSortable(table) {
  const headers = Array.from(table.tHead.rows[0].cells);
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      const texts = Array.from(table.tBodies[0].rows, (row) => row.cells[column].textContent.trim());
      const words = texts.some((text) => !EMPTY.includes(text) && !NUMBER.test(text));
      const rising = before ? before === "descending" : words;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", rising ? "ascending" : "descending");
      sortRows(table, column, rising);
    });
  });
}

function makeEnlargeable(picture) {
  const button = document.createElement("button");
  button.className = "enlarge";
  button.title = "Enlarge";
  picture.replaceWith(button);
  button.append(picture);
  button.addEventListener("click", () => {
    const dialog = document.createElement("dialog");
    const close = document.createElement("button");
    close.textContent = "Close";
    dialog.setAttribute("aria-label", picture.alt);
    dialog.append(close, picture.cloneNode());
    dialog.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  });
}

for (const table of document.querySelectorAll("table")) {
  if (table.tHead && table.tBodies.length) makeSortable(table);
}
document.querySelectorAll("figure img").forEach(makeEnlargeable);
