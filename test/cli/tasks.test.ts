// The commands of the downstream tasks, and training on examples.
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { fixtures } from '../golden.js'
import { ropewalk } from './command.js'

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-tasks-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))
process.env.XDG_CACHE_HOME = join(dir, 'cache')

const model = join(fixtures, 'gqa-linear4-f32')

const file = (name: string, content: string): string => {
  const path = join(dir, name)
  mkdirSync(join(path, '..'), { recursive: true })
  writeFileSync(path, content)
  return path
}
const golden = JSON.parse(readFileSync(join(fixtures, 'choice.json'), 'utf8'))
for (const [task, { files }] of Object.entries<any>(golden.tasks)) {
  for (const [name, text] of Object.entries<string>(files)) file(`${task}/${name}`, text)
}

t.test('eval choice', async (t) => {
  const piqa = ['--task', 'piqa', '--data', join(dir, 'piqa/valid.jsonl')]
  const labels = ['--labels', join(dir, 'piqa/valid-labels.lst')]
  const { code, stdout, stderr } = await ropewalk('eval', 'choice', model, ...piqa, ...labels, '--baseline')
  t.equal(code, 0, stderr)
  const expected = golden.models['gqa-linear4-f32'].tasks.piqa
  const percent = (share: number) => (100 * share).toFixed(1)
  const { acc, accStandardError: error, accNorm, accNormStandardError } = expected
  t.match(stdout, /^ +items +acc +acc_norm +acc_bytes +cut\nmodel .*\nbaseline .*\n$/)
  t.ok(
    stdout.includes(
      `${percent(acc)} % +- ${percent(error)}  ${percent(accNorm)} % +- ${percent(accNormStandardError)}`,
    ),
  )
  t.match(stderr, /model, piqa 3\/3 acc/)

  const race = ['--task', 'race-h', '--data', join(dir, 'race-h'), '--json']
  const json = JSON.parse((await ropewalk('eval', 'choice', model, ...race, '--records')).stdout)
  t.match(json, { model, task: 'race-h', baseline: null, result: { items: 3, truncated: 2 } })
  t.equal(json.result.records.length, 3)
  const short = await ropewalk('eval', 'choice', model, ...race)
  t.notOk('records' in JSON.parse(short.stdout).result)
  t.match(short.stderr, /longer than the window, with their beginning cut off: 2 of 3 items/)
  const refused = await ropewalk('eval', 'choice', model, ...race, '--refuse-long')
  t.match(refused, { code: 1, stdout: '', stderr: /high.1\.txt: choice 0 has \d+ tokens/ })
  const without = await ropewalk('eval', 'choice', model, ...piqa)
  t.match(without, { code: 1, stderr: /valid\.jsonl:1: no field "label", and PIQA has them in a file of their own/ })
})

t.test('eval summaries, and the examples that a model is extended with', async (t) => {
  const rows = ['Rope is long.', 'Tar is black.', 'Hemp.'].map((report) => ({ report, summary: report.split(' ')[0] }))
  const data = file('gov.jsonl', rows.map((row) => `${JSON.stringify(row)}\n`).join(''))
  const limits = ['--article-tokens', '12', '--summary-tokens', '6']
  const summaries = ['eval', 'summaries', model, '--data', data]
  const { code, stdout, stderr } = await ropewalk(...summaries, ...limits, '--limit', '2')
  t.equal(code, 0, stderr)
  t.match(stdout, /^ +model +95 % interval\nrouge1 .*\nrouge2 .*\nrougeL .*\nrougeLsum .*\n$/)
  t.match(stderr, /model, articles 2\/2 .*\n2 articles, \d of them cut; the model ended \d summaries itself/s)
  // The baseline has the window from before the extension, a quarter of it.
  const short = await ropewalk(...summaries, ...limits, '--baseline')
  t.match(short, { code: 1, stderr: /articleTokens 12, .* but the model's context window is 32: / })
  const longer = join(dir, 'longer')
  t.equal(
    (await ropewalk('extend', join(fixtures, 'ntk-theta'), '--context', '1024', '--steps', '0', '--out', longer)).code,
    0,
  )
  const again = await ropewalk(
    'eval',
    'summaries',
    longer,
    '--data',
    data,
    ...limits,
    '--json',
    '--records',
    '--baseline',
  )
  const json = JSON.parse(again.stdout)
  t.match(json, { model: longer, result: { articles: 3 }, baseline: { articles: 3 } })
  t.equal(json.result.records.length, 3)
  const tooMuch = await ropewalk(...summaries)
  t.match(tooMuch, { code: 1, stderr: /articleTokens 15000, the prompt's \d+ and summaryTokens 1000 make/ })

  const examples = join(dir, 'examples.jsonl')
  const written = await ropewalk(...summaries, ...limits, '--examples', examples)
  t.match(written, { code: 0, stdout: `wrote 3 examples to ${examples}\n` })
  const out = join(dir, 'out')
  const fields = ['--prompt-field', 'prompt', '--completion-field', 'completion']
  const extend = ['extend', model, '--context', '256', '--data', examples, '--out', out, '--steps', '2', ...fields]
  const trained = await ropewalk(...extend, '--json')
  t.equal(trained.code, 0, trained.stderr)
  const events = trained.stdout
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line))
  t.strictSame(
    events.map(({ event }) => event),
    ['step', 'step', 'saved'],
  )
})
