import { figure as chartFigure, findings, page as wholePage, table } from '../report/page.js'
import { escapeXml } from '../report/plot.js'
import { claimsOf, type ClaimValue, NOT_DECIDED } from './claims.js'
import { EXPERIMENTS, missingData } from './experiments.js'
import type { ReportFolder, ReportRecord, Session } from './folder.js'
import { type Cell, figure, label, percent, type Section, signed, type Table } from './sections.js'
import { timesText, windowOf } from './settings.js'

/** The pages: everything on them comes from report.json, units/, times/ and sessions.json. */

/** Sections of what was run, and a line for each experiment that was not. */
export function sectionsOf(folder: ReportFolder): { sections: Section[]; notRun: { title: string; why: string }[] } {
  const sections: Section[] = []
  const notRun: { title: string; why: string }[] = []
  for (const experiment of EXPERIMENTS) {
    const why = missingData(experiment, folder.record.data)
    const section = why === undefined ? experiment.section(folder) : undefined
    if (section && hasResult(section)) sections.push(labelled(section, folder.record.kind))
    else notRun.push({ title: experiment.title, why: why ?? notMeasured(experiment.id, section!) })
  }
  return { sections, notRun }
}

const notMeasured = (id: string, { leftOut }: Section): string =>
  leftOut.length > 0 ? `left out: ${leftOut.join('; ')}` : `not run yet: --only ${id}`

/** Tables without data: mathematics and machines. */
const WITHOUT_DATA = /^(theorem|figure|cost)/

/** Every table of measurements on the miniature's data says so. */
function labelled(section: Section, kind: ReportRecord['kind']): Section {
  if (kind !== 'miniature') return section
  const own = (table: Table): Table =>
    isPublished(table) || WITHOUT_DATA.test(table.id)
      ? table
      : { ...table, caption: `${table.caption} (the miniature’s own data)` }
  return { ...section, tables: section.tables.map(own) }
}

/** Whether anything beside the published figures is there. */
const hasResult = ({ tables, charts }: Section): boolean =>
  charts.length > 0 || tables.some((one) => !isPublished(one) && one.rows.some((row) => row.slice(1).some(isMeasured)))

const isMeasured = ({ value, text, given }: Table['rows'][number][number]): boolean =>
  !given && typeof value === 'number' && text !== '' && !Number.isNaN(value)

export const claimText = (value: number, unit: ClaimValue['unit']): string =>
  unit === 'share' ? percent(value) : signed(value)

export const WORDS = ['holds', 'fails'] as const

/** The figures that a single report has of the claims; verdicts need intervals, and so more seeds. */
export function claimsTable(folder: ReportFolder): Table | undefined {
  const claims = claimsOf(folder)
  const known = claims.filter(({ value }) => value !== undefined)
  if (known.length === 0) return undefined
  const [names, factors] = [
    [...new Set(known.map(({ claim }) => claim))],
    [...new Set(claims.map(({ factor }) => factor))],
  ]
  const cellOf = (name: string, factor: number): Cell => {
    const claim = known.find((one) => one.claim === name && one.factor === factor)
    return figure(claim?.value, (value) => claimText(value, claim!.unit))
  }
  return {
    id: 'claims',
    caption:
      'The change of perplexity, or k_max as a share of the extended window. One seed decides nothing: ropewalk reproduce ' +
      '--combine holds the claims against intervals over two seeds or more.',
    head: ['claim', ...factors.map(timesText), 'verdict'],
    rows: names.map((name) => [label(name), ...factors.map((factor) => cellOf(name, factor)), label(NOT_DECIDED)]),
  }
}

export const CLAIMS_TITLE = 'The claims, in this run'

function claimsHtml(folder: ReportFolder): string {
  const claims = claimsTable(folder)
  return claims ? `<h2>${CLAIMS_TITLE}</h2>\n${plainTable(claims, true)}` : ''
}

const isPublished = ({ id }: Table): boolean => id.endsWith('-published')

const paragraph = (text: string, kind = ''): string => `<p${kind && ` class="${kind}"`}>${escapeXml(text)}</p>`

export const plainTable = ({ head, rows, caption }: Table, texts = false): string =>
  table({ head, rows: rows.map((row) => row.map(({ text }) => text)), caption, texts })

export function sectionHtml(section: Section): string {
  const { title, id, text, tables, charts, groups = [], findings: list, leftOut, notAsked = [] } = section
  return [
    `<section id="${escapeXml(id)}"><h2>${escapeXml(title)}</h2>`,
    ...text.map((line) => paragraph(line)),
    ...tables.filter((one) => !isPublished(one)).map((one) => plainTable(one)),
    ...(charts.length > 0 ? [chartFigure(charts)] : []),
    ...groups.flatMap((group) => [paragraph(group.name, 'soft'), chartFigure(group.charts)]),
    ...tables.filter(isPublished).map((one) => plainTable(one)),
    ...(list ? [findings(list, WORDS)] : []),
    ...leftOut.map((line) => paragraph(`Left out: ${line}.`, 'soft')),
    ...notAsked.map((line) => paragraph(`Not asked for: ${line}.`, 'soft')),
    '</section>',
  ].join('\n')
}

/** Settings as rows of name and value; of several reports with their seeds. */
export function settingsTable(folder: ReportFolder, seeds?: string): Table {
  const rows: Table['rows'] = []
  const add = (name: string, value: unknown): void => {
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
      for (const [key, inner] of Object.entries(value)) add(`${name}.${key}`, inner)
      return
    }
    const text = Array.isArray(value)
      ? value.map((item) => JSON.stringify(item)).join(', ')
      : value === null
        ? 'all'
        : String(value)
    rows.push([
      { value: name, text: name },
      { value: text, text },
    ])
  }
  const { settings, model, data } = folder.record
  add('model', { name: model.name, hash: model.hash.slice(0, 16), window: model.window, parameters: model.parameters })
  for (const [name, value] of Object.entries(settings)) {
    if (name === 'seed' && seeds !== undefined) add('seeds', seeds)
    else if (name !== 'extensions') add(name, value)
  }
  for (const { factor, ...rest } of settings.extensions) add(timesText(factor), rest)
  for (const [name, files] of Object.entries(data)) {
    const bytes = files.reduce((sum, file) => sum + file.bytes, 0)
    add(`data ${name}`, `${files.length} file${files.length === 1 ? '' : 's'}, ${bytes} bytes`)
  }
  return { id: 'settings', caption: 'All that decides the figures', head: ['setting', 'value'], rows }
}

/** What may differ between two runs of the same seed; the page keeps it between these marks. */
const TIMES = ['<!-- times -->', '<!-- /times -->'] as const

/** The page without what may differ between two runs of the same seed. */
export const withoutTimes = (html: string): string =>
  html.replaceAll(new RegExp(`${TIMES[0]}[\\s\\S]*?${TIMES[1]}`, 'g'), '')

function sessionLine({ date, version, node, machine, device }: Session): string {
  return `ropewalk ${version}, ${date}, Node ${node}, ${machine}, ${device}`
}

const seconds = (folder: ReportFolder): number =>
  [...folder.times.values()].reduce<number>((sum, time) => sum + ((time as { seconds?: number }).seconds ?? 0), 0)

const weights = (count: number): string =>
  count >= 1e9
    ? `${(count / 1e9).toFixed(2)} billion weights`
    : `${(count / 1e6).toFixed(count < 1e6 ? 2 : 1)} million weights`

/** The whole report as one self-contained page. */
export function reportPage(folder: ReportFolder): string {
  const { model, settings, kind } = folder.record
  const { sections, notRun } = sectionsOf(folder)
  const windows = settings.extensions.map(({ factor }) => windowOf(model.window, factor)).join(', ')
  const title = `${model.name}: Position Interpolation from ${model.window} to ${windows} tokens`
  const intro =
    kind === 'miniature'
      ? [
          `The evaluation of arXiv 2306.15595 in miniature: a LLaMA of ${weights(model.parameters)} that was ` +
            `trained at ${model.window} tokens, and data of the miniature’s own. “PG-19”, “Proof-pile”, “BoolQ” and the like ` +
            'name here which experiment of the paper a generated data set stands for, and the format that it is in; they are not ' +
            'those data. Settings were fixed before the seeds were run.',
        ]
      : [
          `The tables and figures of arXiv 2306.15595 for a LLaMA of ${weights(model.parameters)} with a window ` +
            `of ${model.window} tokens. Published figures stand below those of this run.`,
        ]
  const contents = sections.map(({ id, title: name }) => `<li><a href="#${escapeXml(id)}">${escapeXml(name)}</a></li>`)
  const times = [
    TIMES[0],
    ...folder.sessions.map((session) => paragraph(sessionLine(session), 'soft')),
    paragraph(`${Math.round(seconds(folder))} s of work in all, lanes added up.`, 'soft'),
    TIMES[1],
  ]
  const body = [
    `<h1>${escapeXml(title)}</h1>`,
    ...intro.map((line) => paragraph(line)),
    ...(settings.look ? [paragraph('This run is a look at everything with a few steps, and no measurement.')] : []),
    paragraph(`Seed ${settings.seed}. The figures are in report.json, units/ and csv/.`),
    claimsHtml(folder),
    `<h2>Contents</h2>\n<ul>${contents.join('')}</ul>`,
    ...sections.map((section) =>
      section.id === 'cost' ? `${TIMES[0]}${sectionHtml(section)}${TIMES[1]}` : sectionHtml(section),
    ),
    ...(notRun.length > 0
      ? [
          `<h2>Not run</h2>\n<ul>${notRun.map((line) => `<li>${escapeXml(`${line.title}: ${line.why}`)}</li>`).join('')}</ul>`,
        ]
      : []),
    `<h2>Settings</h2>`,
    plainTable(settingsTable(folder)),
    ...times,
  ]
  return wholePage({ title, body: body.join('\n') })
}
