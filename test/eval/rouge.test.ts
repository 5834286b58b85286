import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { porterStem } from '../../lib/eval/porter.js'
import { rouge, rougeTypes } from '../../lib/eval/rouge.js'
import { fixtures } from '../golden.js'

type Figures = Record<(typeof rougeTypes)[number], [precision: number, recall: number, fmeasure: number]>
type Case = { reference: string; prediction: string; plain: Figures; stemmed: Figures }

/** Computed by Google's rouge_score and by nltk (test/fixtures/README.md). */
const golden = JSON.parse(readFileSync(join(fixtures, 'rouge.json'), 'utf8')) as {
  cases: Case[]
  stems: Record<string, string>
}

t.test('stems are those of nltk', async (t) => {
  const words = Object.entries(golden.stems)
  t.ok(words.length > 600, `${words.length} words`)
  const wrong = words.flatMap(([word, stem]) => (porterStem(word) === stem ? [] : [[word, stem, porterStem(word)]]))
  t.strictSame(wrong, [])
})

t.test('figures are those of rouge_score', async (t) => {
  t.ok(golden.cases.length > 25)
  let apart = 0
  for (const { reference, prediction, ...expected } of golden.cases) {
    for (const stemmer of [false, true]) {
      const found = rouge(reference, prediction, { stemmer })
      for (const type of rougeTypes) {
        const { precision, recall, fmeasure } = found[type]
        const error = [precision, recall, fmeasure].map((value, i) =>
          Math.abs(value - expected[stemmer ? 'stemmed' : 'plain'][type][i]!),
        )
        const what = `${type} of ${JSON.stringify(prediction.slice(0, 30))}${stemmer ? ', stemmed' : ''}`
        t.ok(Math.max(...error) < 1e-9, `${what} off by ${Math.max(...error)}`)
      }
      if (found.rougeL.fmeasure !== found.rougeLsum.fmeasure) apart++
    }
  }
  t.ok(apart > 10, 'lines matter')
  t.strictSame(
    rouge('one two', 'one two'),
    rouge('one two', 'one two', { stemmer: true }),
    'the stemmer is the default',
  )
})

t.test('wrong arguments', async (t) => {
  t.throws(() => rouge(1 as never, 'x'), { name: 'TypeError', message: 'reference is 1, but must be a string' })
  t.throws(() => rouge('x', null as never), { name: 'TypeError', message: /prediction is null/ })
})
