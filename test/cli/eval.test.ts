import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { fixtures } from '../golden.js'
import { ropewalk } from './command.js'

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-eval-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))
const model = join(fixtures, 'gqa-linear4-f32')
const texts = join(dir, 'texts.jsonl')
const text = readFileSync(join(fixtures, 'README.md'), 'utf8')
writeFileSync(texts, [text, text.slice(700), 'short'].map((text) => `${JSON.stringify({ text })}\n`).join(''))
const words = join(dir, 'words.txt')
writeFileSync(words, Array.from({ length: 30 }, (_, i) => `w${i}x`).join('\n'))

t.test('perplexity by position', async (t) => {
  const run = ['eval', 'perplexity', model, '--data', texts, '--windows', '64', '--by-position']
  const { result, baseline } = JSON.parse((await ropewalk(...run, '--baseline', '--json')).stdout)
  t.match(result, { window: 64, documents: 2, skipped: 1, bins: { length: 6 } })
  t.equal(baseline.bins.length, 6)
  const table = await ropewalk(...run)
  t.equal(table.code, 0, table.stderr)
  t.match(table.stdout, /distance +targets +nll +gain\n1 - 1 .* -\n2 - 3 +\d+ +\d\.\d{4} ± /)
  t.match(table.stdout, /\nmodel: more context helps up to \d+ of 63 tokens, at 95 % \(2 documents\)\n$/)
  t.match(table.stderr, /model, windows \d+\/\d+ perplexity/)
  t.match((await ropewalk(...run, '--stride', '8')).stderr, /leave --stride and --truncate out/)
  t.match((await ropewalk(...run.slice(0, 5), '--windows', '64,128', '--by-position')).stderr, /takes one window/)
})

t.test('needle', async (t) => {
  const run = ['eval', 'needle', model, '--contexts', '500,600', '--depths', '0,100', '--trials', '1', '--baseline']
  const { result, baseline } = JSON.parse((await ropewalk(...run, '--json')).stdout)
  t.match(result, { contexts: [500, 600], depths: [0, 1], cells: { length: 4 } })
  t.equal(baseline.cells.length, 4)
  const table = await ropewalk(...run)
  t.match(table.stdout, /model, depth +500 +600\n0 % .*\n100 % .*\nmodel: 0\.0 % of all answers right\nbaseline, depth/)
  t.match(
    (await ropewalk('eval', 'needle', model, '--depths', '101', '--contexts', '500')).stderr,
    /--depths is "101", but must be a whole number from 0 to 100/,
  )
})

t.test('ruler', async (t) => {
  const run = ['eval', 'ruler', model, '--context', '1500', '--tasks', 'vt,cwe', '--trials', '1', '--no-shots']
  const { result } = JSON.parse((await ropewalk(...run, '--words', words, '--json')).stdout)
  t.match(result, { context: 1500, shots: 0, accuracy: 0, tasks: [{ task: 'vt', trials: 1 }, { task: 'cwe' }] })
  t.match(result.tasks[1].records[0].references[0], /^w\d+x$/)
  const table = await ropewalk(...run, '--baseline', '--haystack', texts)
  t.equal(table.code, 0, table.stderr)
  t.match(table.stdout, /task +trials +accuracy +95 % interval +baseline +95 % interval\nvt +1 +0 % +0 % - 79 %/)
  t.match(table.stdout, /\nmodel: 0 % on average at 1500 tokens\nbaseline: /)
  t.match(
    (await ropewalk('eval', 'ruler', model, '--tasks', 'vts')).stderr,
    /there is no task "vts"; did you mean "vt"\?/,
  )
})
