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
    const { farther, ...figures } = row
    t.ok(Object.values(figures).every((value) => typeof value === 'string' || Number.isFinite(value)))
    t.strictSame(
      farther.map(({ factor, blowUp }) => [factor, blowUp > 0 && Number.isFinite(blowUp)]),
      [
        [8, true],
        [16, true],
      ],
    )
  }
  t.strictSame(JSON.parse(readFileSync(join(out, 'study.json'), 'utf8')).rows, rows)
  const html = readFileSync(join(out, 'index.html'), 'utf8')
  t.notMatch(html, /NaN|undefined|<script/)
  t.ok(html.includes(verdict(rows)))
  t.equal(readdirSync(out).length, 5, 'two folders, JSON, CSV and page')
})

t.test('the verdict counts', async (t) => {
  const farther = (blowUp: number) => [{ factor: 16, blowUp }]
  const row = { variant: 'a', blowUp: 1, farther: farther(1), pi: 1, direct: 1 } as StudyRow
  const rows = [
    row,
    { ...row, blowUp: 1.2, farther: farther(11) },
    { ...row, blowUp: 20, farther: farther(30), pi: 0.9 },
  ]
  t.match(
    verdict(rows),
    /^Of 3 models .*, at 4x, 2 have .*, and 1 one of more than ten times .*20\.00\); at 16x, 2 have .*, and 2 one/,
  )
  t.match(
    verdict(rows),
    /30\.00\)\. In 1 PI has.*raises the ratio at 16x in 2 of 2 steps, and that of PI to direct.* in 0\.$/,
  )
})
