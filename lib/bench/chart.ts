import { short } from './report.js'
import type { Report } from './run.js'

const BAR = 13
const GAP = 12
const LEFT = 340
const WIDTH = 1020
/** Right of the bars: their figures. */
const RIGHT = 200

/** Colours of the sides, ours first; chosen to be told apart on white and on black, also without red or green. */
const COLOURS = ['#d55e00', '#0072b2', '#56b4e9', '#009e73', '#cc79a7']

const STYLE = `text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.faint { fill: #59636e }
.line { stroke: #59636e; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .faint { fill: #9198a1 }
  .line { stroke: #9198a1 }
}`

const escape = (text: string): string =>
  text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;')

/** A bar chart, ours above the peers, each as a part of its case's roofline; readable on light and on dark pages. */
export function svg({ machine, cases }: Report): string {
  const names = ['ropewalk', ...new Set(cases.flatMap(({ peers }) => peers.map(({ name }) => name)))]
  const colour = (name: string): string => COLOURS[names.indexOf(name) % COLOURS.length]!
  const bars = cases.map(({ ours, peers }) => [{ name: 'ropewalk', rate: ours }, ...peers])
  const parts = cases.map(({ roofline }, i) => bars[i]!.map(({ rate }) => rate.median / roofline.rate.median))
  const scale = (WIDTH - LEFT - RIGHT) / Math.max(1, ...parts.flat())
  const out: string[] = []
  const text = (x: number, y: number, content: string, attributes = ''): void => {
    out.push(`<text x="${x.toFixed(1)}" y="${y}"${attributes}>${escape(content)}</text>`)
  }
  const { device, deviceDescription, cpu, isa, node, date, loadBefore } = machine
  const measured = device === 'cpu' ? `${cpu}, ${isa}` : `${device}: ${deviceDescription}`
  text(10, 22, 'ropewalk bench: medians, as parts of the roofline of the same run', ' class="title"')
  text(10, 42, `${measured}, Node ${node}, ${date.slice(0, 10)}, load ${loadBefore}`, ' class="faint"')
  names.forEach((name, i) => {
    const x = 10 + 140 * i
    out.push(`<rect x="${x}" y="54" width="${BAR}" height="${BAR}" fill="${colour(name)}"/>`)
    text(x + BAR + 6, 65, name)
  })
  let y = 90
  const top = y - 6
  cases.forEach(({ stem, name, threads, unit, roofline }, i) => {
    const middle = y + (bars[i]!.length * BAR) / 2 + 4
    text(LEFT - 10, middle, `${stem} ${name}${threads ? `, ${threads}t` : ''}`, ' text-anchor="end"')
    bars[i]!.forEach(({ name: side, rate }, j) => {
      const width = scale * parts[i]![j]!
      out.push(`<rect x="${LEFT}" y="${y}" width="${width.toFixed(1)}" height="${BAR - 2}" fill="${colour(side)}"/>`)
      const whole = j === 0 ? ` ${unit}; ${roofline.name} ${short(roofline.rate.median)}` : ''
      text(LEFT + Math.max(width, scale) + 6, y + BAR - 3, `${short(rate.median)}${whole}`, ' class="faint"')
      y += BAR
    })
    y += GAP
  })
  const x = (LEFT + scale).toFixed(1)
  out.push(`<line x1="${x}" y1="${top}" x2="${x}" y2="${y - GAP + 4}" class="line"/>`)
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${y}" viewBox="0 0 ${WIDTH} ${y}" role="img">
<title>ropewalk bench</title>
<style>${STYLE}</style>
${out.join('\n')}
</svg>
`
}
