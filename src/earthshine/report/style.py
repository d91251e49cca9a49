"""The page's style sheet. Colors are variables with a light and a dark value. The series colors have a contrast of at
least 3 to 1 with their ground and stay apart for the common kinds of color blindness: a test holds them to both.
"""

LIGHT = {
    "ground": "#f4f6fa", "card": "#ffffff", "ink": "#17202e", "muted": "#566275", "line": "#dde2ea",
    "soft": "#eef1f6", "link": "#1f5fae", "good": "#0b7a53", "good-soft": "#dff3ea", "bad": "#b3311d",
    "bad-soft": "#fbe5e0", "quiet-soft": "#e9ecf2", "grid": "#e6eaf0", "zero": "#7c8798",
    "c0": "#0a66b5", "c1": "#d1570a", "c2": "#0fa36b", "c3": "#ae3d7e", "c4": "#653c0e", "c5": "#343b45",
    "h0": "#1f66ad", "h1": "#4f8fcb", "h2": "#96bfe3", "h3": "#cadff1", "h4": "#eef0f3",
    "h5": "#fbdfc4", "h6": "#f5b67d", "h7": "#df7f30", "h8": "#b35405",
    "t0": "#ffffff", "t1": "#0c1420", "t2": "#17202e", "t3": "#17202e", "t4": "#17202e",
    "t5": "#17202e", "t6": "#17202e", "t7": "#17202e", "t8": "#ffffff",
}  # fmt: skip

DARK = {
    "ground": "#0d131c", "card": "#151d29", "ink": "#e5eaf2", "muted": "#9eabbd", "line": "#2a3546",
    "soft": "#1b2533", "link": "#84b9ff", "good": "#5fd3a4", "good-soft": "#143529", "bad": "#ff9a86",
    "bad-soft": "#43211c", "quiet-soft": "#243041", "grid": "#243041", "zero": "#8593a8",
    "c0": "#62b0ff", "c1": "#ff9a57", "c2": "#33e6ae", "c3": "#c93fae", "c4": "#f0de4e", "c5": "#b9c3d2",
    "h0": "#74bbff", "h1": "#4a90d9", "h2": "#336399", "h3": "#274365", "h4": "#242e3d",
    "h5": "#4a3a2c", "h6": "#7d5730", "h7": "#c17c30", "h8": "#ffb060",
    "t0": "#0c1420", "t1": "#0c1420", "t2": "#ffffff", "t3": "#e5eaf2", "t4": "#e5eaf2",
    "t5": "#e5eaf2", "t6": "#ffffff", "t7": "#0c1420", "t8": "#0c1420",
}  # fmt: skip

_LAYOUT = """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif}
.in{max-width:1088px;margin:0 auto;padding:0 24px}
a{color:var(--link);text-underline-offset:2px}
:focus-visible{outline:2px solid var(--link);outline-offset:3px;border-radius:3px}
.skip{position:absolute;left:-9999px}.skip:focus{left:16px;top:12px;background:#fff;color:#123;padding:8px 14px;
z-index:2}
header{position:relative;overflow:hidden;color:#eaf0fa;
background:radial-gradient(900px 420px at 88% 20%,#29446d 0,rgba(41,68,109,0) 70%),linear-gradient(165deg,#080d17,
#131f36)}
header .in{position:relative;padding-top:60px;padding-bottom:44px}
header .kind{margin:0 0 8px;font-size:.8rem;letter-spacing:.16em;text-transform:uppercase;color:#9fb6d8}
h1{margin:0;max-width:17em;font-size:clamp(1.75rem,4.6vw,2.75rem);line-height:1.14;letter-spacing:-.018em;
font-weight:680;text-wrap:balance;overflow-wrap:anywhere}
header .lead{max-width:40em;margin:16px 0 0;font-size:1.16rem;line-height:1.5;color:#d3deef;overflow-wrap:anywhere;
text-wrap:pretty}
header .lead strong{color:#ffc4b5}
.moon{position:absolute;right:34px;top:38px;width:176px;height:176px}
nav{position:sticky;top:0;z-index:1;background:var(--card);border-bottom:1px solid var(--line)}
nav ul{display:flex;gap:4px 24px;margin:0;padding:0;list-style:none;overflow-x:auto;scrollbar-width:none}
nav a{display:block;padding:12px 0;color:var(--muted);text-decoration:none;font-size:.875rem;white-space:nowrap}
nav a:hover{color:var(--ink)}
main{padding:8px 0 40px}
section{padding-top:44px;scroll-margin-top:28px}
h2{margin:0 0 16px;font-size:1.5rem;line-height:1.25;letter-spacing:-.012em;font-weight:660}
h3{margin:0;font-size:1.02rem;font-weight:640}
h4{margin:0 0 4px;font-size:.86rem;font-weight:600;color:var(--muted)}
p{margin:0 0 14px;max-width:74ch;overflow-wrap:anywhere}
.note{font-size:.9rem;color:var(--muted);border-left:3px solid var(--line);padding-left:14px}
.absent{font-size:.9rem;color:var(--muted);font-style:italic}
.absent::before{content:"\\2205\\2002"/"";font-style:normal}
:not(pre)>code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
background:var(--soft);
padding:.1em .35em;border-radius:4px;overflow-wrap:anywhere}
pre{margin:0;font:.84rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
pre.code{background:var(--soft);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow-x:auto}
.copyable{position:relative;margin-bottom:18px}.copyable:has(button:not([hidden])) pre{padding-right:88px}
.copy{position:absolute;top:8px;right:8px;padding:4px 12px;font:inherit;font-size:.8rem;line-height:1.4;
color:var(--link);background:var(--card);border:1px solid var(--line);border-radius:7px;cursor:pointer}
.copy:hover{border-color:currentColor}
footer{border-top:1px solid var(--line);color:var(--muted);font-size:.86rem;padding:20px 0 44px}
"""

_PARTS = """
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:16px;margin:0 0 20px;
padding:0}
.card:only-child{max-width:430px}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:18px 20px;
border-top:4px solid var(--c,var(--line))}
.card.good:not([class*=" k"]){--c:var(--good)}.card.bad:not([class*=" k"]){--c:var(--bad)}
.card dt{font-size:.88rem;color:var(--muted);overflow-wrap:anywhere}
.card dd{margin:0}
.card .value{font-size:1.95rem;line-height:1.25;font-weight:660;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.card .detail{font-size:.86rem;line-height:1.45;color:var(--muted)}
.card .fact{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px;
font-size:.86rem;line-height:1.45;padding:3px 0}
.card .detail+.fact{margin-top:10px;padding-top:10px;border-top:1px solid var(--line)}
.card .fact dt{font-size:inherit}.card .fact dd{font-variant-numeric:tabular-nums}
ul.verdicts{list-style:none;margin:0 0 18px;padding:0}
ul.verdicts li{position:relative;padding:9px 0 9px 34px;border-top:1px solid var(--line);overflow-wrap:anywhere}
ul.verdicts li:first-child{border-top:0}
ul.verdicts li::before{position:absolute;left:4px;top:9px;font-weight:700;content:"\\2022"/"";color:var(--muted)}
ul.verdicts .good::before{content:"\\2713"/"";color:var(--good)}
ul.verdicts .bad::before{content:"\\2717"/"";color:var(--bad)}
ul.verdicts .quiet::before{content:"\\2248"/""}ul.verdicts .up::before{content:"\\2191"/""}
ul.verdicts .down::before{content:"\\2193"/""}
ul.links{display:flex;flex-wrap:wrap;gap:4px 24px;margin:0 0 18px;padding:0;list-style:none;font-size:.92rem}
ul.verdicts.plain li{font-size:.9rem;color:var(--muted);padding:3px 0 3px 22px;border:0}
ul.verdicts.plain li::before{content:"\\2022"/"";top:3px}
.table{background:var(--card);border:1px solid var(--line);border-radius:14px;margin:0 0 20px;overflow:hidden}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;line-height:1.45}
.caption{margin:0;padding:14px 20px 8px;color:var(--muted);font-size:.88rem;max-width:none}
th,td{padding:9px 14px;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
th:first-child,td:first-child{padding-left:20px}th:last-child,td:last-child{padding-right:20px}
thead th{font-size:.82rem;font-weight:600;color:var(--muted);border-top:0;border-bottom:1px solid var(--line);
vertical-align:bottom}
tbody tr:first-child>*{border-top:0}
tbody th{font-weight:500}
td.num,th.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.chip{display:inline-block;padding:1px 10px;border-radius:99px;font-size:.84rem;font-weight:600;white-space:nowrap;
background:var(--quiet-soft);color:var(--muted)}
.chip.good,.chip.down{background:var(--good-soft);color:var(--good)}.chip.bad{background:var(--bad-soft);color:var(--bad)}
.dim{color:var(--muted);white-space:nowrap}
.meter{display:block;height:4px;margin-top:5px;border-radius:2px;background:var(--soft);min-width:72px}
.meter i{display:block;height:4px;border-radius:2px;background:var(--good)}.meter.bad i{background:var(--bad)}
.dot{display:inline-block;width:.68em;height:.68em;border-radius:50%;background:var(--c);margin-right:.55em}
details{margin:0 0 16px}summary{cursor:pointer;color:var(--link);font-size:.9rem;padding:4px 0}
details .table,details .copyable{margin-top:8px}
figure{margin:0 0 22px;padding:20px 22px 16px;background:var(--card);border:1px solid var(--line);border-radius:14px}
figure details{margin:8px 0 0}
figcaption{margin-top:10px;font-size:.88rem;line-height:1.5;color:var(--muted);max-width:104ch;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 20px;margin:6px 0 12px;padding:0;list-style:none;font-size:.88rem}
.legend li{display:flex;align-items:center;gap:8px;overflow-wrap:anywhere}
.legend svg{flex:none;width:30px;height:14px}
.legend.heat{gap:0;flex-wrap:nowrap}.legend.heat li{flex-direction:column;gap:2px;flex:0 1 38px;white-space:nowrap;
font-size:.78rem;color:var(--muted);line-height:1.2}
.legend.heat i{display:block;width:100%;height:12px}
.panels{display:grid;gap:18px 22px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--least)),1fr))}
.panels>.full{grid-column:1/-1}
svg{display:block;width:100%;height:auto;overflow:visible}
.narrow-only{display:none}
.sides{padding:4px 22px 8px;background:var(--card);border:1px solid var(--line);border-radius:14px;margin:0 0 20px}
.sides>h3{padding:14px 0 4px}
.sides .row{padding:14px 0 18px;border-top:1px solid var(--line)}
.sides .row:first-of-type{border-top:0}
.sides .prompt{margin:0 0 12px}.sides .prompt pre,.sides .two pre{white-space:pre-wrap;overflow-wrap:anywhere}
.two{display:grid;gap:16px 20px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.two pre{background:var(--soft);border-radius:10px;padding:12px 14px;max-height:26em;overflow:auto}
"""

_DRAWING = """
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;
fill:var(--muted)}
svg .tick{font-variant-numeric:tabular-nums}
svg .name{font-size:13px;fill:var(--ink)}svg .value{font-size:13px;font-weight:600;fill:var(--ink);
font-variant-numeric:tabular-nums}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:5px;stroke-linejoin:round}
svg .in{font-size:11px;font-variant-numeric:tabular-nums}
svg path{fill:none}
.grid{stroke:var(--grid)}.base,.zero{stroke:var(--zero)}
.stroke{stroke:var(--c);stroke-width:2.25;stroke-linejoin:round;stroke-linecap:round}
.thin .stroke{stroke-width:1.5}svg .last{font-weight:600;fill:var(--ink);font-variant-numeric:tabular-nums}
.faint .stroke{stroke-width:1;opacity:.42}
svg .spread{fill:var(--c);opacity:.16}
svg .faint .spread{opacity:.1}
.over .stroke,.dashed .stroke{stroke-dasharray:7 7;stroke-linecap:butt}.dashed .stroke{stroke-width:1.5;
stroke-dasharray:5 4}
.mark .stroke{stroke-width:1.5;stroke-dasharray:1 5}
.ref{--c:var(--zero)}.reference .stroke{stroke-width:1.5;stroke-dasharray:5 4;stroke-linecap:butt}
.wide-bar{stroke:var(--c);stroke-width:5;stroke-linecap:round;opacity:.4}
svg .line g>*,svg .points g>*,svg .points>circle,svg .points>rect,svg .points>path:not(.wide-bar){fill:var(--c);
stroke:var(--card);stroke-width:1.5}
svg .points g>*{fill:var(--card);stroke:var(--c);stroke-width:2}
.hz{fill:var(--zero);background:var(--zero)}svg .in.hz{fill:var(--card)}
"""

_SCREENS = """
@media(max-width:900px){.moon{width:112px;height:112px;right:20px;top:26px;opacity:.75}
header .lead{max-width:none}
h1{padding-right:110px}}
@media(max-width:700px){.in{padding:0 16px}header .in{padding-top:40px;padding-bottom:30px}section{padding-top:34px}
.moon{width:76px;height:76px;right:14px;top:20px}h1{padding-right:72px}
figure{padding:16px 14px 12px}.sides{padding:2px 14px 4px}.wide-only{display:none}.narrow-only{display:block}
.copy:not([hidden]){position:static;display:block;margin:0 0 6px auto}.copyable pre.code{padding-right:16px!important}
th,td{padding:8px 10px}th:first-child,td:first-child{padding-left:14px}.caption{padding:12px 14px 8px}tbody th{
min-width:7.5em}}
@media(min-width:1000px){tbody th{min-width:15em}}
@media print{nav,.moon,.copy:not([hidden]){display:none}pre.code{white-space:pre-wrap}
header{color:#000;background:none}header .lead,header .kind,header .lead strong{color:#333}
html{font-size:12.5px}body{background:none}section{padding-top:24px}h2,h3,h4{break-after:avoid}
figure,tr,.card,.sides .row{break-inside:avoid}header .in{padding-top:0;padding-bottom:0}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""


def style_sheet() -> str:
    """The whole CSS of the page."""

    def variables(values: dict[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in values.items())

    series = "".join(f".c{i},.k{i}{{--c:var(--c{i})}}" for i in range(6))
    heat = "".join(
        f".h{i}{{fill:var(--h{i});background:var(--h{i})}}svg .in.h{i}{{fill:var(--t{i})}}" for i in range(9)
    )
    themes = f":root{{color-scheme:light dark;{variables(LIGHT)}}}"
    themes += f"@media(prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}"
    return themes + _LAYOUT + _PARTS + _DRAWING + series + heat + _SCREENS
