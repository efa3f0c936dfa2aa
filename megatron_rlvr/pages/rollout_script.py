"""What makes a page of tokens answer: colouring, filters, order, the numbers of one token, and a picture of all."""

from __future__ import annotations

ROLLOUT_STYLE = """
#controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; }
#controls select { margin: 0; max-width: 100%; }
#controls label { display: grid; gap: .15rem; font-size: .85rem; color: var(--muted); }
.ramp { display: inline-block; width: 7rem; height: .7rem; vertical-align: baseline; border-radius: .2rem; }
#token { position: sticky; top: 0; z-index: 1; margin: .75rem 0; }
#token dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .2rem .9rem; margin: 0;
  background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; padding: .6rem .9rem;
  box-shadow: 0 2px 8px rgb(0 0 0 / .12); max-height: 40vh; overflow: auto;
}
#token dt { color: var(--muted); font-size: .75rem; }
#token dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tokens {
  margin: .5rem 0 0; padding: .2rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .9rem/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.ramp, .tokens span { print-color-adjust: exact; }
.tokens span { unicode-bidi: isolate; border-radius: .2rem; padding: .12rem 0; cursor: default; }
.tokens span.dim { opacity: .28; }
.tokens span.now { outline: 2px solid var(--focus); outline-offset: -1px; }
#scatter svg { max-width: 44rem; margin: 0; }
#scatter text { fill: var(--muted); font-size: 11px; }
#scatter line { stroke: var(--grid); }
#scatter circle { fill: var(--c1); fill-opacity: .6; }
#scatter circle.dim { fill: var(--muted); fill-opacity: .2; }
#scatter circle.now { fill: var(--c2); fill-opacity: 1; }
@media print { #controls, #token { display: none; } }
"""

SCRIPT = r"""
'use strict';
const record = JSON.parse(document.getElementById('record').textContent);
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const floats = text => new Float32Array(bytes(text).buffer);
const tokens = floats(record.tokens);
const columns = record.columns.map(one => ({...one, values: one.flag ? bytes(one.values) : floats(one.values)}));
const named = name => columns.find(one => one.name === name);
const flags = columns.filter(one => one.flag);
const make = (tag, text, parts = {}) => {
  const made = Object.assign(document.createElement(tag), parts);
  if (text !== undefined) made.textContent = text;
  return made;
};

// colour: how much of which hue a value gets
const scale = column => {
  if (column.flag) {
    const marked = column.kind === 'off' ? 0 : 1;
    return {of: value => [value === marked ? .5 : 0, '--c2'], ends: ['', column.kind === 'off' ? 'no' : 'yes']};
  }
  const shape = {rank: Math.log, ratio: Math.log}[column.name] || (value => value);
  const finite = Array.from(column.values).map(shape).filter(Number.isFinite).sort((a, b) => a - b);
  const at = share => finite.length ? finite[Math.round(share * (finite.length - 1))] : 0;
  const back = value => (shape === Math.log ? Math.exp(value) : value);
  if (column.kind === 'sign' || column.kind === 'ratio') {
    const reach = Math.max(Math.abs(at(.02)), Math.abs(at(.98))) || 1;
    const of = value => [Math.min(1, Math.abs(shape(value)) / reach) * .6, shape(value) < 0 ? '--c1' : '--c2'];
    return {of, ends: [back(-reach), back(reach)]};
  }
  const low = at(.02), high = at(.98), span = high - low || 1;
  const part = value => Math.min(1, Math.max(0, (shape(value) - low) / span));
  const of = value => [(column.kind === 'low' ? 1 - part(value) : part(value)) * .6, '--c2'];
  return {of, ends: column.kind === 'low' ? [back(high), back(low)] : [back(low), back(high)]};
};
const mix = (share, hue) => Number.isNaN(share) ? 'none'
  : `color-mix(in srgb, var(${hue}) ${(100 * share).toFixed(0)}%, transparent)`;
const show = value => typeof value !== 'number' ? value : Number.isNaN(value) ? '–'
  : Number.isFinite(value) ? String(+value.toPrecision(5)) : String(value).replace('Infinity', '∞');
const read = (column, token) => column.flag ? ['no', 'yes', '–'][column.values[token]] : show(column.values[token]);

// controls
const controls = document.getElementById('controls');
const choice = (id, label, options) => {
  const field = make('select', undefined, {id});
  for (const [value, text] of options) field.append(make('option', text, {value}));
  const whole = make('label', label, {htmlFor: id});
  whole.append(field);
  controls.append(whole);
  field.addEventListener('input', draw);
  return field;
};
const verdict = row => row.right === null ? 'none' : row.right ? 'right' : 'wrong';
const prompts = [...new Set(record.responses.map(row => row.prompt_id))];
const colour = choice('colour', 'Colour by', columns.map(one => [one.name, one.label]));
const verdicts = choice('verdict', 'Verdict',
  [['', 'all'], ['right', 'right'], ['wrong', 'wrong'], ['none', 'not judged']]);
const prompt = choice('prompt', 'Prompt', [['', 'all'], ...prompts.map(id => [id, id])]);
const method = choice('method', 'Tokens that are', [['', 'any'], ...flags.flatMap(one => one.kind === 'off'
  ? [[`${one.name}=0`, `not ${one.label}`]] : [[`${one.name}=1`, one.label]])]);
const below = choice('below', 'Probability', [['', 'any'], ...['0.5', '0.1', '0.01', '0.001'].map(p => [p, `≤ ${p}`])]);
const order = choice('order', 'Order', [['', 'as sampled'], ['reward', 'highest reward'], ['tokens', 'longest'],
  ['least', 'least probable token'], ['matches', 'most such tokens']]);

// responses
const place = document.getElementById('responses');
const articles = record.responses.map((row, index) => {
  const article = make('article');
  const said = verdict(row), head = make('p');
  head.append(make('strong', {right: 'right', wrong: 'wrong', none: 'not judged'}[said], {className: said}),
    ` · reward ${row.reward === null ? 'none' : row.reward} · prompt ${row.prompt_id}, sample ${row.sample}`
    + ` · ${row.tokens} tokens${row.finish_reason === 'length' ? ', cut off' : ''}`
    + (row.stop - row.start < row.tokens ? `, ${row.stop - row.start} recorded` : ''));
  const facts = make('dl');
  for (const [name, value] of [['Prompt', row.prompt], ['Read as', row.extracted ?? '—'], ['Answer', row.answer]]) {
    const fact = make('dd');
    fact.append(make('pre', value));
    facts.append(make('dt', name), fact);
  }
  const line = make('div', undefined, {className: 'tokens', tabIndex: 0});
  line.setAttribute('role', 'group');
  line.setAttribute('aria-label', `Tokens of response ${index + 1}; arrow keys move from one to the next`);
  for (let token = row.start; token < row.stop; token++) {
    const text = record.texts[tokens[token]];
    const span = make('span', text.replace(/\n/g, '⏎\n') || '∅');
    span.dataset.token = token;
    line.append(span);
  }
  article.append(head, facts, line);
  return {row, article, line, matches: 0, least: 0};
});
const log_prob = named('log_prob');

// every token by probability and entropy; of very many, evenly chosen ones
const shape = (tag, parts, text) => {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(parts)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const circles = new Map(), spans = new Map();
for (const item of articles) for (const span of item.line.children) spans.set(+span.dataset.token, span);
const entropies = named('entropy');
if (entropies) {
  const size = {left: 46, right: 690, top: 12, bottom: 262};
  const picture = shape('svg', {viewBox: '0 0 700 300', role: 'img',
    'aria-label': 'Each token by its probability and the entropy before it'});
  const most = entropies.values.filter(Number.isFinite).reduce((high, value) => Math.max(high, value), .1);
  const x = p => size.right + (size.right - size.left) * Math.max(-5, Math.log10(p)) / 5;
  const y = value => size.bottom - (size.bottom - size.top) * value / most;
  for (const power of [-5, -4, -3, -2, -1, 0]) {
    const at = x(10 ** power);
    picture.append(shape('line', {x1: at, x2: at, y1: size.top, y2: size.bottom}),
      shape('text', {x: at, y: 278, 'text-anchor': 'middle'}, power ? `1e${power}` : '1'));
  }
  for (const share of [0, .5, 1]) {
    const at = y(share * most);
    picture.append(shape('line', {x1: size.left, x2: size.right, y1: at, y2: at}),
      shape('text', {x: 40, y: at + 4, 'text-anchor': 'end'}, (share * most).toFixed(2)));
  }
  picture.append(shape('text', {x: 368, y: 296, 'text-anchor': 'middle'}, 'probability'),
    shape('text', {x: 50, y: 10}, 'entropy, nats'));
  const all = [...spans.keys()].filter(token => !Number.isNaN(log_prob.values[token]));
  const every = Math.ceil(all.length / 5000);
  for (const token of all.filter((_, place) => place % every === 0)) {
    const circle = shape('circle', {cx: x(Math.exp(log_prob.values[token])), cy: y(entropies.values[token]), r: 3.5});
    circle.dataset.token = token;
    circles.set(token, circle);
    picture.append(circle);
  }
  picture.addEventListener('pointerover', event => focus(spans.get(+event.target.dataset.token)));
  picture.addEventListener('click', event => spans.get(+event.target.dataset.token)?.scrollIntoView({block: 'center'}));
  document.getElementById('scatter').append(picture);
}

function draw() {
  const column = named(colour.value), {of, ends} = scale(column);
  const [flag, wanted] = method.value.split('='), marked = flag && named(flag);
  const most = Math.log(+below.value);
  for (const item of articles) {
    item.matches = 0;
    item.least = Infinity;
    for (const span of item.line.children) {
      const token = +span.dataset.token;
      span.style.background = mix(...of(column.values[token]));
      const match = (!marked || column_flag(marked, token) === wanted)
        && (below.value === '' || log_prob.values[token] <= most);
      span.className = match ? '' : 'dim';
      circles.get(token)?.setAttribute('class', span.className);
      item.matches += match;
      if (log_prob.values[token] < item.least) item.least = log_prob.values[token];
    }
    const narrowed = Boolean(marked) || below.value !== '';
    item.article.hidden = (verdicts.value !== '' && verdict(item.row) !== verdicts.value)
      || (prompt.value !== '' && item.row.prompt_id !== prompt.value) || (narrowed && item.matches === 0);
  }
  const keys = {reward: item => -(item.row.reward ?? -Infinity), tokens: item => -item.row.tokens,
    least: item => item.least, matches: item => -item.matches};
  const sorted = order.value ? [...articles].sort((a, b) => keys[order.value](a) - keys[order.value](b)) : articles;
  place.append(...sorted.map(item => item.article));
  legend(column, of, ends);
}

const column_flag = (column, token) => String(column.values[token]);

function legend(column, of, ends) {
  const line = document.getElementById('legend');
  const shown = articles.filter(item => !item.article.hidden);
  const matches = shown.reduce((sum, item) => sum + item.matches, 0);
  const two = ['sign', 'ratio'].includes(column.kind);
  const ramp = make('i', undefined, {className: 'ramp'});
  ramp.style.background = `linear-gradient(90deg, ${two ? mix(.6, '--c1') + ',' : ''} transparent, ${mix(.6, '--c2')})`;
  line.replaceChildren(`${column.label}: ${column.note}.  `,
    ...(column.flag ? [] : [show(ends[0]), ' ']), ramp, ` ${show(ends[1])}.  `,
    `${shown.length} of ${articles.length} responses, ${matches.toLocaleString('en')} tokens match.`);
}

// one token
const panel = document.getElementById('token');
let now = null;
function focus(span) {
  if (!span || span === now) return;
  if (now) for (const old of [now, circles.get(+now.dataset.token)]) old?.classList.remove('now');
  now = span;
  for (const one of [now, circles.get(+now.dataset.token)]) one?.classList.add('now');
  const token = +span.dataset.token, facts = make('dl');
  const fact = (name, value, note) => {
    const whole = make('div', undefined, {title: note});
    whole.append(make('dt', name), make('dd', value));
    facts.append(whole);
  };
  fact('token', JSON.stringify(record.texts[tokens[token]]), 'its text');
  fact('probability', show(Math.exp(log_prob.values[token])), 'of the policy that trained');
  for (const column of columns) fact(column.label, read(column, token), column.note);
  panel.replaceChildren(facts);
}
place.addEventListener('pointerover', event => focus(event.target.closest('.tokens span')));
place.addEventListener('click', event => focus(event.target.closest('.tokens span')));
place.addEventListener('focusin', event => {
  const line = event.target.closest('.tokens');
  if (line && !(now && line.contains(now))) focus(line.firstElementChild);
});
place.addEventListener('keydown', event => {
  const line = event.target.closest('.tokens');
  if (!line || !now || !['ArrowLeft', 'ArrowRight', 'Home', 'End'].includes(event.key)) return;
  event.preventDefault();
  focus({ArrowLeft: now.previousElementSibling, ArrowRight: now.nextElementSibling,
    Home: line.firstElementChild, End: line.lastElementChild}[event.key]);
});
controls.addEventListener('submit', event => event.preventDefault());
draw();
"""
