for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => {
    const text = row.cells[i].textContent.trim(), number = /^[+-]?\d[\d.]*/.exec(text);
    return number ? Number(number[0]) * (/^[+-]?[\d.]+\/255/.test(text) ? 1 / 255 : 1) : text;
  };
  const before = (a, b) => typeof a === typeof b ? (typeof a === "number" ? a - b : a.localeCompare(b)) : typeof a === "number" ? -1 : 1;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sorted = head.getAttribute("aria-sort"), filled = [], empty = [];
      for (const row of body.rows) (row.cells[i].textContent.trim() === "\u2013" ? empty : filled).push(row);
      const words = filled.every(row => typeof key(row, i) === "string");
      const down = sorted ? sorted === "ascending" : !words;  // numbers from the largest, words from A
      filled.sort((a, b) => (down ? -1 : 1) * before(key(a, i), key(b, i)));
      body.append(...filled, ...empty);
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}
