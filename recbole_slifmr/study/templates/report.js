"use strict";

const NUMBER = /^[-+]?\d+(\.\d+)?(e[-+]?\d+)?%?(\s*[±[].*)?[\s*]*$/i;
const EMPTY = ["", "nan", "-"];

function byNumber(a, b) {
  return parseFloat(a.text) - parseFloat(b.text);
}

function byWord(a, b) {
  return a.text.localeCompare(b.text, "en", { numeric: true });
}

// The first click puts numbers with the largest first, words from a to z; the next turns that round. Empty cells stay last.
function sortBy(table, column) {
  const headers = table.tHead.rows[0].cells;
  const entries = Array.from(table.tBodies[0].rows, (row) => ({ row, text: row.cells[column].textContent.trim() }));
  const filled = entries.filter(({ text }) => !EMPTY.includes(text));
  const numbers = filled.every(({ text }) => NUMBER.test(text));
  const before = headers[column].getAttribute("aria-sort");
  const rising = before ? before === "descending" : !numbers;
  const compare = numbers ? byNumber : byWord;
  filled.sort((a, b) => (rising ? compare(a, b) : compare(b, a)));
  for (const { row } of filled.concat(entries.filter((entry) => !filled.includes(entry)))) table.tBodies[0].append(row);
  for (const header of headers) header.removeAttribute("aria-sort");
  headers[column].setAttribute("aria-sort", rising ? "ascending" : "descending");
}

function makeSortable(table) {
  Array.from(table.tHead.rows[0].cells).forEach((header, column) => {
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sortBy(table, column));
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
