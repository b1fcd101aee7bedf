"""The page: one file without references to anything outside, safe under a strict policy."""

import base64
import hashlib

SCRIPT = """
for (const head of document.querySelectorAll("th[data-kind]")) {
  head.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0];
    const at = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = head.dataset.kind === "number";
    const key = row => {
      const text = row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
      return numeric ? (text === "" ? -Infinity : Number(text)) : text.toLowerCase();
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    body.append(...rows);
  });
}
"""

SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
"""The policy allows this script and no other."""

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5f6b7a; --line: #dfe4ea; --paper: #fff;
  --ground: #f4f6f8; --good: #0b7a4b; --warn: #9a6200; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: var(--ink); background: var(--ground); }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0; overflow-wrap: anywhere; }
.lead { color: var(--soft); margin: 0 0 20px; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 20px; }
.figure { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 18px; min-width: 110px; }
.figure b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: 13px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 0 0 18px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-size: 13px; color: var(--soft); font-weight: 600; white-space: nowrap; }
th[data-kind] { cursor: pointer; user-select: none; }
th[data-kind]::after { content: " \\2195"; color: #b6bfca; }
th[aria-sort=ascending]::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending]::after { content: " \\2193"; color: var(--ink); }
td.number, th.number { text-align: right; }
tr:last-child td { border-bottom: 0; }
a { color: #0b5cad; text-decoration: none; } a:hover { text-decoration: underline; }
.head { display: flex; align-items: baseline; gap: 12px; margin-bottom: 12px; }
.badge { border-radius: 99px; padding: 1px 10px; font-size: 12.5px; font-weight: 600;
  white-space: nowrap; }
.ok { background: #e3f4ec; color: var(--good); } .ok_with_warnings { background: #fff2d9;
  color: var(--warn); } .rejected, .failed { background: #fde7e5; color: var(--bad); }
.views { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 12px; align-items: flex-end; }
figure { margin: 0; }
figure img { display: block; background: #000; border-radius: 6px; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 12.5px; margin-top: 3px; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px;
  vertical-align: -1px; }
.note { color: var(--warn); margin: 4px 0; overflow-wrap: anywhere; }
.error { color: var(--bad); margin: 4px 0; overflow-wrap: anywhere; }
.flag { color: var(--warn); white-space: nowrap; }
footer { color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{{ script_hash }}'; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Segmentation report</title>
<style>{{ style|safe }}</style>
</head>
<body>
<main>
<h1>Segmentation report</h1>
<p class="lead">{{ models|join(", ") or "no model" }} · research use only, not a medical device</p>
<div class="figures">
<div class="figure"><b>{{ cases|length }}</b><span>cases</span></div>
{%- for status, count in counts %}
<div class="figure"><b>{{ count }}</b><span>{{ status|replace("_", " ") }}</span></div>
{%- endfor %}
</div>
<section class="card wide">
<table id="cohort">
<thead><tr><th data-kind="text">Case</th><th data-kind="text">Status</th>
{%- for name in label_names %}<th class="number" data-kind="number">{{ name }}, ml</th>{% endfor -%}
<th class="number" data-kind="number">Warnings</th></tr></thead>
<tbody>
{%- for case in cases %}
<tr><td><a href="#case-{{ loop.index }}">{{ case.name }}</a></td>
<td><span class="badge {{ case.status }}">{{ case.status|replace("_", " ") }}</span></td>
{%- for volume in case.volumes %}
<td class="number" data-value="{{ '' if volume is none else volume.ml }}">
{%- if volume is not none %}{{ "%.2f"|format(volume.ml) }}{% if volume.cut %} <span class="flag" \
title="touches the border of the image">≥</span>{% endif %}{% endif %}</td>
{%- endfor %}
<td class="number" data-value="{{ case.warnings|length }}">\
{{ case.warnings|length or "" }}</td></tr>
{%- endfor %}
</tbody>
</table>
</section>
{%- for case in cases %}
<section class="card" id="case-{{ loop.index }}">
<div class="head"><h2>{{ case.name }}</h2><span class="badge {{ case.status }}">\
{{ case.status|replace("_", " ") }}</span></div>
{%- if case.error %}
<p class="error"><b>{{ case.error.code }}</b> {{ case.error.message }}</p>
{%- endif %}
{%- if case.views %}
<div class="views">
{%- for view in case.views %}
<figure><img src="{{ view.data_uri }}" width="{{ view.width }}" height="{{ view.height }}" \
alt="{{ view.title }} view of {{ case.name }}"><figcaption>{{ view.title }}</figcaption></figure>
{%- endfor %}
</div>
{%- endif %}
{%- if case.labels %}
<table>
<thead><tr><th>Label</th><th class="number">Volume, ml</th><th class="number">Voxels</th>\
<th class="number">Parts</th><th>Remarks</th></tr></thead>
<tbody>
{%- for label in case.labels %}
<tr><td><span class="dot" style="background:{{ label.color }}"></span>{{ label.name }}</td>
<td class="number">{{ "%.3f"|format(label.volume_ml) }}</td>
<td class="number">{{ label.voxels }}</td>
<td class="number">{{ label.n_components }}</td>
<td>{% if label.touches_border %}<span class="flag">touches the border: at least this much</span>\
{% elif not label.voxels %}not found{% endif %}</td></tr>
{%- endfor %}
</tbody>
</table>
{%- endif %}
{%- for warning in case.warnings %}
<p class="note">{{ warning }}</p>
{%- endfor %}
</section>
{%- endfor %}
<footer>medmamba {{ version }}. Pictures follow radiological convention: the patient's right is on \
the left. The page holds everything it shows and loads nothing.</footer>
</main>
<script>{{ script|safe }}</script>
</body>
</html>
"""
