"""What makes a report answer: tables that sort, lists that filter, charts that say the numbers under the pointer."""

from __future__ import annotations

from megatron_rlvr.pages.charts import FRAME

SCRIPT = """
'use strict';
const frame = {left: LEFT, width: WIDTH};
const show = value => Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 || value === 0
  ? String(+value.toPrecision(4)) : value.toExponential(2);

for (const figure of document.querySelectorAll('figure[data-chart]')) {
  const {x, lines} = JSON.parse(document.getElementById(figure.dataset.chart).textContent);
  const plot = figure.querySelector('.plot'), cursor = figure.querySelector('.cursor');
  const output = figure.querySelector('output');
  const all = [...new Set(lines.flatMap(line => line.steps))].sort((a, b) => a - b);
  const nearest = (steps, step) => steps.reduce((best, one, place) =>
    Math.abs(one - step) < Math.abs(steps[best] - step) ? place : best, 0);
  let place = all.length - 1;
  const tell = () => {
    const step = all[place];
    cursor.style.left = `${100 * (frame.left + frame.width * (step - x[0]) / (x[1] - x[0]))}%`;
    cursor.hidden = false;
    const parts = lines.map(line => {
      const at = nearest(line.steps, step), other = Math.abs(line.steps[at] - step) > line.span / 2;
      return `${lines.length > 1 ? line.label + ' ' : ''}${show(line.values[at])}`
        + (other ? ` (step ${Math.round(line.steps[at])})` : '');
    });
    output.textContent = `step ${Math.round(step)}: ${parts.join(' · ')}`;
  };
  const forget = () => { cursor.hidden = true; output.textContent = ''; };
  plot.addEventListener('pointermove', event => {
    const box = plot.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - frame.left) / frame.width;
    place = nearest(all, x[0] + share * (x[1] - x[0]));
    tell();
  });
  plot.addEventListener('pointerleave', forget);
  plot.addEventListener('focus', tell);
  plot.addEventListener('blur', forget);
  plot.addEventListener('keydown', event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10}[event.key];
    if (!move) return;
    event.preventDefault();
    place = Math.min(all.length - 1, Math.max(0, place + move));
    tell();
  });
}

for (const table of document.querySelectorAll('table.sorts')) {
  table.querySelectorAll('thead th').forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of table.querySelectorAll('th')) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [left, right] = [key(a), key(b)];
        const order = left !== '' && right !== '' && !isNaN(left) && !isNaN(right)
          ? left - right : String(left).localeCompare(String(right));
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

for (const form of document.querySelectorAll('form.filter')) {
  const items = [...document.querySelectorAll(form.dataset.items)], count = form.querySelector('output');
  const apply = () => {
    const wanted = form.querySelector('input').value.toLowerCase();
    for (const item of items) item.hidden = !item.textContent.toLowerCase().includes(wanted);
    count.textContent = `${items.filter(item => !item.hidden).length} of ${items.length}`;
  };
  form.hidden = false;
  form.addEventListener('input', apply);
  form.addEventListener('submit', event => event.preventDefault());
  apply();
}
""".replace("LEFT", str(FRAME[0])).replace("WIDTH", str(FRAME[2]))
