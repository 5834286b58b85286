import { type DemoResult, type Extension, type Measurement, type Method, METHODS } from './demo.js'
import { chart, escapeXml, FONT, HEIGHT, INK, type Line, sample, WIDTH } from './plot.js'

const STYLES: Record<Method, Omit<Line, 'points'>> = {
  extrapolated: { color: '#d1495b', dash: '2 4', marker: 'triangle' },
  interpolated: { color: '#c98a00', dash: '7 4', marker: 'diamond' },
  tuned: { color: '#2f81f7', marker: 'circle' },
  direct: { color: '#3a9d5d', dash: '11 3 2 3', marker: 'square' },
}

export const formatPerplexity = (value: number): string => (value < 99.95 ? value.toFixed(2) : value.toFixed(0))
export const formatShare = (value: number): string => `${Math.round(100 * value)} %`

/** The two charts of a factor: perplexity against context, keys found against their distance. */
function charts({ window, factor, methods }: Extension, base: number, at?: { x: number; y: number }): string[] {
  const values = methods.flatMap(({ curve }) => curve.map(({ perplexity }) => perplexity))
  const [least, most] = [Math.min(...values), Math.min(1000, Math.max(...values))]
  const candidates = [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 50, 100, 200, 500, 1000]
  const ticks = candidates.filter((tick) => tick >= least * 0.7 && tick <= most * 1.5)
  const contexts = [0, 1, 2, 3, 4].map((n) => (n * window) / 4)
  const lines = (points: (measured: Measurement) => Line['points']): Line[] =>
    methods.map((measured) => ({ ...STYLES[measured.method], points: points(measured) }))
  const perplexity = {
    title: `${factor}x: perplexity against context`,
    x: { label: 'tokens of text before', min: 0, max: window, ticks: contexts },
    y: { label: 'perplexity', min: ticks[0]!, max: ticks.at(-1)!, ticks, log: true },
    lines: lines(({ curve }) => curve.map((point) => [point.context, point.perplexity])),
    mark: { x: base, text: `trained window, ${base}` },
  }
  const passkey = {
    title: `${factor}x: passkeys found, prompts of ${window} tokens`,
    x: { label: 'distance of the key, in tokens', min: 0, max: window, ticks: contexts },
    y: { label: 'keys found', min: 0, max: 1, ticks: [0, 0.25, 0.5, 0.75, 1], format: formatShare },
    lines: lines(({ passkeyByDistance }) => passkeyByDistance.map((point) => [point.distance, point.accuracy])),
    mark: { x: base, text: `trained window, ${base}` },
  }
  return [chart(perplexity, at), chart(passkey, at && { x: at.x + WIDTH, y: at.y })]
}

/** All charts with a legend, as a picture of its own that can be read on a light and on a dark page. */
export function picture(result: DemoResult): string {
  const { extensions, base } = result
  const width = 2 * WIDTH
  const legend = METHODS.map(({ method, label }, i) => {
    const left = 24 + i * 206
    return `${sample(STYLES[method], left, 16)}<text x="${left + 38}" y="20">${escapeXml(label)}</text>`
  })
  const height = 34 + extensions.length * HEIGHT
  const rows = extensions.flatMap((extension, i) => charts(extension, base.window, { x: 0, y: 34 + i * HEIGHT }))
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" ` +
    `font-size="13" fill="${INK}" font-family="${escapeXml(FONT)}"><title>ropewalk demo: a window of ${base.window} ` +
    `tokens stretched ${extensions.map(({ factor }) => `${factor}x`).join(' and ')}</title>` +
    `${legend.join('')}${rows.join('')}</svg>\n`
  )
}

/** The columns of a factor's table, with their heads; the terminal and the page show the same. */
export function tableOf({ methods, window }: Extension, base: number): { head: string[]; rows: string[][] } {
  const bands = methods[0]!.perplexity
  const contexts = methods[0]!.passkeyByContext.map(({ context }) => context)
  return {
    head: [
      'model',
      ...bands.map(({ from, to }) => `ppl ${from}-${to === window - 1 ? window : to}`),
      ...contexts.map((context) => `key ${context}`),
      'k_max',
    ],
    rows: methods.map(({ method, perplexity, passkeyByContext, kmax }) => [
      METHODS.find((known) => known.method === method)!.label + (method === 'extrapolated' ? ` (${base})` : ''),
      ...perplexity.map(({ value }) => formatPerplexity(value)),
      ...passkeyByContext.map(({ accuracy }) => formatShare(accuracy)),
      String(kmax),
    ]),
  }
}

const CSS = `
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --line: #d1d9e0; --good: #1a7f37; --bad: #9a6700 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d; --good: #3fb950; --bad: #d29922 }
}
body { margin: 0 auto; padding: 1.2rem; max-width: 58rem; background: var(--paper); color: var(--ink); font: 16px/1.5 ${FONT} }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p, li { max-width: 44rem } .soft { color: var(--soft); font-size: .9rem }
.charts { display: flex; flex-wrap: wrap; gap: .5rem } .charts svg { width: 100%; height: auto; flex: 1 1 20rem; min-width: 0; max-width: 34rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; color: var(--soft) }
.legend svg { vertical-align: middle; margin-right: .4rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.claims { padding: 0; list-style: none } .claims li { margin: .7rem 0; padding-left: 5.5rem; position: relative }
.claims b { position: absolute; left: 0 } .seen b { color: var(--good) } .unseen b { color: var(--bad) }
`

/** The result as one self-contained HTML page: no scripts, nothing to load. */
export function page(result: DemoResult): string {
  const { base, recipe, extensions, seed, seconds, machine, date } = result
  const legend = METHODS.map(
    ({ method, label }) =>
      `<li><svg width="30" height="12" viewBox="0 0 30 12">${sample(STYLES[method], 0, 6)}</svg>${escapeXml(label)}</li>`,
  ).join('')
  const factors = extensions.map(({ factor }) => `${factor}x`).join(' and ')
  const sections = extensions.map((extension) => {
    const { head, rows } = tableOf(extension, base.window)
    const { steps } = recipe.extensions.find(({ factor }) => factor === extension.factor)!
    const cells = (tag: string, row: readonly string[]): string =>
      `<tr>${row.map((cell) => `<${tag}>${escapeXml(cell)}</${tag}>`).join('')}</tr>`
    return `<h2>${extension.factor}x: from ${base.window} to ${extension.window} tokens, fine-tuned for ${steps} steps</h2>
<div class="charts">${charts(extension, base.window).join('\n')}</div>
<ul class="legend">${legend}</ul>
<div class="scroll"><table><thead>${cells('th', head)}</thead><tbody>${rows.map((row) => cells('td', row)).join('')}</tbody></table></div>
<ul class="claims">${extension.findings
      .map(
        ({ claim, seen, figures }) =>
          `<li class="${seen ? 'seen' : 'unseen'}"><b>${seen ? 'seen' : 'not seen'}</b>${escapeXml(claim)}.<br>` +
          `<span class="soft">${escapeXml(figures)}</span></li>`,
      )
      .join('')}</ul>`
  })
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ropewalk demo: a window of ${base.window} tokens stretched ${factors}</title>
<style>${CSS}</style>
</head>
<body>
<h1>A window of ${base.window} tokens, stretched ${factors} in ${Math.round(seconds)} s on a CPU</h1>
<p>Position Interpolation (<a href="https://arxiv.org/abs/2306.15595">arXiv 2306.15595</a>) in miniature. A LLaMA of
${(base.parameters / 1e6).toFixed(1)} million weights was trained from nothing on ${(base.trainedTokens / 1e6).toFixed(1)} million tokens
in windows of ${base.window}. Here it was stretched in four ways, and all were measured on the same texts and prompts. The two
fine-tuned models saw the same windows, one a step, at the same learning rate, ${recipe.learningRate}; they differ only in whether
positions were divided by the factor. Texts, learning rate and steps were chosen for the one with PI. 8x is left out: 150 steps,
as many as fitted beside 4x, brought no key back there.</p>
${sections.join('\n')}
<h2>How to read this</h2>
<p>“ppl 257-512” is the perplexity of tokens that have 257 to 512 tokens of text before them; the texts, ${recipe.texts} of them, repeat
facts about eight people, so more context makes the next word easier to tell. “key 512” is the share of five-digit keys that greedy
decoding gives back from prompts of 512 tokens, keys in random places: with so few prompts, luck with the places shows. The chart
puts the same number of keys at each of eight distances; k_max is the largest distance up to which at least 20 % are found, as in the paper.
The base model never saw a position beyond ${base.window}. A claim of the paper that these figures do not show is marked
“not seen”: a model of this size, trained for minutes, extrapolates and adapts otherwise than LLaMA does, which was fine-tuned
for 1000 steps of half a million tokens and more.</p>
<p class="soft">${escapeXml(`ropewalk ${result.version}, seed ${seed}, ${date}, ${seconds} s on ${machine}`)}. The numbers are in
result.json, the charts in demo.svg.</p>
</body>
</html>
`
}
