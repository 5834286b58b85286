import type { ReportRecord } from './folder.js'
import { type Cell, cell, label, none, type Table } from './sections.js'

/** The figures of arXiv 2306.15595v2, tables 1 to 6, as they are printed there. */

type Row = readonly (string | number | null)[]

interface Published {
  caption: string
  head: readonly string[]
  rows: readonly Row[]
}

const WINDOWS = ['model: window, method', '2048', '4096', '8192', '16384', '32768']
const OVER = '> 10³'

export const PUBLISHED: Readonly<Record<string, Published>> = {
  'table-1': {
    caption: 'Published: PG-19, perplexity',
    head: WINDOWS,
    rows: [
      ['7B 2048, none', 7.2, OVER, OVER, OVER, OVER],
      ['7B 8192, FT', 7.21, 7.34, 7.69, null, null],
      ['7B 8192, PI', 7.13, 6.96, 6.95, null, null],
      ['7B 16384, PI', 7.11, 6.93, 6.82, 6.83, null],
      ['7B 32768, PI', 7.23, 7.04, 6.91, 6.8, 6.77],
      ['13B 2048, none', 6.59, null, null, null, null],
      ['13B 8192, FT', 6.56, 6.57, 6.69, null, null],
      ['13B 8192, PI', 6.55, 6.42, 6.42, null, null],
      ['13B 16384, PI', 6.56, 6.42, 6.31, 6.32, null],
      ['13B 32768, PI', 6.54, 6.4, 6.28, 6.18, 6.09],
      ['33B 2048, none', 5.82, null, null, null, null],
      ['33B 8192, FT', 5.88, 5.99, 6.21, null, null],
      ['33B 8192, PI', 5.82, 5.69, 5.71, null, null],
      ['33B 16384, PI', 5.87, 5.74, 5.67, 5.68, null],
      ['65B 2048, none', 5.49, null, null, null, null],
      ['65B 8192, PI', 5.42, 5.32, 5.37, null, null],
    ],
  },
  'table-2': {
    caption: 'Published: Proof-pile, perplexity',
    head: WINDOWS,
    rows: [
      ['7B 2048, none', 2.77, null, null, null, null],
      ['7B 8192, FT', 2.85, 2.74, 2.73, null, null],
      ['7B 8192, PI', 2.79, 2.57, 2.39, null, null],
      ['7B 16384, PI', 2.79, 2.57, 2.37, 2.25, null],
      ['7B 32768, PI', 2.82, 2.59, 2.39, 2.24, 2.48],
      ['13B 2048, none', 2.66, null, null, null, null],
      ['13B 8192, FT', 2.71, 2.56, 2.5, null, null],
      ['13B 8192, PI', 2.67, 2.47, 2.3, null, null],
      ['13B 16384, PI', 2.68, 2.47, 2.29, 2.18, null],
      ['13B 32768, PI', 2.68, 2.46, 2.28, 2.15, 2.35],
      ['33B 2048, none', 2.49, null, null, null, null],
      ['33B 8192, FT', 2.56, 2.48, 2.47, null, null],
      ['33B 8192, PI', 2.5, 2.32, 2.18, null, null],
      ['33B 16384, PI', 2.53, 2.34, 2.18, 2.07, null],
      ['65B 2048, none', 2.42, null, null, null, null],
      ['65B 8192, PI', 2.43, 2.26, 2.12, null, null],
    ],
  },
  'table-3': {
    caption: 'Published: LLaMA 7B, PG-19, perplexity at the extended window by steps',
    head: ['window', '0', '200', '400', '600', '800', '1000'],
    rows: [
      ['8192', 16.1, 7.12, 7.1, 7.02, 6.99, 6.95],
      ['16384', 112.13, 7.05, 6.93, 6.88, 6.84, 6.83],
    ],
  },
  'table-4': {
    caption: 'Published: k_max by steps',
    head: ['model: window, method', '200', '400', '600', '800', '1000', '10000'],
    rows: [
      ['7B 8192, FT', 1792, 2048, 2048, 2048, 2304, 2560],
      ['33B 8192, FT', 1792, 2048, 1792, 2048, 2304, null],
      ['7B 8192, PI', 8192, 8192, 8192, 8192, 8192, null],
      ['7B 16384, PI', 16384, 16384, 16384, 16384, 16384, null],
      ['7B 32768, PI', 32768, 32768, 18432, 32768, 32768, null],
      ['33B 8192, PI', 8192, 8192, 8192, 8192, 8192, null],
      ['33B 16384, PI', 16384, 16384, 16384, 16384, 16384, null],
    ],
  },
  'table-5': {
    caption: 'Published: zero-shot accuracy in %, within 2048 tokens',
    head: ['model: window, tuned on', 'BoolQ', 'PIQA', 'RACE-M', 'RACE-H', 'WinoGrande'],
    rows: [
      ['7B 2048, none', 76.1, 78.9, 55.7, 42.2, 69.6],
      ['7B 8192, Pile', 73.2, 78.2, 53.8, 41.7, 69],
      ['7B 16384, Pile', 69.8, 77.6, 53.3, 40.9, 67.8],
      ['7B 32768, Pile', 64.7, 77.2, 50.1, 39.6, 66.9],
      ['7B 8192, RedPajama', 75.5, 77.4, 54.5, 41.5, 68.1],
      ['33B 2048, none', 81.6, 80.2, 61.1, 45.9, 76.2],
      ['33B 8192, Pile', 80.2, 80.7, 60.2, 45.7, 75.9],
    ],
  },
  'table-6': {
    caption: 'Published: GovReport, ROUGE',
    head: ['model', 'context', 'ROUGE-1', 'ROUGE-2', 'ROUGE-L'],
    rows: [
      ['CoLT5-Base', 16384, 58.7, 29.6, 31.4],
      ['CoLT5-XL', 16384, 61.3, 32.2, 33.8],
      ['LLaMA 7B, PI', 16384, 60, 28, 29.5],
    ],
  },
}

/** Beside what was measured; of the miniature it is said that the two are not of one kind. */
export function publishedTable(id: string, kind: ReportRecord['kind']): Table[] {
  const { caption, head, rows } = PUBLISHED[id]!
  const toCell = (value: string | number | null, column: number): Cell => {
    if (value === null) return none('')
    if (typeof value === 'string') return column === 0 ? label(value) : cell(value)
    const text = Number.isInteger(value) && value >= 1000 ? String(value) : value.toFixed(id < 'table-4' ? 2 : 1)
    return cell(value, text)
  }
  const rest =
    kind === 'miniature' ? ' (LLaMA on the real data: not comparable with the miniature, for the shape only)' : ''
  return [
    {
      id: `${id}-published`,
      caption: `${caption}${rest}`,
      head: [...head],
      rows: rows.map((row) => row.map(toCell)),
    },
  ]
}
