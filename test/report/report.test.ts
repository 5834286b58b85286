// Charts and pages: where things are drawn, what is left out, and that what comes out is whole.
import t, { type Test } from 'tap'
import { barChart, heatMap } from '../../lib/report/cells.js'
import { figure, findings, legend, page, table } from '../../lib/report/page.js'
import { type Axis, lineChart, logTicksOf, STYLES, ticksOf } from '../../lib/report/plot.js'

const x: Axis = { label: 'tokens', min: 0, max: 100, ticks: [0, 50, 100] }
const y: Axis = { label: 'perplexity', min: 1, max: 100, ticks: [1, 10, 100], log: true }
const points = [0, 25, 50, 75, 100].map((n) => [n, 10] as const)

/** The corner points of the n-th path with this stroke. */
function pathOf(svg: string, color: string, n = 0): [number, number][] {
  const paths = [...svg.matchAll(/<path d="([^"]*)" fill="none" stroke="([^"]*)"/g)].filter(
    (found) => found[2] === color,
  )
  return [...(paths[n]?.[1] ?? '').matchAll(/[ML]([\d.]+) ([\d.]+)/g)].map(([, a, b]) => [Number(a), Number(b)])
}

t.test('a line runs from edge to edge, 10 in the middle of 1 to 100 on a logarithmic axis', async (t) => {
  const svg = lineChart({ title: 'a & b', x, y, lines: [{ ...STYLES[0], points }] })
  const path = pathOf(svg, STYLES[0].color)
  t.strictSame(
    [path[0], path.at(-1)],
    [
      [58, 144],
      [418, 144],
    ],
  )
  t.match(svg, /aria-label="a &#38; b"/)
  t.equal(svg.match(/<text[^>]*>(1|10|100)<\/text>/g)?.length, 4, 'numbers of both axes')
})

t.test('gaps, edges, bands, marks and the legend', async (t) => {
  const holed = points.map(([a, b]) => [a, a === 50 ? NaN : a === 75 ? 1e9 : b] as const)
  const band = [
    [0, 5, 20],
    [100, 5, 2000],
  ] as const
  const lines = [{ ...STYLES[1], name: 'holed', points: holed, band }]
  const marks = [
    { x: 50, text: 'trained window' },
    { y: 10, text: 'ten' },
  ]
  const svg = lineChart({ title: 'gaps', x, y, lines, marks, legend: true })
  t.notMatch(svg, /NaN|Infinity|undefined/)
  t.equal(pathOf(svg, STYLES[1].color, 0).length, 2, 'up to the gap')
  const after = pathOf(svg, STYLES[1].color, 1)
  t.strictSame([after.length, after[0]![1]], [2, 34 + 17], 'and after it, from the upper edge')
  t.match(svg, /fill-opacity=".18"/)
  for (const text of ['trained window', 'ten', 'holed']) t.ok(svg.includes(`>${text}</text>`), text)
  t.match(svg, /height="317"/, 'a legend makes it higher')
})

t.test('a curve of many points keeps its extremes and loses the rest', async (t) => {
  const many = Array.from({ length: 20000 }, (_, i) => [i / 200, i === 7777 ? 90 : 10 + (i % 7) / 100] as const)
  const svg = lineChart({ title: 'many', x, y, lines: [{ color: '#123456', points: many }] })
  const path = pathOf(svg, '#123456')
  t.ok(path.length < 4 * 2 * 361, `${path.length} points`)
  t.ok(Math.abs(Math.min(...path.map(([, top]) => top)) - 39) < 1, 'the peak is there')
  t.strictSame([path[0]![0], path.at(-1)![0]], [58, 418])
})

t.test('ticks are round and inside', async (t) => {
  t.strictSame(ticksOf(0, 4096, 4), [0, 1000, 2000, 3000, 4000])
  t.strictSame(ticksOf(-0.3, 0.3, 6), [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3])
  t.strictSame(logTicksOf(1, 1000), [1, 3, 10, 30, 100, 300, 1000])
  t.strictSame(logTicksOf(2, 12), [2, 3, 5, 7, 10])
  t.ok(logTicksOf(1e-3, 1e9).length <= 8)
})

t.test('cells: colours by value, text that can be read on them, empty where there is no value', async (t) => {
  const values = [
    [0, 0.5, 1],
    [NaN, 2, -1],
  ]
  const names = { x: { label: 'tokens', names: ['a', 'b', 'c'] }, y: { label: 'depth', names: ['top', 'bottom'] } }
  const svg = heatMap({ title: 'needle', ...names, values, min: 0, max: 1, format: (value) => `${value}!` })
  t.notMatch(svg, /NaN/)
  const fills = [...svg.matchAll(/<rect x="[\d.]+" y="[\d.]+" width="[\d.]+" height="29" fill="([^"]+)"/g)]
  const [dark, middle, light, empty, above, below] = fills.map(([, fill]) => fill)
  t.strictSame([dark, light, empty], ['#440154', '#fde725', 'none'])
  t.not(middle, dark)
  t.strictSame([above, below], [light, dark], 'values beyond the scale have its last colours')
  t.match(svg, /fill:#ffffff">0!</)
  t.match(svg, /fill:#101418">1!</)
})

t.test('bars grow from zero, and carry their intervals', async (t) => {
  const series = [
    { name: 'before', color: '#111111', values: [50, NaN] },
    {
      name: 'after',
      color: '#222222',
      values: [100, -50],
      intervals: [
        [90, 110],
        [NaN, NaN],
      ] as [number, number][],
    },
  ]
  const axis = { label: 'share', min: -100, max: 100, ticks: [-100, 0, 100] }
  const svg = barChart({ title: 'bars', groups: ['one', 'two'], y: axis, series, legend: true })
  const heights = [...svg.matchAll(/height="([\d.]+)" fill="(#\d+)"/g)].map(([, height, fill]) => [
    fill,
    Number(height),
  ])
  t.strictSame(heights, [
    ['#111111', 55],
    ['#222222', 110],
    ['#222222', 55],
  ])
  t.equal(svg.match(/m-3 0h6M/g)?.length, 1)
  t.notMatch(svg, /NaN/)
})

t.test('a page is whole, self-contained, and escapes what it is given', async (t) => {
  const rows = [['<model>', 1.5]]
  const chart = lineChart({ title: 'chart', x, y, lines: [{ ...STYLES[0], points }] })
  const claims = [
    { claim: 'a < b', seen: true, figures: '1 & 2' },
    { claim: 'b', seen: false, figures: '-' },
  ]
  const body = [
    '<h1>Title</h1>',
    table({ head: ['model', 'x'], rows, caption: 'caption' }),
    figure([chart, chart], 'text & more'),
    legend([{ ...STYLES[0], name: 'line' }]),
    findings(claims),
    findings(claims, ['holds', 'fails']),
  ].join('\n')
  const html = page({ title: 'A & B', body })
  t.match(html, /^<!doctype html>\n<html lang="en">/)
  t.notMatch(html, /<script|<link|<img|@import|url\(|src=/)
  t.match(html, /&#60;model&#62;/)
  // on a phone tables scroll within the page; on paper nothing is cut off or on a dark ground
  t.match(html, /<meta name="viewport" content="width=device-width, initial-scale=1">/)
  t.match(html, /\.scroll \{ overflow-x: auto \}[^]*<div class="scroll"><table>/)
  t.match(html, /@media screen and \(prefers-color-scheme: dark\)/)
  t.match(html, /@media print \{[^]*\.scroll \{ overflow: visible \}[^]*break-inside: avoid/)
  t.match(
    table({ head: ['k_max', 'niah_single_1'], rows: [] }),
    /<th>k_max<\/th><th>niah_<wbr\/>single_<wbr\/>1</,
    'long names may break',
  )
  t.match(html, /<b>not seen<\/b>[^]*<b>fails<\/b>/)
  wellFormed(t, html)
  t.equal(page({ title: 'A & B', body }), html)
})

/** Every element is closed, in order. */
function wellFormed(t: Test, html: string): void {
  const open: string[] = []
  const body = html.replace('<!doctype html>', '').replace(/<style>[\s\S]*?<\/style>/g, '')
  for (const [, close, name, self] of body.matchAll(/<(\/?)([a-z0-9]+)[^>]*?(\/?)>/gi)) {
    if (close) t.equal(open.pop(), name, `</${name}>`)
    else if (!self && name !== 'meta' && name !== 'br') open.push(name!)
  }
  t.strictSame(open, [])
}
