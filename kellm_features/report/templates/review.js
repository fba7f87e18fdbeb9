// Links to check: decisions by button or key, kept in this browser, saved as a file that `kellm run` reads.
(() => {
  const review = document.querySelector(".review");
  if (!review) return;
  const { run, header, rows } = JSON.parse(review.dataset.overrides);
  const place = `kellm links ${run}`;
  const cases = [...review.querySelectorAll(".case")];
  const one = (name) => review.querySelector(name);
  let kept = true;

  const read = () => {
    try {
      return new Map(JSON.parse(localStorage.getItem(place) ?? "[]"));
    } catch {
      kept = false; // site data is switched off
      return new Map();
    }
  };
  const decisions = read();
  const keep = () => {
    try {
      localStorage.setItem(place, JSON.stringify([...decisions]));
    } catch {
      kept = false;
    }
  };

  const paint = (item) => {
    const decision = decisions.get(item.dataset.item);
    const choices = [...item.querySelectorAll(".choice")];
    const taken = decision && choices.find((choice) => (choice.dataset.page ?? null) === decision.page);
    for (const choice of choices) choice.setAttribute("aria-pressed", choice === taken);
    item.querySelector(".verdict").textContent = decision ? (taken ? taken.dataset.verdict : `→ ${decision.page}`) : "";
    item.querySelector(".other input").value = decision && !taken ? decision.page : "";
    item.querySelector(".undo").hidden = !decision;
  };
  const tell = () => {
    const decided = cases.filter((item) => decisions.has(item.dataset.item)).length;
    one(".status").textContent =
      `${decided} of ${cases.length} decided here` + (kept ? "" : "; this browser keeps nothing: save before you leave");
    one(".save").disabled = !decisions.size;
  };
  const decide = (item, decision) => {
    if (decision) decisions.set(item.dataset.item, decision);
    else decisions.delete(item.dataset.item);
    keep();
    paint(item);
    tell();
  };

  const go = (item, step) => {
    const shown = cases.filter((other) => !other.hidden || other === item);
    const next = shown[shown.indexOf(item) + step];
    if (!next) return;
    item.open = false; // browsers that do not know details[name] leave it open
    next.open = true;
    next.querySelector("summary").focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
  };
  const filter = () => {
    const kind = one(".filters [aria-pressed=true]").dataset.kind;
    const words = one(".find").value.trim().toLowerCase();
    for (const item of cases) {
      item.hidden =
        (kind && item.dataset.kind !== kind) ||
        (one(".open-only").checked && decisions.has(item.dataset.item)) ||
        !item.querySelector("summary").textContent.toLowerCase().includes(words);
    }
  };

  for (const item of cases) {
    const { label } = item.dataset;
    for (const choice of item.querySelectorAll(".choice")) {
      choice.addEventListener("click", () => {
        const { page = null, note } = choice.dataset;
        decide(item, { page, note });
        go(item, 1);
      });
    }
    const field = item.querySelector(".other input");
    const use = () => {
      const page = field.value.trim();
      if (page) decide(item, { page, note: `${label}: given by hand` });
    };
    item.querySelector(".use").addEventListener("click", use);
    field.addEventListener("keydown", (event) => event.key === "Enter" && use());
    item.querySelector(".undo").addEventListener("click", () => decide(item, null));
    item.addEventListener("keydown", (event) => {
      if (event.target === field || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "j" || event.key === "k") go(item, event.key === "j" ? 1 : -1);
      else if (item.open) item.querySelector(`[data-keys*="${CSS.escape(event.key)}"]`)?.click();
    });
    item.querySelector(".choices").hidden = false;
    paint(item);
  }
  for (const button of review.querySelectorAll(".filters button")) {
    button.addEventListener("click", () => {
      for (const other of review.querySelectorAll(".filters button")) other.setAttribute("aria-pressed", other === button);
      filter();
    });
  }
  one(".open-only").addEventListener("change", filter);
  one(".find").addEventListener("input", filter);
  one(".save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([overridesCsv(header, rows, decisions)], { type: "text/csv" }));
    link.download = "overrides.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  one(".tools").hidden = one(".saving").hidden = false;
  tell();
})();
