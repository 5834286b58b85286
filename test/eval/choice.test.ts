import { execFileSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import t from 'tap'
import { type ChoiceItem, type ChoiceTask, choiceTasks, readChoiceItems } from '../../lib/eval/choice-items.js'
import { type ChoiceModel, multipleChoice } from '../../lib/eval/choice.js'
import { Llama } from '../../lib/model/llama.js'
import { fixtures } from '../golden.js'

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-choice-'))
t.teardown(() => rmSync(dir, { recursive: true }))

function file(name: string, content: string | Uint8Array): string {
  const path = join(dir, name)
  mkdirSync(dirname(path), { recursive: true })
  writeFileSync(path, content)
  return path
}
const lines = (rows: unknown[]): string => rows.map((row) => `${JSON.stringify(row)}\n`).join('')

type Golden = {
  tasks: Record<string, { files: Record<string, string>; items: Omit<ChoiceItem, 'source'>[] }>
  models: Record<string, { maxLength: number; tasks: Record<string, any> }>
}
/** Made by the harness's own code and by transformers (test/fixtures/README.md). */
const golden = JSON.parse(readFileSync(join(fixtures, 'choice.json'), 'utf8')) as Golden

/** The published files of a task, written down; and its items read from them. */
function published(task: string): Promise<ChoiceItem[]> {
  const names = Object.entries(golden.tasks[task]!.files)
  for (const [name, text] of names) file(`${task}/${name}`, text)
  const labels = names.find(([name]) => name.endsWith('.lst'))?.[0]
  const data = task.startsWith('race') ? '' : names[0]![0]
  return readChoiceItems(task as ChoiceTask, [join(dir, task, data)], labels ? { labels: join(dir, task, labels) } : {})
}
const bare = (items: ChoiceItem[]) =>
  items.map(({ requests, ...rest }) => {
    const { source: _, ...item } = rest
    return { requests: requests.map(({ context, continuation }) => [context, continuation]), ...item }
  })

t.test("prompts are the harness's", async (t) => {
  t.strictSame(Object.keys(golden.tasks).sort(), ['boolq', 'piqa', 'race-h', 'winogrande'])
  for (const [task, { items }] of Object.entries(golden.tasks)) t.same(bare(await published(task)), items, task)
  t.match((await published('boolq'))[1]!.source, /boolq.dev\.jsonl:2$/)
  t.match((await published('race-h'))[2]!.source, /race-h.high.10\.txt$/, 'in the order of numbers')
})

t.test('log-likelihoods are those of transformers, item by item', async (t) => {
  let truncated = 0
  for (const [name, { maxLength, tasks }] of Object.entries(golden.models)) {
    using model = await Llama.load(join(fixtures, name), { dtype: 'float32' })
    for (const [task, expected] of Object.entries(tasks)) {
      const items = await published(task)
      const result = await multipleChoice(model, items, { maxLength })
      const { records, ...figures } = expected
      t.match(result, { items: items.length, ...figures }, `${name}, ${task}: figures`)
      for (const [i, { logLikelihoods, ...rest }] of records.entries()) {
        t.match(result.records[i], { ...rest, source: items[i]!.source, gold: items[i]!.gold })
        const error = logLikelihoods.map((sum: number, c: number) =>
          Math.abs(result.records[i]!.logLikelihoods[c]! / sum - 1),
        )
        t.ok(Math.max(...error) < 2e-6, `${name}, ${task} ${i}: off by ${Math.max(...error).toExponential(1)}`)
      }
      truncated += result.truncated
      t.equal(result.truncated, records.filter((record: { truncated: number }) => record.truncated > 0).length)
    }
  }
  t.ok(truncated > 5, 'long items were among them')
})

t.test('how choices share passes changes nothing but rounding; progress', async (t) => {
  const items = (await Promise.all(['boolq', 'race-h'].map(published))).flat()
  for (const name of ['mha-f32', 'dynamic4']) {
    using model = await Llama.load(join(fixtures, name), { dtype: 'float32' })
    const alone = await multipleChoice(model, items, { maxLength: 160, batchTokens: 1 })
    const seen: number[][] = []
    const together = await multipleChoice(model, items, {
      maxLength: 160,
      batchTokens: 1e6,
      onProgress: ({ done, total, acc }) => seen.push([done, total, acc]),
    })
    for (const [i, { logLikelihoods }] of alone.records.entries()) {
      const error = logLikelihoods.map((sum, c) => Math.abs(together.records[i]!.logLikelihoods[c]! / sum - 1))
      t.ok(Math.max(...error) < 2e-6, `${name}, ${i}: ${Math.max(...error)}`)
    }
    t.strictSame(seen.at(-1), [6, 6, together.acc])
    t.equal(seen.length > 1, name === 'dynamic4', 'only frequencies that depend on the length keep rows apart')
    const controller = new AbortController()
    controller.abort(new Error('enough'))
    await t.rejects(multipleChoice(model, items, { signal: controller.signal }), { message: 'enough' })
  }
})

t.test('only the choices tokens are scored, by characters and by bytes', async (t) => {
  const rows: { tokens: number[]; labels: number[] }[] = []
  const model = {
    config: { rope: { type: 'default' } },
    contextWindow: 16,
    tokenizer: async () => ({
      bosId: 0,
      encode: (text: string, { addSpecialTokens = true } = {}) => [
        ...(addSpecialTokens ? [0] : []),
        ...Array.from(text, (letter) => letter.codePointAt(0)!),
      ],
      decode: () => '<s>',
    }),
    async tokenLosses(tokens: { dims: number[]; data: Int32Array }, { labels }: { labels: { data: Int32Array } }) {
      const [count, time] = tokens.dims as [number, number]
      for (let row = 0; row < count; row++) {
        const of = (data: Int32Array) => [...data.subarray(row * time, (row + 1) * time)]
        rows.push({ tokens: of(tokens.data), labels: of(labels.data) })
      }
      // each scored token costs 1
      const data = Float32Array.from(labels.data, (_, n) => ((labels.data[n + 1] ?? -100) >= 0 ? 1 : 0))
      return { type: 'float32', dims: tokens.dims, data }
    },
  } as unknown as ChoiceModel
  const item = (context: string, ...choices: string[]): ChoiceItem => ({
    source: 'made up',
    requests: choices.map((choice) => ({ context, continuation: ` ${choice}` })),
    choices,
    gold: 1,
  })
  const text = (row: number[]) => String.fromCodePoint(...row.filter((id) => id > 0))
  const { records } = await multipleChoice(model, [item('ab \n', 'c', 'ééé')])
  t.strictSame(
    rows.map(({ tokens }) => text(tokens)),
    ['ab \n ééé', 'ab \n c'],
  )
  t.strictSame(
    rows.map(({ labels }) => text(labels)),
    [' \n ééé', ' \n c'],
    'spaces at the end of the context belong to the choice',
  )
  t.match(records[0], { logLikelihoods: [-4, -6], tokens: [4, 6], choice: 0, choiceNorm: 1, choiceBytes: 1 })
  const [wide] = (await multipleChoice(model, [item('x', 'abcd', '日本')])).records
  t.match(wide, { logLikelihoods: [-5, -3], choice: 1, choiceNorm: 0, choiceBytes: 1 }, '5/4 < 3/2 but 3/6')

  // the harness's truncation: maxLength + 1 tokens stay, the last of which is only predicted
  rows.length = 0
  const long = item('0123456789012345678901', 'a', 'bb')
  const cut = await multipleChoice(model, [long, item('x', 'y', 'z')])
  t.strictSame(
    rows.slice(0, 2).map(({ tokens }) => text(tokens)),
    [
      '890123456789012345678901 a'.slice(-17),
      '78901234567890123456789 bb'
        .slice(-17)
        .replace(/^.*(?= bb)/, '89012345678901')
        .slice(-17),
    ],
  )
  t.match(cut, { truncated: 1, items: 2 })
  t.match(cut.records[0], { truncated: 9, tokens: [2, 3] })
  await t.rejects(multipleChoice(model, [long], { tooLong: 'refuse' }), {
    name: 'RangeError',
    message: /made up: choice 0 has 25 tokens, 2 of them scored, but maxLength is 16: tooLong 'truncate' would cut/,
  })
  await t.rejects(multipleChoice(model, [long], { maxLength: 1 }), { message: /nothing could be cut off/ })
  // an empty context: the beginning of the sequence is read
  rows.length = 0
  await multipleChoice(model, [item('', 'a', 'b')])
  t.strictSame(rows[0]!.labels.slice(0, 4), [-100, 32, 97, -100])
  // a beginning of sequence in writing gets no second one
  rows.length = 0
  await multipleChoice(model, [item('<s>x', 'a', 'b')])
  t.equal(rows[0]!.tokens[0], '<'.codePointAt(0))

  for (const [options, message] of [
    [{ batchTokens: 0 }, 'batchTokens is 0, must be a whole number >= 1'],
    [{ maxLength: 1.5 }, 'maxLength is 1.5, must be a whole number >= 1'],
    [{ tooLong: 'cut' }, `tooLong is "cut", but must be 'truncate' or 'refuse'`],
  ] as const) {
    await t.rejects(multipleChoice(model, [long], options as never), { name: 'RangeError', message })
  }
  await t.rejects(multipleChoice(model, []), { name: 'TypeError', message: 'items: the list is empty' })
  await t.rejects(multipleChoice(model, [{ ...long, gold: 2 }]), { name: 'RangeError', message: /gold is 2/ })
  await t.rejects(multipleChoice(model, [{ ...long, choices: ['a'] }]), { name: 'TypeError' })
  const nan = { ...model, tokenLosses: async () => ({ data: new Float32Array(64).fill(NaN) }) } as never
  await t.rejects(multipleChoice(nan, [long]), { code: 'ERR_NOT_FINITE', message: /made up: choice \d has no/ })
})

t.test('the fields of the mirrors', async (t) => {
  const same = async (task: ChoiceTask, path: string, from = task as string) =>
    t.same(bare(await readChoiceItems(task, [path])), golden.tasks[from]!.items, path)
  const rows = (name: string, task: string) =>
    golden.tasks[task]!.files[name]!.trim()
      .split('\n')
      .map((line) => JSON.parse(line))
  const boolq = rows('dev.jsonl', 'boolq')
  await same('boolq', file('m/superglue.jsonl', lines(boolq.map(({ answer, ...row }) => ({ ...row, label: answer })))))
  await same('boolq', file('m/hf.jsonl', lines(boolq.map(({ answer, ...row }) => ({ ...row, label: +answer })))))
  await same('piqa', file('m/piqa.jsonl', lines(rows('valid.jsonl', 'piqa').map((row) => ({ ...row, label: 0 })))))
  const articles = Object.values(golden.tasks['race-h']!.files).map((text) => JSON.parse(text))
  const problem = ({ questions, options, answers }: any, i: number) => ({
    ...{ question: questions[i], options: options[i], answer: answers[i] },
  })
  const flat = articles.flatMap((article) =>
    article.questions.map((_: string, i: number) => ({
      ...{ example_id: article.id, article: article.article, ...problem(article, i) },
    })),
  )
  const other = { ...flat[0], example_id: 'middle7.txt', article: 'of the other level' }
  await same('race-h', file('m/race.jsonl', lines([other, ...flat])))
  const grouped = articles.map((article) => ({
    ...{ article: article.article, problems: article.questions.map((_: string, i: number) => problem(article, i)) },
  }))
  await same('race-h', file('m/grouped.jsonl', lines(grouped)))

  // parquet: booleans and whole numbers in columns
  const parquet = (name: string, columns: Record<string, [data: unknown[], type: string]>): string => {
    const script = `import { parquetWriteBuffer } from 'hyparquet-writer'
      import { readFileSync } from 'node:fs'
      const columns = JSON.parse(readFileSync(0, 'utf8'))
      for (const column of columns) if (column.type === 'INT64') column.data = column.data.map(BigInt)
      process.stdout.write(new Uint8Array(parquetWriteBuffer({ columnData: columns })))`
    const input = JSON.stringify(Object.entries(columns).map(([name, [data, type]]) => ({ name, data, type })))
    return file(name, execFileSync(process.execPath, ['--input-type=module', '-e', script], { input }))
  }
  const column = (rows: any[], name: string): [unknown[], string] => [rows.map((row) => row[name]), 'STRING']
  const texts = { passage: column(boolq, 'passage'), question: column(boolq, 'question') }
  const answers = boolq.map(({ answer }) => answer)
  await same('boolq', parquet('m/answer.parquet', { ...texts, answer: [answers, 'BOOLEAN'] }))
  await same('boolq', parquet('m/label64.parquet', { ...texts, label: [answers.map(Number), 'INT64'] }))
  await same('boolq', parquet('m/label32.parquet', { ...texts, label: [answers.map(Number), 'INT32'] }))
  await t.rejects(readChoiceItems('boolq', [parquet('m/none.parquet', texts)]), {
    code: 'ERR_FIELD',
    message: /none\.parquet#0: no field "answer"; there are "passage", "question"/,
  })
  await t.rejects(
    readChoiceItems('boolq', [parquet('m/half.parquet', { ...texts, answer: [[0.5, 1, 0], 'DOUBLE'] })]),
    {
      code: 'ERR_FIELD',
      message: /half\.parquet: column "answer" does not hold texts, whole numbers or booleans/,
    },
  )
})

t.test('what is wrong with the data is named', async (t) => {
  const [goal, sol1, sol2] = ['g', 'a', 'b']
  const piqa = file(
    'bad/piqa.jsonl',
    lines([
      { goal, sol1, sol2 },
      { goal, sol1, sol2 },
    ]),
  )
  const race = { article: 'a', questions: ['q'], options: [['1', '2', '3', '4']], answers: ['A'] }
  const cases: [ChoiceTask, string, string | undefined, any][] = [
    [
      'boolq',
      file('bad/a.jsonl', lines([{ passage: 'p', question: 'q', answer: 'yes' }])),
      undefined,
      { code: 'ERR_FIELD', message: /a\.jsonl:1: "answer" is "yes", but it must be false or true$/ },
    ],
    [
      'boolq',
      file('bad/b.jsonl', lines([{ passage: 'p', question: 3, answer: true }])),
      undefined,
      { code: 'ERR_FIELD', message: /b\.jsonl:1: "question" is 3, but it must be a string/ },
    ],
    [
      'boolq',
      file('bad/c.jsonl', lines([{ passage: 'p', quastion: 'q', answer: true }])),
      undefined,
      {
        code: 'ERR_FIELD',
        message: /c\.jsonl:1: no field "question"; there are "passage", "quastion", "answer"; did you mean "quastion"/,
      },
    ],
    [
      'boolq',
      file('bad/d.jsonl', lines([{ passage: 'p', question: 'q', label: -1 }])),
      undefined,
      { code: 'ERR_FIELD', message: /this is a test split/ },
    ],
    ['boolq', file('bad/d.csv', 'x'), undefined, { code: 'ERR_FORMAT', message: /d\.csv: "\.csv" has no fields/ }],
    [
      'boolq',
      file('bad/e.jsonl', '\n'),
      undefined,
      { code: 'ERR_NO_TEXT', message: /e\.jsonl: there is no item of boolq/ },
    ],
    ['boolq', join(dir, 'bad/none.jsonl'), undefined, { code: 'ERR_NOT_FOUND' }],
    [
      'piqa',
      piqa,
      undefined,
      {
        code: 'ERR_FIELD',
        message: /piqa\.jsonl:1: no field "label", and PIQA has them in a file of their own: give labels/,
      },
    ],
    [
      'piqa',
      piqa,
      file('bad/1.lst', '0\n'),
      { code: 'ERR_FIELD', message: /piqa\.jsonl:2: no field "label", and the file of labels has only 1/ },
    ],
    ['piqa', piqa, file('bad/3.lst', '0\n1\n1\n'), { code: 'ERR_FORMAT', message: /3\.lst: 3 labels for the 2 items/ }],
    [
      'piqa',
      piqa,
      file('bad/x.lst', '0\n2\n'),
      { code: 'ERR_FORMAT', message: /x\.lst:2: "2", but a label is 0 or 1/ },
    ],
    ['piqa', piqa, join(dir, 'none.lst'), { code: 'ERR_NOT_FOUND' }],
    ['boolq', piqa, piqa, { name: 'RangeError', message: /the files of boolq hold their answers/ }],
    [
      'winogrande',
      file('bad/w.jsonl', lines([{ sentence: 'no blank', option1: 'a', option2: 'b', answer: '1' }])),
      undefined,
      {
        code: 'ERR_FIELD',
        message: /w\.jsonl:1: "sentence" is "no blank", but it must be a sentence with the blank _/,
      },
    ],
    [
      'winogrande',
      file('bad/v.jsonl', lines([{ sentence: '_ x', option1: 'a', option2: 'b', answer: '' }])),
      undefined,
      { code: 'ERR_FIELD', message: /must be "1" or "2"; this is a test split/ },
    ],
    [
      'race-m',
      file('bad/1.txt', JSON.stringify({ ...race, answers: ['E'] })),
      undefined,
      { code: 'ERR_FIELD', message: /1\.txt: "answers\[0\]" is "E", but it must be "A", "B", "C" or "D"/ },
    ],
    [
      'race-m',
      file('bad/2.txt', JSON.stringify({ ...race, options: [['1', '2']] })),
      undefined,
      { code: 'ERR_FIELD', message: /2\.txt: "options\[0\]" is .*a list of four strings/ },
    ],
    [
      'race-m',
      file('bad/3.txt', JSON.stringify({ ...race, answers: [] })),
      undefined,
      { code: 'ERR_FORMAT', message: /3\.txt: 1 questions, 1 options and 0 answers/ },
    ],
    [
      'race-m',
      file('bad/4.txt', JSON.stringify({ article: 'a', questions: [], options: [], answers: [] })),
      undefined,
      { code: 'ERR_FORMAT', message: /4\.txt: the article 4\.txt has no question/ },
    ],
    ['race-m', file('bad/5.txt', '{'), undefined, { code: 'ERR_JSON' }],
    [
      'race-m',
      file('bad/p.jsonl', lines([{ article: 'a', problems: [{ question: 'q', options: ['1', '2', '3', '4'] }] }])),
      undefined,
      { code: 'ERR_FIELD', message: /p\.jsonl:1, problems\[0\]: no field "answer"/ },
    ],
    ['race-m', dirname(file('empty/x.md', 'x')), undefined, { code: 'ERR_EMPTY' }],
    [
      'raze' as never,
      piqa,
      undefined,
      { name: 'RangeError', message: /task is "raze", but must be one of boolq, piqa/ },
    ],
  ]
  for (const [task, path, labels, error] of cases) {
    await t.rejects(readChoiceItems(task, [path], labels ? { labels } : {}), error as Error, path)
  }

  await t.rejects(readChoiceItems('boolq', []), { name: 'TypeError' })
  // a folder with both levels gives the one of the task
  for (const level of ['middle', 'high']) file(`RACE/${level}/1.txt`, JSON.stringify({ ...race, article: level }))
  for (const [task, level] of [
    ['race-m', 'middle'],
    ['race-h', 'high'],
  ] as const)
    t.match((await readChoiceItems(task, [join(dir, 'RACE')]))[0]!.requests[0]!.context, `Article: ${level}\n`)
  const twice = [join(dir, 'RACE'), join(dir, 'RACE')]
  await t.rejects(readChoiceItems('race-m', twice), { name: 'RangeError', message: /given twice/ })
  t.equal(choiceTasks.length, 5)
})
