/** A line of a chart; `color` and `dash` must tell it from the others on a white and on a black background. */
export interface Line {
  color: string
  dash?: string
  marker: 'circle' | 'square' | 'triangle' | 'diamond'
  points: readonly (readonly [x: number, y: number])[]
}

export interface Axis {
  label: string
  min: number
  max: number
  ticks: readonly number[]
  log?: boolean
  format?: (value: number) => string
}

export interface Chart {
  title: string
  x: Axis
  y: Axis
  lines: readonly Line[]
  /** A vertical line with a word beside it. */
  mark?: { x: number; text: string }
}

/** Colours that can be read on white and on black. */
export const INK = '#7a828e'
const GRID = '#8c959f55'
export const FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif'

export const WIDTH = 440
export const HEIGHT = 300
const LEFT = 58
const RIGHT = 22
const TOP = 34
const BOTTOM = 46

export const escapeXml = (text: string): string =>
  text.replace(/[&<>"]/g, (character) => `&#${character.codePointAt(0)};`)

const round = (value: number): string => String(Math.round(value * 10) / 10)

/** Markers stay apart where a line has many points. */
const MARKERS = 8

/** A chart as an <svg> of WIDTH x HEIGHT; `at` places it inside another one. */
export function chart({ title, x, y, lines, mark }: Chart, at?: { x: number; y: number }): string {
  const px = scale(x, LEFT, WIDTH - RIGHT)
  const py = scale(y, HEIGHT - BOTTOM, TOP)
  const text = (left: number, top: number, content: string, rest = ''): string =>
    `<text x="${round(left)}" y="${round(top)}" ${rest}>${escapeXml(content)}</text>`
  const parts = [text(LEFT, 18, title, 'font-size="14" font-weight="600"')]
  for (const tick of y.ticks) {
    const top = py(tick)
    parts.push(`<path d="M${LEFT} ${round(top)}H${WIDTH - RIGHT}" stroke="${GRID}"/>`)
    parts.push(text(LEFT - 7, top + 4, (y.format ?? String)(tick), 'text-anchor="end"'))
  }
  for (const tick of x.ticks) {
    parts.push(text(px(tick), HEIGHT - BOTTOM + 18, (x.format ?? String)(tick), 'text-anchor="middle"'))
  }
  parts.push(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label, 'text-anchor="middle"'))
  const middle = round((TOP + HEIGHT - BOTTOM) / 2)
  parts.push(text(0, 0, y.label, `text-anchor="middle" transform="translate(15 ${middle}) rotate(-90)"`))
  if (mark) {
    const left = round(px(mark.x))
    parts.push(`<path d="M${left} ${TOP}V${HEIGHT - BOTTOM}" stroke="${INK}" stroke-dasharray="2 3"/>`)
    parts.push(text(px(mark.x) + 5, TOP + 104, mark.text, 'font-size="11"'))
  }
  for (const line of lines) {
    const points = line.points.map(([a, b]) => [px(a), py(Math.min(y.max, Math.max(y.min, b)))] as const)
    const path = points.map(([a, b], i) => `${i === 0 ? 'M' : 'L'}${round(a)} ${round(b)}`).join('')
    const dash = line.dash ? ` stroke-dasharray="${line.dash}"` : ''
    parts.push(
      `<path d="${path}" fill="none" stroke="${line.color}" stroke-width="2.2" stroke-linejoin="round"${dash}/>`,
    )
    const every = Math.ceil(points.length / MARKERS)
    points.forEach(([a, b], i) => i % every === 0 && parts.push(marker(line, a, b)))
  }
  const place = at ? ` x="${at.x}" y="${at.y}"` : ''
  return (
    `<svg xmlns="http://www.w3.org/2000/svg"${place} width="${WIDTH}" height="${HEIGHT}" ` +
    `viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${escapeXml(title)}" font-size="12" fill="${INK}" ` +
    `font-family="${escapeXml(FONT)}">${parts.join('')}</svg>`
  )
}

/** What a line looks like, for a legend: a stroke with its marker in 30 x 12. */
export const sample = (line: Omit<Line, 'points'>, left: number, top: number): string =>
  `<path d="M${left} ${top}h30" stroke="${line.color}" stroke-width="2.2"${line.dash ? ` stroke-dasharray="${line.dash}"` : ''}/>` +
  marker(line, left + 15, top)

function marker({ color, marker: shape }: Pick<Line, 'color' | 'marker'>, left: number, top: number): string {
  const [a, b] = [round(left), round(top)]
  const outlines = {
    circle: `M${a} ${b}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z`,
    square: `M${a} ${b}m-3.5 -3.5h7v7h-7Z`,
    triangle: `M${a} ${b}m0 -4.5l4.5 8h-9Z`,
    diamond: `M${a} ${b}m0 -5l5 5l-5 5l-5 -5Z`,
  }
  return `<path d="${outlines[shape]}" fill="${color}"/>`
}

function scale({ min, max, log }: Axis, from: number, to: number): (value: number) => number {
  const f = log ? Math.log : (value: number) => value
  return (value) => from + ((f(value) - f(min)) / (f(max) - f(min))) * (to - from)
}
