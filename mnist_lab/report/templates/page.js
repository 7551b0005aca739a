"use strict";
(() => {
  // Tables: a click on a header sorts by it, and the other way round the second time; blanks stay last.
  const valueOf = (cell) => ("number" in cell.dataset ? Number(cell.dataset.number) : cell.textContent);
  const isBlank = (cell) => cell.textContent === "";
  const compare = (one, other) =>
    typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other), "en", { numeric: true });

  function sort(header) {
    const row = header.parentElement;
    const body = header.closest("table").tBodies[0];
    const column = header.cellIndex;
    const direction = header.ariaSort === "ascending" ? "descending" : "ascending";
    for (const other of row.cells) other.ariaSort = "none";
    header.ariaSort = direction;
    const sign = direction === "ascending" ? 1 : -1;
    const sorted = [...body.rows].sort((one, other) => {
      const [a, b] = [one.cells[column], other.cells[column]];
      return isBlank(a) - isBlank(b) || sign * compare(valueOf(a), valueOf(b));
    });
    body.append(...sorted);
  }
  for (const button of document.querySelectorAll(".sortable thead button")) {
    button.addEventListener("click", () => sort(button.parentElement));
  }

  const filter = document.getElementById("filter");
  filter.parentElement.hidden = false;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const row of document.querySelectorAll(".sortable tbody tr")) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
    }
    const rows = [...document.querySelector(".sortable").tBodies[0].rows];
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("filtered").textContent = wanted ? `${shown} of ${rows.length} rows` : "";
  });

  for (const button of document.querySelectorAll("[data-copies]")) {
    const label = button.firstChild;
    const usual = label.textContent;
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copies);
      try {
        await navigator.clipboard.writeText(source.textContent);
        label.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source); // where a page may not write the clipboard, one key is left to press
        label.textContent = "Selected";
      }
      setTimeout(() => (label.textContent = usual), 1500);
    });
  }

  const themes = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  const stored = { get: () => null, set: () => {} };
  try {
    localStorage.getItem("theme");
    stored.get = () => localStorage.getItem("theme");
    stored.set = (theme) => localStorage.setItem("theme", theme);
  } catch {
    // A browser that keeps nothing for files: the choice lasts as long as the page.
  }
  function show(theme) {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  }
  let theme = themes.includes(stored.get()) ? stored.get() : "system";
  show(theme);
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    show(theme);
    stored.set(theme);
  });

  const closed = () => document.querySelectorAll("main details:not([open]):not(.copies)");
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...closed()];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
})();
