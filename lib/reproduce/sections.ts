import type { Finding } from '../report/page.js'
import type { ReportFolder } from './folder.js'
import type { Plan } from './models.js'
import type { Unit } from './units.js'

/** A figure as the tables show it and as the CSV has it. */
export interface Cell {
  value: number | string | boolean | null
  text: string
  /** Known before anything is measured. */
  given?: true
}

export interface Table {
  /** Name of its CSV file. */
  id: string
  caption: string
  head: string[]
  rows: Cell[][]
}

/** One experiment on the page. */
export interface Section {
  id: string
  title: string
  /** What was measured and how, a paragraph each. */
  text: string[]
  tables: Table[]
  charts: string[]
  /** Further charts, in groups with a name above each. */
  groups?: { name: string; charts: string[] }[]
  findings?: Finding[]
  /** What could not be measured, and why. */
  leftOut: string[]
  /** What could be, if it were asked for. */
  notAsked?: string[]
}

export interface Experiment {
  id: string
  title: string
  /** Data sets without which there is nothing to run, besides the texts to fine-tune on. */
  data: readonly string[]
  /** Data sets of which one is enough. */
  someOf?: readonly string[]
  /** Whether it needs fine-tuned models, and so texts to train on. */
  trains: boolean
  /** Its work; where a part has data of its own, that for what is given. */
  units(plan: Plan): Unit[]
  section(folder: ReportFolder): Section
}

export const cell = (value: Cell['value'], text = value === null ? '–' : String(value)): Cell => ({ value, text })
/** A number of the settings, as of steps or tokens. */
export const given = (value: number): Cell => ({ value, text: String(value), given: true })
export const label = (text: string): Cell => cell(text)
export const none = (text = '–'): Cell => cell(null, text)

/** A figure by a format; a dash where there is none. */
export const figure = (value: number | undefined | null, format: (value: number) => string): Cell =>
  value === undefined || value === null ? none() : cell(value, format(value))

/** As the paper prints perplexities: two decimals, and what is beyond a thousand as such. */
export const perplexityText = (value: number): string =>
  value < 1000 ? value.toFixed(2) : Number.isFinite(value) ? '> 1000' : 'not finite'
export const percent = (value: number): string => `${(100 * value).toFixed(0)} %`
export const percent1 = (value: number): string => `${(100 * value).toFixed(1)} %`
export const signed = (value: number): string => `${value < 0 ? '−' : '+'}${(100 * Math.abs(value)).toFixed(1)} %`
export const intervalText = ([low, high]: readonly [number, number]): string =>
  `${perplexityText(low)}–${perplexityText(high)}`

/** RFC 4180, with the values as they are in the JSON. */
export function csvOf({ head, rows }: Table): string {
  const field = (value: Cell['value']): string => {
    const text = value === null ? '' : String(value)
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text
  }
  const lines = [head, ...rows.map((row) => row.map(({ value }) => value))]
  return lines.map((line) => `${line.map(field).join(',')}\n`).join('')
}
