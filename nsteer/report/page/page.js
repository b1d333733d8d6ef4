"use strict";
// The theme button, and the claims table: rows that open, columns that sort.

(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => button.setAttribute("aria-pressed", String(dark()));
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; show(); });
  system.addEventListener("change", show);
  show();
})();

(() => {
  const table = document.getElementById("claims-table");
  if (!table) return;
  const heads = [...table.querySelectorAll("thead th")];
  const bodies = [...table.tBodies];

  for (const body of bodies) {
    const [row, more] = body.rows;
    const name = row.cells[0];
    const opener = document.createElement("button");
    opener.type = "button";
    opener.className = "opener";
    opener.append(...name.childNodes);
    more.id = `more-${body.dataset.at}`;
    more.hidden = true;
    opener.setAttribute("aria-expanded", "false");
    opener.setAttribute("aria-controls", more.id);
    opener.addEventListener("click", () => {
      more.hidden = !more.hidden;
      opener.setAttribute("aria-expanded", String(!more.hidden));
    });
    name.append(opener);
    [...row.cells].forEach((cell, i) => {
      if (i) cell.dataset.name = heads[i].textContent;
      cell.classList.toggle("none", !cell.textContent.trim());
    });
  }

  const value = (body, column) => {
    const cell = body.rows[0].cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    return { text, number: text === "" ? NaN : Number(text) };
  };
  const compare = (a, b) => {
    if (!Number.isNaN(a.number) && !Number.isNaN(b.number)) return a.number - b.number;
    if (Number.isNaN(a.number) !== Number.isNaN(b.number)) return Number.isNaN(a.number) ? 1 : -1;
    return a.text.localeCompare(b.text);
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((one) => one.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sorted = bodies.map((body) => [value(body, column), body]);
      sorted.sort((a, b) => (down ? -1 : 1) * compare(a[0], b[0]) || a[1].dataset.at - b[1].dataset.at);
      table.append(...sorted.map(([, body]) => body));
    });
  });
})();
