"use strict";
// Sections become tabs, and on a narrow screen rows of a table become cards: without this script all of it is there as well.

{
  const tabsOf = (box, number) => {
    const panels = Array.from(box.children);
    if (panels.length < 2) return;
    const list = document.createElement("div");
    list.className = "tablist";
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", box.dataset.label);
    const tabs = panels.map((panel, at) => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.id = `tab-${number}-${at}`;
      tab.textContent = panel.querySelector("h3").textContent;
      tab.dir = "auto";
      tab.setAttribute("role", "tab");
      panel.id = `panel-${number}-${at}`;
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      tab.setAttribute("aria-controls", panel.id);
      return tab;
    });
    const choose = (chosen) => {
      for (const [at, tab] of tabs.entries()) {
        tab.setAttribute("aria-selected", String(at === chosen));
        tab.tabIndex = at === chosen ? 0 : -1;
        panels[at].hidden = at !== chosen;
      }
    };
    list.addEventListener("click", (event) => {
      const at = tabs.indexOf(event.target.closest("[role=tab]"));
      if (at >= 0) choose(at);
    });
    list.addEventListener("keydown", (event) => {
      const at = tabs.indexOf(event.target);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      const next = (to + tabs.length) % tabs.length;
      choose(next);
      tabs[next].focus();
      event.preventDefault();
    });
    list.append(...tabs);
    box.before(list);
    choose(0);
  };
  document.querySelectorAll(".tabs").forEach(tabsOf);

  // A cell of a card is called by the head of its column; a table that is laid out as blocks stays one for a screen reader.
  for (const table of document.querySelectorAll("table")) {
    const heads = Array.from(table.tHead.rows[0].cells, (cell) => cell.textContent);
    table.setAttribute("role", "table");
    for (const row of table.rows) {
      row.setAttribute("role", "row");
      for (const [at, cell] of Array.from(row.cells).entries()) {
        const isHead = cell.tagName === "TH";
        cell.setAttribute("role", !isHead ? "cell" : row.parentNode === table.tHead ? "columnheader" : "rowheader");
        if (row.parentNode !== table.tHead) cell.dataset.head = heads[at];
      }
    }
  }
}
