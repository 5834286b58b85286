// The report: that it is complete, repeats itself byte for byte, goes on where it was stopped, says no to what does not fit,
// and that its page shows nothing but what the JSON has.
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import t from 'tap'
import { BASE } from '../../lib/demo/demo.js'
import { claimsOf, holds, studentInterval } from '../../lib/reproduce/claims.js'
import { combine } from '../../lib/reproduce/combine.js'
import { EXPERIMENTS, missingData } from '../../lib/reproduce/experiments.js'
import { ReportFolder } from '../../lib/reproduce/folder.js'
import { reproduceMiniature } from '../../lib/reproduce/mini/mini.js'
import { quickSettings } from '../../lib/reproduce/mini/settings.js'
import { claimsTable, claimText, reportPage, sectionsOf, withoutTimes } from '../../lib/reproduce/page.js'
import { PUBLISHED } from '../../lib/reproduce/published.js'
import { reproduce } from '../../lib/reproduce/run.js'
import { csvOf } from '../../lib/reproduce/sections.js'
import { doublings, paperSettings, type Settings } from '../../lib/reproduce/settings.js'
import { ropewalk } from '../cli/command.js'

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-reproduce-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))
const at = (name: string): string => join(dir, name)

/** Everything that there is, as small as it gets. */
const tiny = (seed: number): Settings => {
  const settings = quickSettings(256, seed)
  return {
    ...settings,
    extensions: [{ factor: 2, steps: 4, batchSize: 1, accumulate: 1 }],
    ...{ direct: [2], compared: 2, comparedTuned: ['yarn'], stride: 255, documents: 2, points: 2 },
    passkey: { distances: 2, trials: 1 },
    needle: { depths: 2, trials: 1 },
    choiceItems: 2,
    summaries: { ...settings.summaries, factor: 2, articleTokens: 256, summaryTokens: 32, train: 2, test: 1 },
    costSteps: 1,
  }
}
/** RULER's prompts are long, and there are eleven of them a model. */
const most = EXPERIMENTS.map(({ id }) => id).filter((id) => id !== 'ruler')
const mini = (out: string, more: object = {}) =>
  reproduceMiniature({ seed: 5, settings: tiny(5), only: most, out: at(out), ...more })

/** All files below a folder by name, those that may differ left out. */
function filesOf(folder: string): Record<string, string> {
  const files: Record<string, string> = {}
  for (const entry of readdirSync(folder, { recursive: true, withFileTypes: true })) {
    const name = relative(folder, join(entry.parentPath, entry.name))
    if (!entry.isFile() || /^(times|models|data|sessions)/.test(name) || name === 'csv/cost.csv') continue
    const text = readFileSync(join(folder, name), 'utf8')
    files[name] = name === 'index.html' ? withoutTimes(text) : text
  }
  return files
}

let first: Awaited<ReturnType<typeof mini>>

t.test('a report is complete', async (t) => {
  const seen: number[] = []
  first = await mini('first', { onProgress: (done: number) => seen.push(done) })
  t.strictSame(
    seen,
    [...seen].sort((a, b) => a - b),
    'progress only grows',
  )
  t.equal(seen.at(-1), 1, 'and ends at 1')
  t.strictSame(
    first.sections.map(({ id }) => id),
    most,
  )
  t.strictSame(
    first.notRun.map(({ why }) => why),
    ['not run yet: --only ruler'],
  )
  for (const { id, tables } of first.sections) {
    for (const { rows, head, id: name } of tables) {
      t.ok(rows.length > 0 && rows.every((row) => row.length === head.length), `${id}: ${name} has whole rows`)
      // a dash stands for what was to be measured and was not
      if (!name.endsWith('-published'))
        t.notOk(
          rows.some((row) => row.some(({ text }) => text === '–')),
          `${name} has no gaps`,
        )
    }
  }
  t.notOk(
    readdirSync(at('first/models')).some((name) => name.includes('checkpoints')),
    'only models are left',
  )
})

t.test('the same seed gives the same bytes, times aside; another seed does not', async (t) => {
  await mini('again')
  const [a, b] = [filesOf(at('first')), filesOf(at('again'))]
  t.strictSame(Object.keys(a), Object.keys(b))
  for (const name of Object.keys(a)) t.equal(a[name], b[name], name)
  const only = ['table-4']
  const other = await reproduceMiniature({ seed: 6, settings: tiny(6), only, out: at('other') })
  const curve = ({ folder }: typeof other) => folder.get<{ curve: object[] }>('train/pi-2')!.curve
  t.equal(curve(other).length, curve(first).length)
  t.notSame(curve(other), curve(first), 'texts and losses are others')
})

t.test('an aborted run goes on to the same report, wherever it was', async (t) => {
  const marks = [/fine-tuning PI/, /fine-tuning .*step 3/, /perplexity/, /passkey/, /summaries/, /cost/]
  for (const mark of marks) {
    const controller = new AbortController()
    const onProgress = (_: number, task: string) => mark.test(task) && controller.abort()
    await t.rejects(mini('stopped', { signal: controller.signal, onProgress }), { name: 'AbortError' }, String(mark))
    t.ok(readFileSync(at('stopped/index.html'), 'utf8').includes('</html>'), 'with a page of what there is')
  }
  const { folder } = await mini('stopped')
  t.equal(folder.sessions.length, marks.length + 1)
  const [a, b] = [filesOf(at('first')), filesOf(at('stopped'))]
  t.strictSame(Object.keys(a), Object.keys(b))
  for (const name of Object.keys(a)) t.equal(a[name], b[name], name)
})

t.test('a finished report is not computed again', async (t) => {
  const { folder } = await mini('first')
  t.equal(folder.sessions.length, 1, 'nothing was left to do')
})

t.test('the page and the CSV files say what the JSON says', async (t) => {
  const folder = await ReportFolder.read(at('first'))
  const html = readFileSync(at('first/index.html'), 'utf8')
  t.equal(reportPage(folder), html, 'the page follows from the files')
  t.notMatch(html, /<script|<link|<img|@import|src=|NaN|undefined|Infinity/)
  const shown = [...html.matchAll(/<table>[\s\S]*?<\/table>/g)].map(([table]) =>
    [...table.matchAll(/<tr>(.*?)<\/tr>/g)].map(([, row]) =>
      [...row!.matchAll(/<t[hd]>(.*?)<\/t[hd]>/g)].map(([, text]) =>
        text!.replaceAll('<wbr/>', '').replace(/&#(\d+);/g, (_, code: string) => String.fromCodePoint(Number(code))),
      ),
    ),
  )
  const { sections } = sectionsOf(folder)
  const tables = sections.flatMap((section) => section.tables)
  for (const [n, table] of tables.entries()) {
    t.strictSame(shown[n], [table.head, ...table.rows.map((row) => row.map(({ text }) => text))], table.id)
    t.equal(readFileSync(at(`first/csv/${table.id}.csv`), 'utf8'), csvOf(table))
  }
  // Of the claims one seed has figures, and no verdict.
  const table = claimsTable(folder)!
  t.equal(readFileSync(at('first/csv/claims.csv'), 'utf8'), csvOf(table))
  const [, claims] = /<table class="texts">([\s\S]*?)<\/table>/.exec(html)!
  t.match(claims, /One seed decides nothing/)
  t.notMatch(claims, /holds<|fails<|, holds|, fails/)
  t.equal(table.rows.length, claimsOf(folder).length)
  for (const [n, { claim, value, unit }] of claimsOf(folder).entries()) {
    t.strictSame(
      table.rows[n]!.map((cell) => cell.value),
      [claim, value, 'one seed: not decided'],
    )
    const row = `<td>${claim}</td><td>${claimText(value!, unit)}</td><td>one seed: not decided</td>`
    t.ok(claims!.replaceAll('<wbr/>', '').includes(row), claim)
  }
  const [beyond, within] = [true, false].map((outside) =>
    Math.max(
      ...folder
        .get<any>('attention/base/512')
        .ranges.filter(({ from }: { from: number }) => from >= 256 === outside)
        .map(({ max }: { max: number }) => Math.abs(max)),
    ),
  )
  const finding = sections.find(({ id }) => id === 'score-maxima')!.findings![0]!
  t.match(finding, { seen: beyond! > within!, figures: `${(beyond! / within!).toFixed(2)} at 512` })
  const charts = (id: string): number => {
    const [section] = new RegExp(`<section id="${id}">[\\s\\S]*?</section>`).exec(html)!
    return section.split('<svg').length - 1
  }
  const counts = { 'table-1': 2, 'table-3': 1, 'table-4': 4, 'theorem-2.1': 6, 'figure-2': 6, 'figure-5': 4 }
  const more = { resolution: 2, 'score-maxima': 1, needle: 3, position: 1 }
  for (const [id, count] of Object.entries({ ...counts, ...more })) t.equal(charts(id), count, `${id}: charts`)
  // a number changed in a unit changes the page
  const key = 'units/perplexity/pg19/pi-2@4/512.json'
  cpSync(at('first'), at('changed'), { recursive: true })
  const unit = JSON.parse(readFileSync(at(`changed/${key}`), 'utf8'))
  writeFileSync(at(`changed/${key}`), JSON.stringify({ ...unit, perplexity: 123.456 }))
  const changed = await ReportFolder.read(at('changed'))
  t.match(reportPage(changed), /<td>123\.46<\/td>/)
  const value = unit.perplexity.toFixed(2)
  t.ok(
    tables[0]!.rows.some((row) => row.some(({ text }) => text === value)),
    'the unit stands in table 1',
  )
})

t.test('claims are computed, and over several seeds have an interval', async (t) => {
  const folder = await ReportFolder.read(at('first'))
  const claims = claimsOf(folder)
  t.equal(claims.length, 5, 'of one factor')
  const near = folder.get<any>('perplexity/pg19/pi-2@4/256').perplexity
  const far = folder.get<any>('perplexity/pg19/pi-2@4/512').perplexity
  t.equal(claims.find(({ id }) => id === 'longer-pg19')!.value, far / near - 1)
  t.strictSame(studentInterval([1, 2, 3]).mean, 2)
  const [low, high] = studentInterval([1, 2, 3]).interval!
  t.ok(Math.abs(low - (2 - 4.3027 / Math.sqrt(3))) < 1e-12 && Math.abs(low + high - 4) < 1e-12)
  const below = { side: 'below', at: 0 } as const
  t.throws(() => studentInterval([1]), {
    name: 'RangeError',
    message: /an interval needs two or more, but there are 1/,
  })
  t.equal(holds(below, [-2, 0.1]), false, 'the whole interval has to be there')
  t.equal(holds(below, [-2, -0.1]), true)
  t.equal(holds({ side: 'at least', at: 1 }, [1, 1]), true)
  t.equal(holds({ side: 'at most', at: 0.05 }, [0.03, 0.06]), false)

  // a second report with other numbers, and another seed
  cpSync(at('first'), at('second'), { recursive: true })
  const record = JSON.parse(readFileSync(at('second/report.json'), 'utf8'))
  await t.rejects(combine([at('first'), at('second')], at('combined')), { message: /has the seed of/ })
  record.settings.seed = 6
  writeFileSync(at('second/report.json'), JSON.stringify(record))
  const combined = await combine([at('first'), at('second')], at('combined'))
  t.equal(combined.length, 5)
  t.strictSame(combined[0]!.values, [far / near - 1, far / near - 1])
  const html = readFileSync(at('combined/index.html'), 'utf8')
  t.match(html, /seeds 5, 6/)
  t.match(html, /<b>(holds|fails)<\/b>/, 'with verdicts')
  t.notMatch(html, /one seed/)
  for (const { bound, interval, holds: verdict } of combined) t.equal(verdict, holds(bound, interval))
  await combine([at('first'), at('second')], at('combined'))
  await t.rejects(combine([at('first'), at('second')], at('first')), { code: 'ERR_EXISTS' })
  for (const few of [[], [at('first')]]) {
    await t.rejects(combine(few, at('few')), { name: 'RangeError', message: /two seeds or more, but paths has [01]/ })
  }
  t.notOk(existsSync(at('few')), 'and nothing is written')
  record.settings.points = 3
  writeFileSync(at('second/report.json'), JSON.stringify(record))
  await t.rejects(combine([at('first'), at('second')], at('combined')), {
    message: /of another model or other settings/,
  })
  await t.rejects(combine([at('first'), at('nothing')], at('combined')), { code: 'ERR_NOT_FOUND' })
})

t.test('a folder of another run, or of something else, is refused with what differs', async (t) => {
  await t.rejects(reproduceMiniature({ seed: 6, settings: tiny(6), only: most, out: at('first') }), {
    code: 'ERR_EXISTS',
    message: /settings\.seed is 6 now, but was 5.*--out.*--force/s,
  })
  await t.rejects(mini('.'), { code: 'ERR_EXISTS', message: /holds no report\.json/ })
  const { folder } = await reproduceMiniature({
    seed: 7,
    settings: tiny(7),
    only: ['figure-5'],
    out: at('other'),
    force: true,
  })
  t.equal(folder.record.settings.seed, 7)
  t.strictSame(folder.keys(), ['theory/model', 'theory/paper'])
})

t.test('a user’s model: what has no data is named, not run', async (t) => {
  const settings = { ...paperSettings(256, [512], 2), dtype: 'float32' as const }
  const { sections, notRun } = await reproduce({
    kind: 'paper',
    base: BASE,
    out: at('paper'),
    settings,
    only: ['figure-2'],
  })
  t.strictSame(
    sections.map(({ id }) => id),
    ['theorem-2.1', 'figure-2', 'figure-5'],
  )
  t.equal(
    notRun.find(({ title }) => title.startsWith('Table 1'))!.why,
    'not run: needs --data train=<path> and --data pg19=<path>',
  )
  t.match(
    readFileSync(at('paper/index.html'), 'utf8'),
    /needs --data gov-report-train=&lt;path&gt;|gov-report-train=&#60;path&#62;/,
  )
  const other = { kind: 'paper', base: BASE, out: at('none'), settings } as const
  await t.rejects(reproduce({ ...other, data: { pg18: ['x'] } }), { message: /did you mean "pg19"/ })
  await t.rejects(reproduce({ ...other, data: { pg19: [at('missing')] } }), { code: 'ERR_NOT_FOUND' })
  await t.rejects(reproduce({ ...other, only: ['table-7'] }), { message: /no experiment "table-7"; did you mean/ })
  t.equal(
    missingData(
      EXPERIMENTS.find(({ id }) => id === 'table-4')!,
      { 'train-2': [] },
    ),
    undefined,
  )
  t.throws(() => paperSettings(256, [256]), /context 256 is not larger/)
  t.strictSame(doublings(256, 1000), [256, 512, 1000])
})

t.test('published figures, spot-checked', async (t) => {
  const cellOf = (id: string, row: string, column: string) => {
    const { head, rows } = PUBLISHED[id]!
    return rows.find(([name]) => name === row)![head.indexOf(column)]
  }
  t.equal(cellOf('table-1', '7B 8192, FT', '8192'), 7.69)
  t.equal(cellOf('table-1', '7B 32768, PI', '32768'), 6.77)
  t.equal(cellOf('table-1', '13B 32768, PI', '16384'), 6.18)
  t.equal(cellOf('table-2', '7B 32768, PI', '32768'), 2.48)
  t.equal(cellOf('table-3', '16384', '0'), 112.13)
  t.equal(cellOf('table-4', '7B 32768, PI', '600'), 18432)
  t.equal(cellOf('table-4', '7B 8192, FT', '10000'), 2560)
  t.equal(cellOf('table-5', '7B 32768, Pile', 'BoolQ'), 64.7)
  t.equal(cellOf('table-6', 'LLaMA 7B, PI', 'ROUGE-1'), 60)
  for (const { head, rows } of Object.values(PUBLISHED)) t.ok(rows.every((row) => row.length === head.length))
})

t.test('the command', async (t) => {
  const command = (...args: string[]) => ropewalk('reproduce', ...args)
  const { code, stdout } = await command(
    BASE,
    '--contexts',
    '512',
    '--only',
    'figure-5',
    '--out',
    at('command'),
    '--json',
  )
  t.equal(code, 0)
  const shown = await command('--page', '--out', at('first'))
  t.match(shown.stdout, /The claims, in this run\n.*One seed decides nothing.*\n[\s\S]*one seed: not decided/)
  const { claims } = JSON.parse((await command('--page', '--out', at('first'), '--json')).stdout)
  t.strictSame(claims, JSON.parse(JSON.stringify(claimsTable(await ReportFolder.read(at('first'))))))
  t.strictSame(
    JSON.parse(stdout).sections.map(({ id }: { id: string }) => id),
    ['theorem-2.1', 'figure-2', 'figure-5'],
    'all that its figures are enough for',
  )
  for (const [args, message] of [
    [[], /give either a model.s folder or --mini/],
    [[BASE, '--mini'], /give either/],
    [['--mini', '--steps', '3'], /--steps does not go with --mini/],
    [[BASE, '--data', 'pg19'], /--data pg19: give name=path/],
    [[BASE, '--tune', 'pi', '--contexts', '512'], /--tune pi: it must be ntk/],
    [[BASE, '--quick'], /--quick goes with --mini only/],
    [['--combine', at('first'), '--mini'], /--combine takes finished reports/],
    [['--combine', at('first')], /--combine .*first: intervals need the reports of two seeds or more/],
  ] as const) {
    const { code, stderr } = await command(...args)
    t.equal(code, 2, args.join(' '))
    t.match(stderr, message)
  }
})
