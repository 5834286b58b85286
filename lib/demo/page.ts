import { figure, findings, legend, page as wholePage, table } from '../report/page.js'
import {
  escapeXml,
  FONT,
  HEIGHT,
  INK,
  type Line,
  lineChart,
  type LineStyle,
  sample,
  STYLES,
  WIDTH,
} from '../report/plot.js'
import { type DemoResult, type Extension, type Measurement, type Method, METHODS } from './demo.js'

const STYLE: Record<Method, LineStyle> = {
  extrapolated: STYLES[1],
  interpolated: STYLES[3],
  tuned: STYLES[0],
  direct: STYLES[2],
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
    methods.map((measured) => ({ ...STYLE[measured.method], points: points(measured) }))
  const perplexity = {
    title: `${factor}x: perplexity against context`,
    x: { label: 'tokens of text before', min: 0, max: window, ticks: contexts },
    y: { label: 'perplexity', min: ticks[0]!, max: ticks.at(-1)!, ticks, log: true },
    lines: lines(({ curve }) => curve.map((point) => [point.context, point.perplexity])),
    marks: [{ x: base, text: `trained window, ${base}` }],
  }
  const passkey = {
    title: `${factor}x: passkeys found, prompts of ${window} tokens`,
    x: { label: 'distance of the key, in tokens', min: 0, max: window, ticks: contexts },
    y: { label: 'keys found', min: 0, max: 1, ticks: [0, 0.25, 0.5, 0.75, 1], format: formatShare },
    lines: lines(({ passkeyByDistance }) => passkeyByDistance.map((point) => [point.distance, point.accuracy])),
    marks: [{ x: base, text: `trained window, ${base}` }],
  }
  return [lineChart(perplexity, at), lineChart(passkey, at && { x: at.x + WIDTH, y: at.y })]
}

/** All charts with a legend, as a picture of its own that can be read on a light and on a dark page. */
export function picture(result: DemoResult): string {
  const { extensions, base } = result
  const width = 2 * WIDTH
  const legend = METHODS.map(({ method, label }, i) => {
    const left = 24 + i * 206
    return `${sample(STYLE[method], left, 16)}<text x="${left + 38}" y="20">${escapeXml(label)}</text>`
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

/** The result as one self-contained HTML page: no scripts, nothing to load. */
export function page(result: DemoResult): string {
  const { base, recipe, extensions, seed, seconds, machine, date } = result
  const names = legend(METHODS.map(({ method, label }) => ({ ...STYLE[method], name: label })))
  const factors = extensions.map(({ factor }) => `${factor}x`).join(' and ')
  const sections = extensions.map((extension) => {
    const { steps } = recipe.extensions.find(({ factor }) => factor === extension.factor)!
    return `<h2>${extension.factor}x: from ${base.window} to ${extension.window} tokens, fine-tuned for ${steps} steps</h2>
${figure(charts(extension, base.window))}
${names}
${table(tableOf(extension, base.window))}
${findings(extension.findings)}`
  })
  const title = `ropewalk demo: a window of ${base.window} tokens stretched ${factors}`
  const body = `<h1>A window of ${base.window} tokens, stretched ${factors} in ${Math.round(seconds)} s on a CPU</h1>
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
result.json, the charts in demo.svg.</p>`
  return wholePage({ title, body })
}
