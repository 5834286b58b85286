// The study of size and training length: that a tiny one is whole, goes on where it was stopped, and says what its figures say.
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { study, type StudyRow, verdict } from '../../lib/reproduce/study.js'

const out = mkdtempSync(join(tmpdir(), 'ropewalk-study-'))
t.teardown(() => rmSync(out, { recursive: true, force: true }))

t.test('a tiny study, stopped once', async (t) => {
  const tiny = { out, scale: 0.003, variants: 1 }
  const controller = new AbortController()
  const onProgress = (_: number, task: string) => /perplexity/.test(task) && controller.abort()
  await t.rejects(study({ ...tiny, signal: controller.signal, onProgress }), { name: 'AbortError' })
  const seen: number[] = []
  const rows = await study({ ...tiny, onProgress: (done) => seen.push(done) })
  t.strictSame(
    seen,
    [...seen].sort((a, b) => a - b),
    'progress only grows',
  )
  t.equal(rows.length, 2, 'a model, two lengths of training')
  t.ok(rows[1]!.trainedTokens > rows[0]!.trainedTokens)
  for (const row of rows) {
    t.equal(row.headDim, 32)
    t.equal(row.blowUp, row.extrapolated / row.near)
    t.ok(Object.values(row).every((value) => typeof value === 'string' || Number.isFinite(value)))
  }
  t.strictSame(JSON.parse(readFileSync(join(out, 'study.json'), 'utf8')).rows, rows)
  const html = readFileSync(join(out, 'index.html'), 'utf8')
  t.notMatch(html, /NaN|undefined|<script/)
  t.ok(html.includes(verdict(rows)))
  t.equal(readdirSync(out).length, 5, 'two folders, JSON, CSV and page')
})

t.test('the verdict counts', async (t) => {
  const row = { blowUp: 1, pi: 1, direct: 1 } as StudyRow
  const rows = [row, { ...row, blowUp: 1.2 }, { ...row, blowUp: 20, pi: 0.9 }]
  t.match(verdict(rows), /Of 3 models, 2 have .*, 1 one of more than ten times .*20\.00\); in 1 PI/)
})
