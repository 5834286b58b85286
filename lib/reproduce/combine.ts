import { mkdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { RopewalkError } from '../errors.js'
import { isTaken, writeFileDurable } from '../files/durable.js'
import { findings, page } from '../report/page.js'
import { escapeXml } from '../report/plot.js'
import { type ClaimValue, claimsOf, holds, studentInterval } from './claims.js'
import { ReportFolder } from './folder.js'
import { claimText, plainTable, sectionsOf, settingsTable, WORDS } from './page.js'
import { requireAlike } from './run.js'
import { type Cell, csvOf, type Table } from './sections.js'
import { timesText, windowOf } from './settings.js'

export const TOO_FEW = 'intervals need the reports of two seeds or more'

/** A claim over several reports. */
export interface CombinedClaim {
  id: string
  claim: string
  factor: number
  holds: boolean
  /** Of the reports, in their order. */
  values: number[]
  mean: number
  /** 95 %, by Student's t over the reports. */
  interval: [number, number]
  bound: ClaimValue['bound']
  figures: string
}

/**
 * Holds the claims against two or more finished reports that differ in their seed alone, and writes a page with means and
 * intervals over them. Throws RangeError for fewer, RopewalkError ERR_NOT_FOUND, ERR_FORMAT where the reports are not
 * alike, ERR_EXISTS where `out` holds something else.
 */
export async function combine(paths: readonly string[], out: string): Promise<CombinedClaim[]> {
  if (paths.length < 2) throw new RangeError(`${TOO_FEW}, but paths has ${paths.length}`)
  const folders = await Promise.all(paths.map((path) => ReportFolder.read(path)))
  requireAlike(folders)
  const ours = await readFile(join(out, 'combined.json')).then(
    () => true,
    () => false,
  )
  if (!ours && (await isTaken(out))) {
    throw new RopewalkError('ERR_EXISTS', `${out}: holds something else: choose another folder with --out`)
  }
  const claims = combinedClaims(folders)
  const tables = combinedTables(folders)
  await mkdir(join(out, 'csv'), { recursive: true })
  const seeds = folders.map(({ record }) => record.settings.seed)
  const { settings, ...record } = folders[0]!.record
  const json = { seeds, model: record.model, settings: { ...settings, seed: seeds }, claims }
  await writeFileDurable(join(out, 'combined.json'), `${JSON.stringify(json, null, 2)}\n`)
  for (const table of tables) await writeFileDurable(join(out, 'csv', `${table.id}.csv`), csvOf(table))
  await writeFileDurable(join(out, 'index.html'), combinedPage(folders, claims, tables))
  return claims
}

function combinedClaims(folders: readonly ReportFolder[]): CombinedClaim[] {
  const lists = folders.map(claimsOf)
  return lists[0]!.flatMap((claim, n) => {
    const values = lists.map((list) => list[n]!.value)
    const known = values.filter((value) => value !== undefined)
    if (known.length < values.length) return []
    const { mean, interval } = studentInterval(known)
    const { id, factor, bound, unit } = claim
    const [each, ends] = [known, interval].map((list) => list.map((value) => claimText(value, unit)))
    const figures = `${each!.join(', ')}; mean ${claimText(mean, unit)}, 95 % interval ${ends!.join(' to ')}`
    const verdict = { holds: holds(bound, interval), values: known, mean, interval, bound, figures }
    return { id, claim: claim.claim, factor, ...verdict }
  })
}

/** The tables of the reports with the mean of each figure, and in the CSV its interval. */
function combinedTables(folders: readonly ReportFolder[]): Table[] {
  const all = folders.map((folder) => sectionsOf(folder).sections.flatMap(({ tables }) => tables))
  return all[0]!
    .filter(({ id }) => !id.endsWith('-published') && !id.endsWith('-intervals') && id !== 'cost')
    .map((table) => {
      const same = all.map((tables) => tables.find(({ id }) => id === table.id))
      const rows = table.rows.map((row, r) =>
        row.map((first, c) =>
          combinedCell(
            first,
            same.map((other) => other?.rows[r]?.[c]),
          ),
        ),
      )
      return { ...table, rows }
    })
}

/** Mean and half of its 95 % interval, with as many decimals as the single figures have. */
function combinedCell(first: Cell, cells: readonly (Cell | undefined)[]): Cell {
  const values = cells.map((other) => other?.value)
  if (values.every((value) => value === first.value)) return first
  if (!values.every((value) => typeof value === 'number' && Number.isFinite(value))) return { value: null, text: '–' }
  const { mean, interval } = studentInterval(values as number[])
  const share = first.text.endsWith('%')
  const decimals = /\.(\d+)/.exec(first.text)?.[1]?.length ?? 0
  const scale = share ? 100 : 1
  const text = (value: number): string => (scale * value).toFixed(decimals)
  const margin = text(interval[1] - mean)
  return { value: [mean, ...interval].join(' '), text: `${text(mean)} ± ${margin}${share ? ' %' : ''}` }
}

function combinedPage(
  folders: readonly ReportFolder[],
  claims: readonly CombinedClaim[],
  tables: readonly Table[],
): string {
  const { model, settings } = folders[0]!.record
  const seeds = folders.map(({ record }) => record.settings.seed).join(', ')
  const title = `${model.name}: Position Interpolation, seeds ${seeds}`
  const factors = settings.extensions.map(({ factor }) => factor)
  const body = [
    `<h1>${escapeXml(title)}</h1>`,
    `<p>${folders.length} reports of the same model and settings. Intervals are Student's at 95 %, over the reports; a claim ` +
      'holds where the whole interval is on its side of the bound.</p>',
    ...factors.map((factor) => {
      const list = claims
        .filter((claim) => claim.factor === factor)
        .map(({ claim, holds: seen, figures }) => ({ claim, seen, figures }))
      return `<h2>${timesText(factor)}: ${model.window} to ${windowOf(model.window, factor)} tokens</h2>\n${findings(list, WORDS)}`
    }),
    '<h2>Means over the reports</h2>',
    ...tables.map((table) => plainTable(table)),
    '<h2>Settings</h2>',
    plainTable(settingsTable(folders[0]!, seeds)),
  ]
  return page({ title, body: body.join('\n') })
}
