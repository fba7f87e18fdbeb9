// The file of overrides: the rows in force with the decisions in their place, the new ones after them.
function overridesCsv(header, rows, decisions) {
  // decisions: Map of item id -> {page, note}; page null takes the item out of the file.
  const item = header.indexOf("item_id");
  const rowOf = (id, { page, note }) => header.map((name) => ({ item_id: id, page, note })[name] ?? "");
  const left = new Map(decisions);
  const merged = [];
  for (const row of rows) {
    const id = row[item].trim();
    if (!decisions.has(id)) merged.push(row);
    else if (left.has(id) && left.get(id).page !== null) merged.push(rowOf(id, left.get(id)));
    left.delete(id);
  }
  for (const [id, decision] of left) if (decision.page !== null) merged.push(rowOf(id, decision));
  const cell = (text) => (/[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return [header, ...merged].map((row) => row.map(cell).join(",") + "\n").join("");
}
