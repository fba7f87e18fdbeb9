"use strict";
// Titles on hover, the same item ringed on both maps, and one genre at a time. The page reads without it too.
(() => {
  const maps = [...document.querySelectorAll("figure.map svg")];
  if (!maps.length) return;
  const tip = document.getElementById("tip");
  const panels = maps.map((svg) => ({
    svg,
    ring: svg.querySelector(".ring"),
    points: [...svg.querySelectorAll("circle[data-i]")].map((circle) => ({
      circle,
      id: circle.dataset.i,
      x: +circle.getAttribute("cx"),
      y: +circle.getAttribute("cy"),
      group: circle.parentNode,
    })),
  }));
  const titles = new Map();
  for (const panel of panels) {
    panel.byId = new Map(panel.points.map((point) => [point.id, point]));
    for (const { circle, id } of panel.points) {
      const title = circle.querySelector("title");
      titles.set(id, title.textContent);
      title.remove(); // the browser's own tooltip comes late and would stand beside ours
    }
  }
  const reach = 14;
  const clear = () => {
    tip.hidden = true;
    for (const { ring } of panels) ring.setAttribute("cx", -20);
  };
  const point = (panel, event) => {
    const box = panel.svg.getBoundingClientRect();
    const scale = panel.svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    let best = null;
    let least = reach * reach;
    for (const candidate of panel.points) {
      if (candidate.group.classList.contains("dim")) continue;
      const distance = (candidate.x - x) ** 2 + (candidate.y - y) ** 2;
      if (distance < least) [best, least] = [candidate, distance];
    }
    if (!best) return clear();
    for (const other of panels) {
      const twin = other.byId.get(best.id);
      other.ring.setAttribute("cx", twin.x);
      other.ring.setAttribute("cy", twin.y);
    }
    tip.textContent = titles.get(best.id);
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, room))}px`;
    tip.style.top = `${event.clientY + 16}px`;
  };
  for (const panel of panels) {
    panel.svg.addEventListener("pointermove", (event) => point(panel, event));
    panel.svg.addEventListener("pointerdown", (event) => point(panel, event));
    panel.svg.addEventListener("pointerleave", clear);
  }
  const buttons = [...document.querySelectorAll(".legend button")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      for (const other of buttons) other.setAttribute("aria-pressed", on && other === button);
      for (const group of document.querySelectorAll("figure.map g[class^=p]")) {
        group.classList.toggle("dim", on && !group.classList.contains(button.dataset.p));
      }
      clear();
    });
  }
})();
