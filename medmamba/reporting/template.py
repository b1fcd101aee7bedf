"""The page: one file without references to anything outside, safe under a strict policy."""

SCRIPT = """
for (const head of document.querySelectorAll("th[data-kind]")) {
  head.tabIndex = 0;
  head.addEventListener("keydown", event => { if (event.key === "Enter") head.click(); });
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
.ok, .skipped { background: #e3f4ec; color: var(--good); } .ok_with_warnings { background: #fff2d9;
  color: var(--warn); } .rejected, .failed { background: #fde7e5; color: var(--bad); }
.views { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 12px; align-items: flex-start; }
figure { margin: 0; }
figure img { display: block; background: #000; border-radius: 6px; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 12.5px; margin-top: 3px; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px;
  vertical-align: -1px; }
.note { color: var(--warn); margin: 4px 0; overflow-wrap: anywhere; }
.error { color: var(--bad); margin: 4px 0; overflow-wrap: anywhere; }
.flag { color: var(--warn); } td.number, td.name { white-space: nowrap; }
#cohort td:first-child, #cohort th:first-child { position: sticky; left: 0;
  background: var(--paper); }
.soft { color: var(--soft); } .top { margin-left: auto; font-size: 13px; }
.legend { color: var(--soft); font-size: 12.5px; margin: 10px 0 0; }
footer { color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src\
{% for hash in script_hashes %} 'sha256-{{ hash }}'{% endfor %}; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Segmentation report</title>
<style>{{ style|safe }}</style>
</head>
<body>
<main>
<h1>Segmentation report</h1>
<p class="lead">{{ models|join(", ") or "no model" }}{% if title %} · run {{ title }}{% endif %} · \
research use only, not a medical device</p>
<div class="figures">
<div class="figure"><b>{{ total }}</b><span>{{ "case" if total == 1 else "cases" }}</span></div>
{%- for status, count in counts %}
<div class="figure"><b>{{ count }}</b><span>{{ status|replace("_", " ") }}</span></div>
{%- endfor %}
<div class="figure"><b>{{ flagged }}</b><span>with remarks to look at</span></div>
</div>
{%- if entries|length < total %}
<p class="note">The {{ entries|length }} cases with most remarks are shown; summary.csv lists all \
{{ total }}.</p>
{%- endif %}
<section class="card wide">
<table id="cohort">
<thead><tr><th data-kind="text">Case</th><th data-kind="text">Status</th>\
<th class="number" data-kind="number">Remarks</th>\
{% if shows_confidence %}<th class="number" data-kind="number">Least confidence</th>{% endif %}
{%- for name in columns %}<th class="number" data-kind="number">{{ name }}, ml</th>{% endfor -%}
</tr></thead>
<tbody>
{%- for entry in entries %}
<tr><td><a href="#{{ anchor(entry.name) }}">{{ entry.name }}</a></td>
<td><span class="badge {{ entry.status }}">{{ entry.status|replace("_", " ") }}</span></td>
<td class="number" data-value="{{ entry.flags }}">{{ entry.flags or "" }}</td>
{%- if shows_confidence %}
<td class="number" data-value="{{ '' if entry.confidence is none else entry.confidence }}">\
{{ "" if entry.confidence is none else "%.3f"|format(entry.confidence) }}</td>
{%- endif %}
{%- for line in cells[loop.index0] %}
<td class="number{{ ' flag' if line and line.remarks }}" \
data-value="{{ '' if line is none else line.measured.volume_ml }}" \
{%- if line and line.remarks %} title="{{ line.remarks|join('; ') }}"{% endif %}>
{%- if line is not none %}{% if line.measured.touches_border %}≥ {% endif %}\
{{ "%.2f"|format(line.measured.volume_ml) }}{% if line.measured.volume_flag %} \
{{ "▼" if line.measured.volume_flag == "low" else "▲" }}{% endif %}{% endif %}</td>
{%- endfor %}
</tr>
{%- endfor %}
</tbody>
</table>
<p class="legend">≥ touches the border of the image: at least this much · ▼ ▲ less or more than in \
98 % of training cases{% if shows_confidence %} · confidence is the mean probability of a label \
where it won, not calibrated{% endif %}{% if more_labels > 0 %} · {{ more_labels }} more labels \
below{% endif %}. Click a heading to sort.</p>
</section>
{%- for entry in entries %}
<section class="card" id="{{ anchor(entry.name) }}">
<div class="head"><h2>{{ entry.name }}</h2><span class="badge {{ entry.status }}">\
{{ entry.status|replace("_", " ") }}</span><a class="top" href="#cohort">table</a></div>
{%- if entry.error %}
<p class="error"><b>{{ entry.error.code }}</b> {{ entry.error.message }}</p>
{%- endif %}
{%- for warning in entry.warnings %}
<p class="note">{{ warning }}</p>
{%- endfor %}
{%- if entry.views %}
<div class="views">
{%- for view in entry.views %}
<figure><img src="{{ view.data_uri }}" width="{{ view.width }}" height="{{ view.height }}" \
alt="{{ view.title }} view of {{ entry.name }}"><figcaption>{{ view.title }}</figcaption></figure>
{%- endfor %}
</div>
{%- if entry.volume %}
<p class="legend" data-needs-webgl>This browser offers no WebGL2: the pictures stay as they are.</p>
<script type="application/json" data-volume="{{ anchor(entry.name) }}">\
{{ plain(entry.volume)|tojson }}</script>
{%- endif %}
{%- elif entry.without_pictures %}
<p class="legend">No pictures: {{ entry.without_pictures }}.</p>
{%- endif %}
{%- if entry.labels %}
<div class="wide"><table>
<thead><tr><th>Label</th><th class="number">Volume, ml</th><th class="number">Usual, ml</th>\
<th class="number">Voxels</th><th class="number">Parts</th><th class="number">Confidence</th>\
<th>Remarks</th></tr></thead>
<tbody>
{%- for line in entry.labels %}
{%- set item = line.measured %}
<tr><td class="name"><span class="dot" style="background:{{ line.color }}"></span>\
{{ item.name }}</td>
<td class="number">{{ "%.3f"|format(item.volume_ml) }}</td>
<td class="number soft">{% if item.usual %}{{ "%.2f"|format(item.usual.low_ml) }} to \
{{ "%.2f"|format(item.usual.high_ml) }}{% endif %}</td>
<td class="number">{{ item.voxels }}</td>
<td class="number">{{ item.n_components }}</td>
<td class="number">{% if item.confidence %}{{ "%.3f"|format(item.confidence.mean_probability) }}\
{% endif %}</td>
<td class="flag">{{ line.remarks|join("; ") }}</td></tr>
{%- endfor %}
</tbody>
</table></div>
{%- endif %}
</section>
{%- endfor %}
<footer>medmamba {{ version }}. Pictures follow radiological convention: the patient's right is on \
the left. The page holds everything it shows and loads nothing.
{%- if licences %}
<details><summary>The viewer is NiiVue; its licences</summary><pre>{{ licences }}</pre></details>
{%- endif %}
</footer>
</main>
{%- for script in scripts %}
<script>{{ script|safe }}</script>
{%- endfor %}
</body>
</html>
"""
