import {
  type Axis,
  axes,
  HEIGHT,
  INK,
  legendRows,
  MARGIN,
  type Place,
  round,
  scale,
  sideways,
  svg,
  textAt,
  titleText,
  WIDTH,
} from './plot.js'

/** A table of values as coloured cells. */
export interface HeatMap {
  title: string
  /** Names of the columns, and of what they are. */
  x: { label: string; names: readonly string[] }
  /** Names of the rows, from the top down. */
  y: { label: string; names: readonly string[] }
  /** By row and column; one that is not finite is an empty cell. */
  values: readonly (readonly number[])[]
  /** The values of the first and of the last colour. */
  min: number
  max: number
  /** What stands in a cell; default: nothing. */
  format?: (value: number) => string
  /** What the scale beside the cells says; default: as `format`, or the plain number. */
  formatScale?: (value: number) => string
}

/** From dark to light in even steps of lightness, also for the colour-blind and in grey. */
const COLOURS = ['#440154', '#414487', '#2a788e', '#22a884', '#7ad151', '#fde725'].map((hex) =>
  [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)),
)

const CELLS_TOP = MARGIN.top
const SCALE = 54

/** Cells in colours from dark (min) to light (max) with their values in them, as an <svg> of WIDTH and a height by rows. */
export function heatMap(map: HeatMap, at?: Place): string {
  const { title, x, y, values, min, max, format } = map
  const longest = Math.max(...y.names.map((name) => name.length))
  const left = Math.max(MARGIN.left, 34 + 7.2 * longest)
  const wide = (WIDTH - SCALE - left) / x.names.length
  const tall = Math.min(30, Math.max(8, (HEIGHT - CELLS_TOP - MARGIN.bottom) / y.names.length))
  const bottom = CELLS_TOP + tall * y.names.length
  const parts = [titleText(title)]
  values.forEach((row, i) =>
    row.forEach((value, j) => {
      const [a, b] = [left + j * wide, CELLS_TOP + i * tall]
      const box = `x="${round(a)}" y="${round(b)}" width="${round(wide - 1)}" height="${round(tall - 1)}"`
      if (!Number.isFinite(value)) {
        parts.push(`<rect ${box} fill="none" stroke="${INK}" stroke-opacity=".4"/>`)
        return
      }
      const { color, ink } = shade((value - min) / (max - min))
      parts.push(`<rect ${box} fill="${color}"/>`)
      const text = format?.(value) ?? ''
      if (text === '' || tall < 13) return
      const size = Math.min(11, (wide - 3) / (0.62 * text.length))
      const middle = b + tall / 2 + size * 0.35
      const font = `font-size="${round(size)}" text-anchor="middle" style="fill:${ink}"`
      if (size >= 6) parts.push(textAt(a + wide / 2, middle, text, font))
    }),
  )
  const everyRow = Math.ceil(13 / tall)
  y.names.forEach((name, i) => {
    if (i % everyRow === 0) parts.push(textAt(left - 7, CELLS_TOP + (i + 0.5) * tall + 4, name, 'text-anchor="end"'))
  })
  const widest = Math.max(...x.names.map((name) => name.length))
  const everyColumn = Math.ceil((6.6 * widest + 6) / wide)
  x.names.forEach((name, j) => {
    if (j % everyColumn === 0) parts.push(textAt(left + (j + 0.5) * wide, bottom + 16, name, 'text-anchor="middle"'))
  })
  parts.push(textAt((left + WIDTH - SCALE) / 2, bottom + 38, x.label, 'text-anchor="middle"'))
  parts.push(sideways(y.label, (CELLS_TOP + bottom) / 2))
  parts.push(...scaleBar(map, bottom))
  return svg(title, Math.ceil(bottom) + MARGIN.bottom, parts, at)
}

/** What the colours mean, right of the cells. */
function scaleBar({ min, max, format, formatScale }: HeatMap, bottom: number): string[] {
  const steps = 24
  const step = (bottom - CELLS_TOP) / steps
  const left = WIDTH - SCALE + 7
  const name = formatScale ?? format ?? String
  const parts = Array.from({ length: steps }, (_, i) => {
    const { color } = shade((i + 0.5) / steps)
    const top = bottom - (i + 1) * step
    return `<rect x="${left}" y="${round(top)}" width="9" height="${round(step + 0.3)}" fill="${color}"/>`
  })
  for (const [value, top] of [
    [max, CELLS_TOP + 9],
    [min, bottom],
  ] as const) {
    parts.push(textAt(left + 12, top, name(value), 'font-size="9"'))
  }
  return parts
}

/** The colour of a part from 0 to 1, and an ink that can be read on it. */
function shade(part: number): { color: string; ink: string } {
  const place = Math.min(1, Math.max(0, part)) * (COLOURS.length - 1)
  const below = Math.min(COLOURS.length - 2, Math.floor(place))
  const mixed = COLOURS[below]!.map((value, i) =>
    Math.round(value + (COLOURS[below + 1]![i]! - value) * (place - below)),
  )
  const [red, green, blue] = mixed as [number, number, number]
  const bright = 0.299 * red + 0.587 * green + 0.114 * blue
  const hex = mixed.map((value) => value.toString(16).padStart(2, '0')).join('')
  return { color: `#${hex}`, ink: bright > 125 ? '#101418' : '#ffffff' }
}

export interface BarChart {
  title: string
  /** Names below the groups of bars. */
  groups: readonly string[]
  /** Of the bars; on a logarithmic axis they grow from its least value. */
  y: Axis
  /** One bar in each group; a value that is not finite is left out. */
  series: readonly {
    name: string
    color: string
    values: readonly number[]
    /** Confidence intervals. */
    intervals?: readonly (readonly [low: number, high: number])[]
  }[]
  xLabel?: string
  legend?: boolean
}

/** Groups of bars, as an <svg> of WIDTH x HEIGHT (higher with a legend). */
export function barChart({ title, groups, y, series, xLabel = '', legend = false }: BarChart, at?: Place): string {
  const { left, right, bottom } = MARGIN
  const names = series.map(({ name, color }) => ({ name, color, width: 9 }))
  const { parts: named, height: shift } = legend ? legendRows(names) : { parts: [], height: 0 }
  const height = HEIGHT + shift
  const top = MARGIN.top + shift
  const py = scale(y, height - bottom, top)
  const inside = (value: number): number => py(Math.min(y.max, Math.max(y.min, value)))
  const x: Axis = { label: xLabel, min: 0, max: groups.length, ticks: groups.map((_, i) => i + 0.5) }
  const px = scale(x, left, WIDTH - right)
  const wide = ((px(1) - px(0)) * 0.76) / series.length
  const base = inside(Math.max(y.min, y.log ? y.min : 0))
  const format = (value: number): string => groups[Math.floor(value)]!
  const parts = [titleText(title), ...named, ...axes({ ...x, format }, y, height, top)]
  series.forEach(({ values, color, intervals }, i) =>
    values.forEach((value, group) => {
      if (!Number.isFinite(value)) return
      const a = px(group + 0.12) + i * wide
      const b = inside(value)
      const size = `width="${round(wide * 0.92)}" height="${round(Math.abs(base - b))}"`
      parts.push(`<rect x="${round(a)}" y="${round(Math.min(b, base))}" ${size} fill="${color}"/>`)
      const interval = intervals?.[group]
      if (!interval?.every(Number.isFinite)) return
      const [low, high] = interval.map((end) => round(inside(end)))
      const middle = round(a + wide * 0.46)
      parts.push(
        `<path d="M${middle} ${low}V${high}m-3 0h6M${middle} ${low}m-3 0h6" stroke="${INK}" stroke-width="1.4"/>`,
      )
    }),
  )
  return svg(title, height, parts, at)
}
