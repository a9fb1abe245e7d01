"""The style sheet of the HTML report: light and dark, phone and desk, no file from anywhere else."""

STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1b1f24;--soft:#59636e;--line:#dfe2e6;--grid:#eceef0;
--good:#0b6b3a;--bad:#b3261e;--warn:#fff4d6;--warn-line:#d9a406;--warn-ink:#4d3a00;--strip:#eef4fd;
--teacher:#7a3fb3;--assistant:#00796b;--student:#0b5fd0;--alone:#c25400;--baseline:#68727d}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1b1f23;--ink:#e8eaed;--soft:#a2abb5;--line:#343a41;
--grid:#292e34;--good:#5fd08f;--bad:#ff8a80;--warn:#3a2f0c;--warn-line:#d9a406;--warn-ink:#ffe9a8;--strip:#1b2838;
--teacher:#c79bf2;--assistant:#4dd0b8;--student:#6fb0ff;--alone:#ffa05c;--baseline:#a7b0ba}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.65rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 4px}
h3{font-size:1rem;margin:22px 0 4px}
p{margin:6px 0}
.sub,.note,figcaption,footer{color:var(--soft);font-size:.875rem}
.sub{margin:4px 0 0;overflow-wrap:anywhere}
.banner{background:var(--warn);color:var(--warn-ink);border:1px solid var(--warn-line);border-radius:8px;
padding:10px 14px;margin:18px 0 0}
.verdict{background:var(--strip);border-left:5px solid var(--student);border-radius:0 8px 8px 0;padding:14px 18px;
margin:18px 0 0}
.verdict p{font-size:1.2rem;line-height:1.45;margin:0;overflow-wrap:anywhere}
.verdict ul{margin:10px 0 0;padding-left:1.1em;color:var(--soft);font-size:.9rem}
.verdict li{overflow-wrap:anywhere}
.tile{margin:0}.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;min-width:0}
.tile dt{color:var(--soft);font-size:.8rem}
.tile dd{margin:0;font-size:1.35rem;font-weight:650;font-variant-numeric:tabular-nums}
.tile dd+dd{font-size:.8rem;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;margin:10px 0}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--student);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:10px 12px 6px;color:var(--soft);font-size:.875rem}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-top:1px solid var(--grid);vertical-align:top}
thead th{border-top:0;border-bottom:2px solid var(--line);color:var(--soft);font-weight:600;vertical-align:bottom;
white-space:normal}
tbody th[scope=row],th.name{text-align:left;font-weight:500;position:sticky;left:0;background:var(--card);
white-space:normal;overflow-wrap:anywhere;min-width:8.5em;max-width:17em}thead th.name{font-weight:600}
th[scope=rowgroup]{text-align:left;background:var(--page);color:var(--soft);font-size:.8rem;font-weight:650;
border-top:1px solid var(--line)}
th[scope=rowgroup] span{position:sticky;left:12px}
thead th.left{text-align:left}td.left{text-align:left;white-space:normal;min-width:14em}
caption span{display:inline-block;position:sticky;left:12px;max-width:calc(100vw - 54px)}
td small{display:block;color:var(--soft)}
tr.main th,tr.main td{background:var(--strip);font-weight:650}
tr.main th[scope=row]{background:var(--strip)}
.better{color:var(--good)}.worse{color:var(--bad)}
td small.better{color:var(--good)}td small.worse{color:var(--bad)}
.grid-of-plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:16px;margin:10px 0;
align-items:start}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;min-width:0}
figure h3{margin:0 0 6px;overflow-wrap:anywhere}
figcaption{margin-top:4px}
svg.plot{display:block;width:100%;max-width:430px;height:auto;margin:0 auto}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:10px 0;padding:0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}
.swatch{flex:none}
svg text{font-size:12px;fill:var(--soft);font-family:inherit}
svg text.label{fill:var(--ink)}svg text.faint{opacity:.8}
.halo{paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.behind{fill:var(--card)}
.grid{stroke:var(--grid)}.base{stroke:var(--line)}.zero{stroke:var(--soft);stroke-dasharray:3 3}
.curve{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round;opacity:.85}
.curve.thin{stroke-width:1.2;opacity:.55}
.marker{fill:var(--c);stroke:var(--card);stroke-width:1}
.whisker{fill:none;stroke:var(--c);stroke-width:1.6}
.teacher{--c:var(--teacher)}.assistant{--c:var(--assistant)}.student{--c:var(--student)}
.student-alone{--c:var(--alone)}.baseline{--c:var(--baseline)}
.curve.v1{stroke-dasharray:7 4}.curve.v2{stroke-dasharray:2 4}.curve.v3{stroke-dasharray:9 3 2 3}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;margin:10px 0;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:10px 0}
summary{cursor:pointer;color:var(--soft)}
footer{margin-top:48px;padding-bottom:32px}
@media(max-width:520px){main,header,footer{padding-left:14px;padding-right:14px}h1{font-size:1.35rem}
.verdict p{font-size:1.06rem}.interval{display:block}th,td{padding:6px 9px}
tbody th[scope=row],th.name{min-width:7.5em;max-width:9.5em}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}.tile dd{font-size:1.15rem}}
@media print{body{background:#fff}.scroll{overflow:visible}figure{break-inside:avoid}}
"""
