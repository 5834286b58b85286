/** How a line is drawn; `color` and `dash` must tell it from the others on a white and on a black background. */
export interface LineStyle {
  color: string
  dash?: string
  /** Without one, no points are marked: for curves of many points. */
  marker?: Shape
  /** Only the markers, no stroke between them. */
  dots?: boolean
  /** Of the stroke; default 2.2. */
  width?: number
}

/** A dot is a small circle, for many of them. */
export type Shape = 'circle' | 'square' | 'triangle' | 'diamond' | 'dot'

/** A line of a chart. A y that is not finite leaves a gap. */
export interface Line extends LineStyle {
  /** For the legend; a line without a name is not in it. */
  name?: string
  points: readonly (readonly [x: number, y: number])[]
  /** A confidence interval, drawn as a band. */
  band?: readonly (readonly [x: number, low: number, high: number])[]
}

export interface Axis {
  label: string
  min: number
  max: number
  ticks: readonly number[]
  log?: boolean
  format?: (value: number) => string
  /** Places of vertical (x) or further horizontal (y) grid lines without a number. */
  grid?: readonly number[]
}

/** A straight line across a chart with a word beside it: at an x, or at a y. */
export type Mark = { text: string } & ({ x: number } | { y: number })

export interface LineChart {
  title: string
  x: Axis
  y: Axis
  /** What lies beyond an axis is drawn on its edge. */
  lines: readonly Line[]
  marks?: readonly Mark[]
  /** Names of the lines below the title; default: none, where the page has a legend for several charts. */
  legend?: boolean
}

/** Where a picture stands inside another one. */
export interface Place {
  x: number
  y: number
}

/** Colours that can be read on white and on black. */
export const INK = '#7a828e'
const GRID = '#8c959f55'
export const FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif'

/** Styles for up to six lines: colours, dashes and markers each tell them apart. */
export const STYLES = [
  { color: '#2f81f7', marker: 'circle' },
  { color: '#d1495b', dash: '2 4', marker: 'triangle' },
  { color: '#3a9d5d', dash: '11 3 2 3', marker: 'square' },
  { color: '#c98a00', dash: '7 4', marker: 'diamond' },
  { color: '#9a6bdd', dash: '14 4', marker: 'circle' },
  { color: '#7a828e', dash: '4 2', marker: 'square' },
] as const satisfies readonly LineStyle[]

/** Size of a chart. At this width twelve-pixel text can still be read where the page is a phone's. */
export const WIDTH = 440
export const HEIGHT = 300
/** Space about the plot of a chart with axes. */
export const MARGIN = { left: 58, right: 22, top: 34, bottom: 46 }
const { left: LEFT, right: RIGHT, top: TOP, bottom: BOTTOM } = MARGIN
const LEGEND_ROW = 17

export const escapeXml = (text: string): string =>
  text.replace(/[&<>"]/g, (character) => `&#${character.codePointAt(0)};`)

/** A length in the picture: a tenth of a pixel is enough. */
export const round = (value: number): string => String(Math.round(value * 10) / 10)

export const textAt = (left: number, top: number, content: string, rest = ''): string =>
  `<text x="${round(left)}" y="${round(top)}"${rest && ` ${rest}`}>${escapeXml(content)}</text>`

/** A picture of its own, or, with `at`, a part of another one. */
export function svg(title: string, height: number, parts: readonly string[], at?: Place): string {
  const place = at ? ` x="${at.x}" y="${at.y}"` : ''
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" class="chart"${place} width="${WIDTH}" height="${height}" ` +
    `viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="${escapeXml(title)}" font-size="12" fill="${INK}" ` +
    `font-family="${escapeXml(FONT)}">${parts.join('')}</svg>`
  )
}

/** Markers stay apart where a line has many points. */
const MARKERS = 8

/** Lines over two axes, each linear or logarithmic, as an <svg> of WIDTH x HEIGHT (higher with a legend). */
export function lineChart({ title, x, y, lines, marks = [], legend = false }: LineChart, at?: Place): string {
  const { parts: named, height: shift } = legend ? legendRows(lines) : { parts: [], height: 0 }
  const height = HEIGHT + shift
  const top = TOP + shift
  const px = scale(x, LEFT, WIDTH - RIGHT)
  const py = scale(y, height - BOTTOM, top)
  const parts = [titleText(title), ...named, ...axes(x, y, height, top)]
  const inside = (value: number): number => py(Math.min(y.max, Math.max(y.min, value)))
  for (const { band, color } of lines) {
    if (!band) continue
    const upper = band.map(([a, , high]) => `${round(px(a))} ${round(inside(high))}`)
    const lower = band.map(([a, low]) => `${round(px(a))} ${round(inside(low))}`).reverse()
    parts.push(`<path d="M${[...upper, ...lower].join('L')}Z" fill="${color}" fill-opacity=".18"/>`)
  }
  const words: string[] = []
  for (const mark of marks) {
    const [a, b, path] =
      'x' in mark
        ? [px(mark.x) + 5, top + 104, `M${round(px(mark.x))} ${top}V${height - BOTTOM}`]
        : [LEFT + 6, py(mark.y) - 5, `M${LEFT} ${round(py(mark.y))}H${WIDTH - RIGHT}`]
    parts.push(`<path d="${path}" stroke="${INK}" stroke-dasharray="2 3"/>`)
    words.push(textAt(a, b, mark.text, 'font-size="11" class="halo"'))
  }
  for (const line of lines) {
    for (const run of finiteRuns(line.points)) {
      const points = run.map(([a, b]) => [px(a), inside(b)] as const)
      if (!line.dots) parts.push(stroke(line, points))
      const every = line.dots ? 1 : Math.ceil(run.length / MARKERS)
      points.forEach(([a, b], i) => i % every === 0 && parts.push(marker(line, a, b)))
    }
  }
  return svg(title, height, [...parts, ...words], at)
}

/** What a line looks like, for a legend: a stroke with its marker in 30 x 12. */
export const sample = (line: LineStyle, left: number, top: number): string =>
  (line.dots
    ? ''
    : `<path d="M${round(left)} ${round(top)}h30" stroke="${line.color}" stroke-width="${line.width ?? 2.2}"${dashOf(line)}/>`) +
  marker(line, left + 15, top)

/** Round numbers from min to max, about `count` of them. */
export function ticksOf(min: number, max: number, count = 5): number[] {
  const rough = (max - min) / count
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.8)!
  const first = Math.ceil(min / step - 1e-9)
  const last = Math.floor(max / step + 1e-9)
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)))
}

/** Powers of ten between min and max, both above 0, with 2 and 5 times them where there are few. */
export function logTicksOf(min: number, max: number): number[] {
  const decades = Math.log10(max / min)
  const factors = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 5, 7]
  const every = Math.max(1, Math.ceil(decades / 7))
  const ticks: number[] = []
  for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power++) {
    if (power % every !== 0) continue
    ticks.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(12))))
  }
  return ticks.filter((tick) => tick >= min * 0.999 && tick <= max * 1.001)
}

/** Title of a chart. */
export const titleText = (title: string): string => textAt(LEFT, 18, title, 'font-size="14" font-weight="600"')

/** Grid, numbers and names of both axes, in a chart of this height whose plot begins at `top`. */
export function axes(x: Axis, y: Axis, height: number, top: number): string[] {
  const px = scale(x, LEFT, WIDTH - RIGHT)
  const py = scale(y, height - BOTTOM, top)
  const parts: string[] = []
  const vertical = (value: number): string => `M${round(px(value))} ${top}V${height - BOTTOM}`
  const horizontal = (value: number): string => `M${LEFT} ${round(py(value))}H${WIDTH - RIGHT}`
  const lines = [...(x.grid ?? []).map(vertical), ...[...y.ticks, ...(y.grid ?? [])].map(horizontal)]
  parts.push(`<path d="${lines.join('')}" stroke="${GRID}"/>`)
  for (const tick of y.ticks) {
    parts.push(textAt(LEFT - 7, py(tick) + 4, (y.format ?? String)(tick), 'text-anchor="end"'))
  }
  for (const tick of x.ticks) {
    parts.push(textAt(px(tick), height - BOTTOM + 18, (x.format ?? String)(tick), 'text-anchor="middle"'))
  }
  parts.push(textAt((LEFT + WIDTH - RIGHT) / 2, height - 8, x.label, 'text-anchor="middle"'))
  parts.push(sideways(y.label, (top + height - BOTTOM) / 2))
  return parts
}

/** The name of a y axis, around this middle. */
export const sideways = (label: string, middle: number): string =>
  textAt(0, 0, label, `text-anchor="middle" transform="translate(15 ${round(middle)}) rotate(-90)"`)

/** From a value of the axis to pixels between `from` and `to`. */
export function scale({ min, max, log }: Axis, from: number, to: number): (value: number) => number {
  const f = log ? Math.log : (value: number) => value
  return (value) => from + ((f(value) - f(min)) / (f(max) - f(min))) * (to - from)
}

/** Names of the lines in rows below the title, and the height that they take. */
export function legendRows(lines: readonly (LineStyle & { name?: string })[]): { parts: string[]; height: number } {
  const parts: string[] = []
  let [left, row] = [LEFT, 0]
  for (const line of lines) {
    if (line.name === undefined) continue
    // as wide as 12 pixel text of these fonts gets
    const width = 50 + 6.4 * line.name.length
    if (left > LEFT && left + width > WIDTH - 4) [left, row] = [LEFT, row + 1]
    const middle = TOP + 2 + row * LEGEND_ROW
    parts.push(sample(line, left, middle), textAt(left + 36, middle + 4, line.name))
    left += width
  }
  return { parts, height: parts.length > 0 ? (row + 1) * LEGEND_ROW : 0 }
}

const dashOf = ({ dash }: LineStyle): string => (dash ? ` stroke-dasharray="${dash}"` : '')

function stroke(line: LineStyle, points: readonly Point[]): string {
  const path = thinned(points).map(([a, b], i) => `${i === 0 ? 'M' : 'L'}${round(a)} ${round(b)}`)
  const width = line.width ?? 2.2
  return `<path d="${path.join('')}" fill="none" stroke="${line.color}" stroke-width="${width}" stroke-linejoin="round"${dashOf(line)}/>`
}

type Point = readonly [x: number, y: number]

/** The stretches of a line between values that are not finite. */
function finiteRuns(points: readonly Point[]): Point[][] {
  const runs: Point[][] = [[]]
  for (const point of points) {
    if (point.every(Number.isFinite)) runs.at(-1)!.push(point)
    else if (runs.at(-1)!.length > 0) runs.push([])
  }
  return runs.filter((run) => run.length > 0)
}

/** Half a pixel wide: what falls into one column looks the same as its first, lowest, highest and last point. */
const COLUMN = 0.5

/** The same picture with at most four points for each column. */
function thinned(points: readonly Point[]): readonly Point[] {
  if (points.length <= 2 * WIDTH) return points
  const kept: Point[] = []
  for (let from = 0; from < points.length;) {
    const column = Math.floor(points[from]![0] / COLUMN)
    let [to, low, high] = [from, from, from]
    for (; to < points.length && Math.floor(points[to]![0] / COLUMN) === column; to++) {
      if (points[to]![1] < points[low]![1]) low = to
      if (points[to]![1] > points[high]![1]) high = to
    }
    const chosen = new Set([from, low, high, to - 1].sort((a, b) => a - b))
    for (const i of chosen) kept.push(points[i]!)
    from = to
  }
  return kept
}

function marker({ color, marker: shape }: LineStyle, left: number, top: number): string {
  if (shape === undefined) return ''
  const [a, b] = [round(left), round(top)]
  const outlines = {
    circle: `M${a} ${b}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z`,
    square: `M${a} ${b}m-3.5 -3.5h7v7h-7Z`,
    triangle: `M${a} ${b}m0 -4.5l4.5 8h-9Z`,
    diamond: `M${a} ${b}m0 -5l5 5l-5 5l-5 -5Z`,
    dot: `M${a} ${b}m-1.5 0a1.5 1.5 0 1 0 3 0a1.5 1.5 0 1 0 -3 0Z`,
  }
  return `<path d="${outlines[shape]}" fill="${color}"/>`
}
