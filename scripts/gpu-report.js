// The Markdown of a report of gpu.js, for people.
import { existsSync } from 'node:fs'

// Only a bundle has the compiled library beside this file.
const compiled = new URL('../lib/bench/report.js', import.meta.url)
const tables = existsSync(compiled) ? await import(compiled) : undefined

const cell = (value) => String(value).replaceAll('|', '\\|').replaceAll(/\s+/g, ' ')
const row = (cells) => `| ${cells.map(cell).join(' | ')} |`
const table = (head, rows) => [row(head), `|${head.map(() => '---|').join('')}`, ...rows.map(row), ''].join('\n')

const percent = (part) => (part === undefined ? '' : `${(100 * part).toFixed(1)} %`)

export function markdown(report) {
  const { machine = {}, device, date, commit, parts, seconds } = report
  const lines = [`# ropewalk on ${machine.gpu ?? device}, ${date.slice(0, 10)}`, '']
  const facts = Object.entries({ device, ...machine, commit, begun: date, seconds })
  lines.push(
    table(
      ['', ''],
      facts.filter(([, value]) => value !== undefined && value !== null),
    ),
  )
  lines.push('## Parts', '')
  lines.push(
    table(
      ['part', 'result', 'seconds', ''],
      Object.entries(parts).map(([name, { status, seconds, summary }]) => [name, status, seconds, summary]),
    ),
  )
  for (const [name, { problems = [] }] of Object.entries(parts)) {
    if (problems.length === 0) continue
    lines.push(`### What failed in ${name}`, '', ...problems.map((problem) => `- ${cell(problem)}`), '')
  }
  const steps = parts.step?.steps ?? []
  if (steps.length > 0) {
    lines.push(
      '## Training steps',
      '',
      'MFU: of the matrix product measured in the same run, and of the data sheet.',
      '',
    )
    const rows = steps.map(({ name, remark, seconds, tokensPerSecond, bytes, teraflops, ...rest }) => [
      `${name}${remark ? ` (${remark})` : ''}`,
      `${seconds.toFixed(3)} s`,
      tokensPerSecond.toFixed(0),
      `${(bytes / 1e9).toFixed(1)} GB`,
      teraflops.toFixed(1),
      percent(rest.mfuOfMeasured),
      percent(rest.mfuOfSheet),
    ])
    lines.push(table(['step', 'time', 'tokens/s', 'memory', 'TFLOP/s', 'MFU (measured)', 'MFU (sheet)'], rows))
  }
  const reports = [...(parts.step?.reports ?? []), ...(parts.bench?.reports ?? [])]
  if (reports.length > 0 && tables) {
    const [{ machine, settings }] = reports
    lines.push('## Measurements', '', `${machine.deviceDescription}; peers: ${settings.peers.join('; ') || 'none'}`, '')
    const add = ({ head, rows }) => rows.length > 0 && lines.push(table(head, rows))
    add(tables.caseTable(reports.flatMap(({ cases }) => cases)))
    add(tables.factTable(reports.flatMap(({ facts }) => facts)))
    for (const profile of reports.flatMap(({ profiles }) => profiles)) add(tables.profileTable(profile))
  }
  return `${lines.join('\n')}\n`
}
