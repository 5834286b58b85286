import { escapeXml, FONT, type LineStyle, sample } from './plot.js'

const LIGHT = '--ink: #1f2328; --soft: #59636e; --paper: #ffffff; --line: #d1d9e0; --good: #1a7f37; --bad: #9a6700'
const DARK = '--ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d; --good: #3fb950; --bad: #d29922'

const CSS = `
:root { color-scheme: light; ${LIGHT} }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; ${DARK} }
}
body { margin: 0 auto; padding: 1.2rem; max-width: 58rem; background: var(--paper); color: var(--ink); font: 16px/1.5 ${FONT}; overflow-wrap: break-word }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p, li { max-width: 44rem } .soft { color: var(--soft); font-size: .9rem }
.charts { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .5rem } .charts svg { width: 100%; height: auto; flex: 1 1 20rem; min-width: 0; max-width: 27.5rem }
svg.chart { fill: var(--soft) } .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-opacity: .8 }
figure { margin: 1rem 0 } figcaption { max-width: 44rem; color: var(--soft); font-size: .9rem; margin-top: .4rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; color: var(--soft) }
.legend svg { vertical-align: middle; margin-right: .4rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
.scroll + .scroll { margin-top: 1rem }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; position: sticky; left: 0; max-width: min(44rem, 100vw - 2.4rem) }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.texts td:first-child { white-space: normal; min-width: 11rem }
.claims { padding: 0; list-style: none } .claims li { margin: .7rem 0; padding-left: 5.5rem; position: relative }
.claims b { position: absolute; left: 0 } .seen b { color: var(--good) } .unseen b { color: var(--bad) }
@media screen and (max-width: 40rem) {
  th, td { padding: .3rem .45rem }
  th:first-child, td:first-child { position: sticky; left: 0; max-width: 8.5rem; white-space: normal; background: var(--paper) }
  .texts td:first-child { min-width: 7rem }
}
@media print {
  @page { margin: 16mm 14mm }
  body { padding: 0; max-width: none; font-size: 10.5pt }
  .scroll { overflow: visible } caption { max-width: none }
  table { font-size: 8pt; overflow-wrap: normal } th, td { padding: .2rem .3rem } td:first-child { white-space: normal }
  .charts svg { flex: 0 1 48%; max-width: 48% }
  h1, h2, h3, caption { break-after: avoid } figure, svg, tr, .claims li { break-inside: avoid }
  a { color: inherit }
}
`

/** One self-contained HTML page: no scripts, nothing to load; light, dark and on paper. `body` is HTML. */
export function page({ title, body }: { title: string; body: string }): string {
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeXml(title)}</title>
<style>${CSS}</style>
</head>
<body>
${body}
</body>
</html>
`
}

export interface Table {
  head: readonly string[]
  rows: readonly (readonly (string | number)[])[]
  caption?: string
  /** The first column holds sentences. */
  texts?: boolean
}

/** Long names may break behind their underscores. */
const breakable = (text: string): string => text.replace(/\w{9,}/g, (word) => word.replaceAll('_', '_<wbr/>'))

/** A table that scrolls sideways where the screen is narrow: the first column to the left, the others to the right. */
export function table({ head, rows, caption, texts = false }: Table): string {
  const cells = (tag: string, row: readonly (string | number)[]): string =>
    `<tr>${row.map((cell) => `<${tag}>${breakable(escapeXml(String(cell)))}</${tag}>`).join('')}</tr>`
  const title = caption === undefined ? '' : `<caption>${escapeXml(caption)}</caption>`
  const body = rows.map((row) => cells('td', row)).join('')
  const kind = texts ? ' class="texts"' : ''
  return `<div class="scroll"><table${kind}>${title}<thead>${cells('th', head)}</thead><tbody>${body}</tbody></table></div>`
}

/** Charts beside each other, two in a row where there is room, with text below them. */
export function figure(charts: readonly string[], caption?: string): string {
  const text = caption === undefined ? '' : `<figcaption>${escapeXml(caption)}</figcaption>`
  return `<figure><div class="charts">${charts.join('\n')}</div>${text}</figure>`
}

/** A legend for several charts. */
export function legend(lines: readonly (LineStyle & { name: string })[]): string {
  const items = lines.map(
    (line) =>
      `<li><svg width="30" height="12" viewBox="0 0 30 12">${sample(line, 0, 6)}</svg>${escapeXml(line.name)}</li>`,
  )
  return `<ul class="legend">${items.join('')}</ul>`
}

/** A statement, whether the figures show it, and which they are. */
export interface Finding {
  claim: string
  seen: boolean
  figures: string
}

/** Statements with "seen" or "not seen" before them; other words may be given. */
export function findings(
  list: readonly Finding[],
  [yes, no]: readonly [string, string] = ['seen', 'not seen'],
): string {
  const items = list.map(
    ({ claim, seen, figures }) =>
      `<li class="${seen ? 'seen' : 'unseen'}"><b>${seen ? yes : no}</b>${escapeXml(claim)}.<br>` +
      `<span class="soft">${escapeXml(figures)}</span></li>`,
  )
  return `<ul class="claims">${items.join('')}</ul>`
}
