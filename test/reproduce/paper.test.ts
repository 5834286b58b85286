// `ropewalk reproduce <model>`: the whole command on a model's folder and files in the published formats, with fine-tuning.
import { execFileSync, spawn } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs'
import { writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { Llama, perplexity, readTokenDocuments, Trainer } from '../../lib/index.js'
import { EXPERIMENTS } from '../../lib/reproduce/experiments.js'
import { withoutTimes } from '../../lib/reproduce/page.js'
import { fixtures } from '../golden.js'
import { type Result, ropewalk } from '../cli/command.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const dir = mkdtempSync(join(tmpdir(), 'ropewalk-paper-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))
const at = (...names: string[]): string => join(dir, ...names)
// Tokenised data are cached; nothing of a test may stay in the user's cache.
process.env.XDG_CACHE_HOME = at('cache')

function write(name: string, content: string | Uint8Array): string {
  mkdirSync(dirname(at(name)), { recursive: true })
  writeFileSync(at(name), content)
  return at(name)
}

/** A golden checkpoint whose config has this window: random weights, so that nothing is read out of its figures. */
function makeModel(name: string, window: number): string {
  cpSync(join(fixtures, 'mha-f32'), at(name), { recursive: true })
  const config = JSON.parse(readFileSync(at(name, 'config.json'), 'utf8'))
  write(`${name}/config.json`, JSON.stringify({ ...config, max_position_embeddings: window }))
  return at(name)
}

let state = 1
const random = (n: number): number => (state = (state * 1103515245 + 12345) % 2147483648) % n
const WORDS = 'the ship sailed under a grey sky and nobody on board knew where its wind would take them'.split(' ')
const text = (words: number): string => Array.from({ length: words }, () => WORDS[random(WORDS.length)]).join(' ')
const texts = (count: number, words: number): string[] => Array.from({ length: count }, () => text(words))
const lines = (rows: readonly object[]): string => rows.map((row) => `${JSON.stringify(row)}\n`).join('')
const articles = (count: number): string =>
  lines(Array.from({ length: count }, (_, i) => ({ id: `GAO-${i}`, report: text(60 + 90 * i), summary: text(12) })))

/** hyparquet-writer's file; in a process of its own, as the loader of the tests cannot resolve that package. */
function parquet(rows: readonly string[]): Uint8Array {
  const script = `import { parquetWriteBuffer } from 'hyparquet-writer'
    import { readFileSync } from 'node:fs'
    const data = JSON.parse(readFileSync(0, 'utf8'))
    process.stdout.write(new Uint8Array(parquetWriteBuffer({ columnData: [{ name: 'text', data, type: 'STRING' }] })))`
  return execFileSync(process.execPath, ['--input-type=module', '--eval', script], {
    input: JSON.stringify(rows),
    cwd: root,
    env: { ...process.env, NODE_OPTIONS: '' },
  })
}

/** Every data set in its published format; the questions are those of fixtures/choice.json. */
function makeData(): Record<string, string> {
  const tasks = JSON.parse(readFileSync(join(fixtures, 'choice.json'), 'utf8')).tasks
  const file = (task: string, name: string, as = `${task}/${name}`): string => write(as, tasks[task].files[name])
  for (const name of Object.keys(tasks['race-h'].files)) {
    file('race-h', name, `RACE/test/${name}`)
    file('race-h', name, `RACE/test/${name.replace('high', 'middle')}`)
  }
  texts(2, 240).forEach((content, n) => write(`pg19/${10 * n + 7}.txt`, content))
  return {
    train: write('pile/00.parquet', parquet(texts(12, 400))),
    pg19: at('pg19'),
    'proof-pile': write('proof-pile/test.jsonl', lines(texts(3, 240).map((content) => ({ text: content, meta: {} })))),
    boolq: file('boolq', 'dev.jsonl'),
    piqa: `${file('piqa', 'valid.jsonl')},${file('piqa', 'valid-labels.lst')}`,
    'race-m': at('RACE/test'),
    'race-h': at('RACE/test'),
    winogrande: file('winogrande', 'dev.jsonl'),
    'gov-report': write('gov/test.jsonl', articles(2)),
    'gov-report-train': write('gov/train.jsonl', articles(3)),
  }
}

const model = makeModel('model', 400)
const data = makeData()
const given = (sets: Record<string, string>): string[] => [
  '--data',
  ...Object.entries(sets).map(([name, path]) => `${name}=${path}`),
]
/** One factor that is no whole number, and one that is. */
const small =
  '--contexts 600,800 --tune yarn --steps 2 --accumulate 1 --documents 2 --distances 2 --trials 1 --device cpu ' +
  '--article-tokens 300 --summary-tokens 40 --epochs 1'
const settings = small.split(' ')
const whole = (out: string): string[] => ['reproduce', model, ...settings, '--out', at(out), ...given(data)]

interface Ended extends Omit<Result, 'code'> {
  code: number | null
}

/** The compiled command in a process of its own, which gets a signal when its progress says `mark`. */
function killed(args: string[], mark: RegExp, signal: NodeJS.Signals): Promise<Ended> {
  const child = spawn(process.execPath, [join(root, 'dist/cli/main.js'), ...args])
  const result = { stdout: '', stderr: '' }
  let sent = false
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (part: string) => {
      result[name] += part
      if (!sent && mark.test(result.stderr)) sent = child.kill(signal)
    })
  }
  return new Promise((resolve) => child.on('close', (code) => resolve({ code, ...result })))
}

/** All files below a folder by name; those that may differ between two runs are left out, or without what may. */
function filesOf(folder: string): Record<string, string> {
  const files: Record<string, string> = {}
  for (const entry of readdirSync(folder, { recursive: true, withFileTypes: true })) {
    const name = relative(folder, join(entry.parentPath, entry.name))
    if (!entry.isFile() || /^(times|sessions)/.test(name) || name === 'csv/cost.csv') continue
    const content = readFileSync(join(folder, name), 'latin1')
    files[name] = name === 'index.html' ? withoutTimes(content) : content
  }
  return files
}

function sameFiles(t: Test, one: string, other: string): void {
  const [a, b] = [filesOf(at(one)), filesOf(at(other))]
  t.strictSame(Object.keys(a), Object.keys(b))
  t.strictSame(
    Object.keys(a).filter((name) => a[name] !== b[name]),
    [],
    'no file differs',
  )
}

const unitOf = (out: string, key: string): any => JSON.parse(readFileSync(at(out, 'units', `${key}.json`), 'utf8'))

t.test('every table and figure, from files in the published formats', async (t) => {
  const { code, stdout, stderr } = await ropewalk(...whole('report'), '--json')
  t.equal(code, 0, stderr)
  const { sections, notRun } = JSON.parse(stdout)
  t.strictSame(notRun, [])
  t.strictSame(
    sections.map(({ id }: { id: string }) => id),
    EXPERIMENTS.map(({ id }) => id),
  )
  for (const { tables, leftOut, id } of sections) {
    for (const { rows, head, id: name } of tables) {
      t.ok(rows.length > 0 && rows.every((row: unknown[]) => row.length === head.length), `${name} has whole rows`)
      const gaps = rows.some((row: { text: string }[]) => row.some((cell) => cell.text === '–'))
      if (!name.endsWith('-published')) t.equal(gaps, leftOut.length > 0, `${name}: no gap without its reason`)
    }
    if (id !== 'ruler') t.strictSame(leftOut, [], id)
  }
  const html = readFileSync(at('report/index.html'), 'utf8')
  t.match(html, /<td>800, PI<\/td>/)
  t.match(html, /0\.04 million weights/)
  t.notMatch(html, /<script|<link|<img|NaN|undefined|Infinity|\/tmp\//)
  t.strictSame(
    readdirSync(at('report/models')).filter((name) => name.includes('checkpoint')),
    [],
    'checkpoints are gone, models are left',
  )
})

t.test('its figures are those of the evaluations', async (t) => {
  using base = await Llama.load(model, { device: 'cpu' })
  const documents = await readTokenDocuments(base, [at('pg19')])
  const [result] = await perplexity(base, documents, { windows: [600], stride: 256 })
  t.strictSame(unitOf('report', 'perplexity/pg19/base/600'), JSON.parse(JSON.stringify(result)))
  using tuned = await Llama.load(at('report/models/pi-1.5@2'), { device: 'cpu' })
  t.equal(tuned.contextWindow, 600)
  const [after] = await perplexity(tuned, documents, { windows: [400], stride: 256 })
  t.strictSame(unitOf('report', 'perplexity/pg19/pi-1.5@2/400'), JSON.parse(JSON.stringify(after)))
  // the same items as the readers' own tests have, and PIQA's labels from their file
  t.match(unitOf('report', 'choice/piqa/base'), { items: 3, records: [{ source: 'valid.jsonl:1' }, {}, {}] })
  t.match(unitOf('report', 'choice/race-m/base'), { items: 3, records: [{ source: '1.txt' }, {}, {}] })
  const { articles: count, cut, records } = unitOf('report', 'summaries/summary')
  t.strictSame({ count, cut }, { count: 2, cut: 1 }, 'the second article is longer than 300 tokens')
  t.ok(records.every(({ tokens }: { tokens: number }) => tokens <= 40))
  // one epoch of three articles, one a step
  t.equal(unitOf('report', 'train/summary-2').steps, 3)
  t.equal(unitOf('report', 'train/pi-1.5').tokens, 2 * 600)
})

t.test('models of Table 3 are the trainer’s own checkpoints', async (t) => {
  using base = await Llama.load(model, { device: 'cpu', rope: { type: 'linear', factor: 1.5 } })
  using trainer = new Trainer(base, {
    ...{
      data: [data.train!],
      output: at('by-hand'),
      context: 600,
      steps: 2,
      saveEvery: 1,
      batchSize: 1,
      accumulate: 1,
    },
    ...{ learningRate: 2e-5, warmupSteps: 2, schedule: 'constant', maxGradNorm: 0, seed: 0, memory: 'auto' },
  })
  for await (const _ of trainer.run());
  const checkpoints = readdirSync(at('by-hand')).filter((name) => existsSync(at('by-hand', name, 'config.json')))
  t.equal(checkpoints.length, 2)
  for (const [n, name] of checkpoints.sort().entries()) {
    using saved = await Llama.load(at('by-hand', name), { device: 'cpu' })
    await saved.save(at(`by-hand-${n}`))
    const [one, other] = [at(`by-hand-${n}`), at(`report/models/pi-1.5@${n + 1}`)]
    const bytes = (path: string) => readFileSync(join(path, 'model.safetensors'))
    t.ok(bytes(one).equals(bytes(other)), `after ${n + 1} steps`)
  }
  const kept = [0, 1, 2].map((step) => unitOf('report', `perplexity/pg19/pi-1.5@${step}/600`).perplexity)
  t.equal(new Set(kept).size, 3, 'each has a perplexity of its own')
})

t.test('killed, interrupted and gone on with, it is the same report', async (t) => {
  const dead = await killed(whole('stopped'), /\/100/, 'SIGKILL')
  t.equal(dead.code, null, dead.stderr)
  const stopped = await killed([...whole('stopped'), '--json'], /\/100/, 'SIGINT')
  t.equal(stopped.code, 130, stopped.stderr)
  const { event, resume } = JSON.parse(stopped.stdout)
  t.equal(event, 'interrupted')
  t.match(readFileSync(at('stopped/index.html'), 'utf8'), /not run yet: --only/, 'with a page of what there is')
  const { code, stderr } = await ropewalk(...resume.split(' ').slice(1))
  t.equal(code, 0, stderr)
  t.equal(JSON.parse(readFileSync(at('stopped/sessions.json'), 'utf8')).length, 3)
  sameFiles(t, 'report', 'stopped')
})

t.test('parts of it: --only', async (t) => {
  const only = ['--only', 'table-4,figure-5']
  const { code, stdout, stderr } = await ropewalk(...whole('part'), ...only, '--json')
  t.equal(code, 0, stderr)
  const ids = JSON.parse(stdout).sections.map(({ id }: { id: string }) => id)
  t.ok(ids.includes('table-4') && ids.includes('figure-5'), ids.join())
  for (const id of ['table-1', 'table-3', 'table-5', 'ruler', 'cost'])
    t.notOk(ids.includes(id), `${id} was not measured`)
  for (const name of ['passkey/pi-1.5@2/600', 'theory/model'])
    t.strictSame(unitOf('part', name), unitOf('report', name))
  t.notOk(existsSync(at('part/units/perplexity')))
})

t.test('the page is made again from the JSON, without model and data', async (t) => {
  const before = filesOf(at('report'))
  rmSync(at('report/index.html'))
  rmSync(at('report/csv'), { recursive: true })
  renameSync(model, at('elsewhere'))
  const { code, stdout, stderr } = await ropewalk('reproduce', '--page', '--out', at('report'))
  renameSync(at('elsewhere'), model)
  t.equal(code, 0, stderr)
  t.match(stdout, /Table 1: perplexity by context window/)
  t.strictSame(filesOf(at('report')), before)
  t.match((await ropewalk('reproduce', model, '--page')).stderr, /--page takes what is in --out/)
  t.match((await ropewalk('reproduce', '--page', '--out', at('pg19'))).stderr, /there is no report\.json/)
})

t.test('nothing is overwritten without asking', async (t) => {
  const before = filesOf(at('report'))
  const other = await ropewalk(...whole('report'), '--seed', '1')
  t.equal(other.code, 1)
  t.match(other.stderr, /report: holds the report of another run: settings\.seed is 1 now, but was 0\..*--force/)
  write('pg19/9.txt', text(900))
  const more = await ropewalk(...whole('report'))
  rmSync(at('pg19/9.txt'))
  t.match(more.stderr, /another run: data\.pg19/)
  t.strictSame(filesOf(at('report')), before)
  // a folder that is no report keeps its files, whatever is asked
  write('project/models/mine', 'precious')
  for (const force of [[], ['--force']]) {
    const { code, stderr } = await ropewalk(...whole('project'), ...force)
    t.equal(code, 1)
    t.match(stderr, /project: is there already and holds no report\.json/)
  }
  write('project/report.json', '{"made by": "something else"}')
  t.match((await ropewalk(...whole('project'), '--force')).stderr, /report\.json: is not the record of a report/)
  t.strictSame(Object.keys(filesOf(at('project'))).sort(), ['models/mine', 'report.json'])
})

t.test('a file that cannot be read is named, before anything is written', async (t) => {
  const cases: [set: string, path: string, content: string | Uint8Array, message: RegExp][] = [
    ['boolq', 'b.jsonl', lines([{ passage: 'a', question: 'b', answer: 2 }]), /b\.jsonl:1: "answer" is 2, but it must/],
    ['piqa', 'p.jsonl', lines([{ goal: 'a', sol1: 'b', sol2: 'c' }]), /p\.jsonl:1: no field "label"/],
    ['race-h', 'r/high/1.txt', '{"article": "a", "questions": [], "options": []}', /1\.txt: no field "answers"/],
    ['winogrande', 'w.jsonl', lines([{ sentence: 'no blank' }]), /w\.jsonl:1: "sentence" is "no blank", but/],
    [
      'pg19',
      'g.jsonl',
      `${lines([{ text: 'a' }])}{"txt": "b"}\n`,
      /g\.jsonl:2: no field "text"; .* did you mean|g\.jsonl:2/,
    ],
    ['proof-pile', 'broken.parquet', 'PAR1 but not really PAR0', /broken\.parquet: footer/],
    [
      'gov-report',
      'v.jsonl',
      lines([{ report: 'a', summary: 7 }]),
      /v\.jsonl:1: "summary" is 7, but it must be a string/,
    ],
    ['gov-report-train', 'v.txt', 'text', /v\.txt: "\.txt" has no fields/],
  ]
  for (const [set, path, content, message] of cases) {
    const sets = { ...data, [set]: write(`bad/${path}`, content).replace('/high/1.txt', '') }
    const { code, stderr } = await ropewalk('reproduce', model, ...settings, '--out', at('bad-report'), ...given(sets))
    t.equal(code, 1, set)
    t.match(stderr, message, set)
    t.notOk(existsSync(at('bad-report')), `${set}: no report was begun`)
  }
  const gone = await ropewalk(...whole('bad-report').slice(0, -1), `gov-report-train=${at('gone.jsonl')}`)
  t.match(gone.stderr, /gone\.jsonl: /)
  // texts to fine-tune on are read by the trainer; after its refusal the same folder takes the mended file
  const train = write('bad/train.jsonl', `${lines([{ text: text(900) }])}{"text": 3}\n`)
  const run = (): Promise<Result> =>
    ropewalk('reproduce', model, ...settings, '--only', 'table-4', '--out', at('mended'), ...given({ train }))
  t.match((await run()).stderr, /train\.jsonl:2: "text" is 3, but it must be a string/)
  write('bad/train.jsonl', lines([{ text: text(1200) }]))
  const { code, stderr } = await run()
  t.equal(code, 0, stderr)
})

t.test('tasks that are longer than the window are left out, and it is said why', async (t) => {
  const tiny = makeModel('tiny', 64)
  const sets = { train: data.train!, pg19: data.pg19!, 'gov-report': data['gov-report']!, boolq: data.boolq! }
  const options = ['--contexts', '128', '--steps', '1', '--accumulate', '1', '--stride', '63', '--device', 'cpu']
  const more = ['--documents', '1', '--distances', '2', '--trials', '1', '--out', at('short'), '--json']
  const summaries = { 'gov-report-train': data['gov-report-train']! }
  const { code, stdout, stderr } = await ropewalk(
    'reproduce',
    tiny,
    ...options,
    ...more,
    ...given({ ...sets, ...summaries }),
  )
  t.equal(code, 0, stderr)
  const { sections, notRun } = JSON.parse(stdout)
  const why = (title: RegExp): string => notRun.find((line: { title: string }) => title.test(line.title))?.why ?? ''
  t.match(why(/^Table 4/), /^left out: context is 128 tokens, but the shortest prompt|/)
  t.match(why(/^Needle/), /^left out: context is 64 tokens/)
  t.match(why(/^RULER/), /^left out: .*vt at 128: context is 128 tokens/)
  t.match(why(/^Table 6/), /articles of 15000 tokens .* window is 128: give a larger one of --contexts, or less of/)
  t.ok(sections.some(({ id }: { id: string }) => id === 'table-1'))
  t.match(readFileSync(at('short/index.html'), 'utf8'), /Items: BoolQ 3 \(3 cut\)/)
  const bad = (...args: string[]): Promise<Result> => ropewalk('reproduce', tiny, '--out', at('none'), ...args)
  t.match((await bad('--contexts', '128', '--direct', '256')).stderr, /--direct 256: is none of the contexts, 128/)
  t.match((await bad('--contexts', '128,128')).stderr, /context 128 is given twice/)
  t.match((await bad('--contexts', '64')).stderr, /context 64 is not larger than the model's window of 64/)
  t.notOk(existsSync(at('none')))
})
