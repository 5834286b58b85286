// How results are shown: rows of a table for a terminal, and CSV.
import type { CaseResult, Profile, Report, SideResult } from './run.js'
import type { Fact } from './step.js'

export interface Table {
  head: string[]
  rows: (string | number)[][]
}

/** Three significant digits, without an exponent. */
export const short = (value: number): string => (value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))))

const percent = (part: number): string => `${(100 * part).toFixed(0)} %`

const versus = ({ name, rate, ours }: SideResult): string =>
  `${name} ${short(rate.median)} (${ours.median.toFixed(2)}x, best ${ours.best.toFixed(2)}x)`

export function caseTable(cases: readonly CaseResult[]): Table {
  const head = [
    'case',
    'threads',
    'median',
    'quartiles',
    'n',
    'roofline',
    'ours is',
    'bar',
    'peers (ours is ... as fast)',
  ]
  const rows = cases.map(({ stem, name, threads, unit, ours, peers, roofline, bar, ...rest }) => [
    `${stem} ${name}${rest.remark ? ` (${rest.remark})` : ''}`,
    threads || '-',
    [
      `${short(ours.median)} ${unit}`,
      ...(rest.tokensPerSecond === undefined ? [] : [`${short(rest.tokensPerSecond)} tokens/s`]),
      ...(rest.bytes === undefined ? [] : [`${short(rest.bytes / 1e9)} GB`]),
    ].join(', '),
    `${short(ours.q1)}..${short(ours.q3)}`,
    ours.n,
    `${roofline.name} ${short(roofline.rate.median)}`,
    percent(roofline.ours.median),
    bar ? `${bar.met ? 'met' : 'NOT met'}: ${bar.least.toFixed(2)} ${bar.side}` : '-',
    peers.map(versus).join(', ') || '-',
  ])
  return { head, rows }
}

export function factTable(facts: readonly Fact[]): Table {
  const value = ({ value, unit }: Fact): string =>
    unit === 'bytes' ? `${(value / 1e6).toFixed(1)} MB` : unit === 'ms' ? `${short(value)} ms` : value.toFixed(3)
  const bar = ({ least, most }: Fact): string =>
    least !== undefined && least === most ? `= ${most}` : most !== undefined ? `<= ${most}` : '-'
  const met = ({ value, least = -Infinity, most = Infinity }: Fact): string =>
    least === -Infinity && most === Infinity ? '' : value >= least && value <= most ? 'met' : 'NOT met'
  return {
    head: ['also measured', 'value', 'bar', ''],
    rows: facts.map((fact) => [fact.name, value(fact), bar(fact), met(fact)]),
  }
}

export function profileTable({ model, time, rows }: Profile): Table {
  const total = rows.reduce((sum, { seconds }) => sum + seconds, 0)
  return {
    head: [`operation of a step of ${model}, T ${time}`, 'count', 'ms', 'share', 'GFLOP/s', 'GB/s'],
    rows: [
      ...rows.map(({ op, count, seconds, flops, traffic }) => [
        ...[op, count, (1000 * seconds).toFixed(1), `${((100 * seconds) / total).toFixed(1)} %`],
        ...[short(flops / seconds / 1e9), short(traffic / seconds / 1e9)],
      ]),
      ['all', rows.reduce((sum, { count }) => sum + count, 0), (1000 * total).toFixed(1), '100 %', '', ''],
    ],
  }
}

/** One line about what was measured on. */
export function machineLine({
  device,
  deviceDescription,
  cpu,
  cores,
  isa,
  memoryBytes,
  node,
}: Report['machine']): string {
  const host = `${cpu}, ${cores} cores, ${isa}, ${(memoryBytes / 2 ** 30).toFixed(1)} GiB, Node ${node}`
  return device === 'cpu' ? host : `${device}: ${deviceDescription}; ${host}`
}

const COLUMNS = [
  'stem',
  'case',
  'threads',
  'side',
  'unit',
  'median',
  'q1',
  'q3',
  'min',
  'max',
  'n',
  'ours',
  'ours_best',
]

/** One line for each side of each case. */
export function csv({ cases }: Report): string {
  const lines = cases.flatMap(({ stem, name, threads, unit, ours, peers, roofline }) => {
    const own: SideResult = { name: 'ropewalk', rate: ours, ours: { median: 1, best: 1 } }
    return [own, ...peers, roofline].map((side) => {
      const { median, q1, q3, min, max, n } = side.rate
      return [stem, name, threads, side.name, unit, median, q1, q3, min, max, n, side.ours.median, side.ours.best]
    })
  })
  const cell = (value: string | number): string => {
    const text = String(value)
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text
  }
  return [COLUMNS, ...lines].map((line) => `${line.map(cell).join(',')}\n`).join('')
}
