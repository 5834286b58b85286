import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { openTokens } from '../../lib/files/tokens.js'
import { type DataCursor, DataLoader, type DataSettings, type Sample } from '../../lib/train/data.js'
import { chunksOf } from '../../lib/train/pose.js'
import { learningRateAt, type ScheduleSettings } from '../../lib/train/schedule.js'
import { permutation } from '../../lib/train/shuffle.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-data-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const BOS = 1
const EOS = 2
/** permutation(10, seed, stream) for (0, 0), (0, 1) and (2^40 + 1, 0). */
const PINNED = [
  [2, 8, 5, 6, 9, 7, 0, 1, 4, 3],
  [6, 2, 0, 3, 5, 7, 8, 1, 9, 4],
  [6, 1, 8, 0, 7, 9, 3, 4, 2, 5],
]
let encoded = 0
/** A token for each character, so that tests can say what they expect. */
const encoder = {
  hash: 'characters',
  encode: (text: string) => {
    encoded++
    return [BOS, ...Array.from(text, (c) => c.charCodeAt(0))]
  },
}
const ids = (text: string): number[] => Array.from(text, (c) => c.charCodeAt(0))

let serial = 0
function file(texts: readonly string[], name = `${serial++}.jsonl`): string {
  const path = join(dir, name)
  fs.writeFileSync(path, texts.map((text) => `${JSON.stringify({ text })}\n`).join(''))
  return path
}

const settings = (more: Partial<DataSettings> & { data: readonly string[] }): DataSettings => ({
  ...{ context: 4, packing: 'concat', seed: 0, validation: undefined, eosId: EOS, field: 'text' },
  cacheDir: join(dir, 'cache'),
  ...more,
})
const open = (more: Partial<DataSettings> & { data: readonly string[] }) => DataLoader.open(settings(more), encoder)

const rowsOf = ({ tokens }: Sample): number[][] => {
  const { dims, data } = tokens as { dims: number[]; data: Int32Array }
  return Array.from({ length: dims[0]! }, (_, row) => [...data.subarray(row * dims[1]!, (row + 1) * dims[1]!)])
}
const start: DataCursor = { epoch: 0, index: 0 }
async function take(loader: DataLoader, count: number, rows = 1, from = start): Promise<number[][]> {
  const taken: number[][] = []
  for (let cursor = from; taken.length < count;) {
    const { sample, cursor: after } = await loader.next(cursor, rows)
    taken.push(...rowsOf(sample))
    cursor = after
  }
  return taken
}

const letters = (n: number): string => Array.from({ length: n }, (_, i) => String.fromCharCode(97 + (i % 26))).join('')

t.test('schedule', async (t) => {
  const base: ScheduleSettings = {
    learningRate: 2,
    warmupSteps: 20,
    schedule: 'constant',
    steps: 120,
    finalFraction: 0.1,
  }
  const at = (step: number, more: Partial<ScheduleSettings> = {}) => learningRateAt(step, { ...base, ...more })
  t.equal(at(0), 0.2, 'a tenth of the peak')
  t.ok(Math.abs(at(10) - 1.1) < 1e-12, 'half way up')
  t.ok(Math.abs(at(19) - 1.91) < 1e-12)
  for (const step of [20, 21, 119, 100000]) t.equal(at(step), 2)
  t.equal(at(0, { warmupSteps: 0 }), 2, 'no warm-up: the peak at once')
  for (const schedule of ['linear', 'cosine'] as const) {
    t.equal(at(20, { schedule }), 2)
    t.ok(Math.abs(at(70, { schedule }) - 1.1) < 1e-12, `${schedule}: half way down`)
    t.ok(Math.abs(at(120, { schedule }) - 0.2) < 1e-12, `${schedule}: the final fraction`)
    t.equal(at(500, { schedule }), at(120, { schedule }))
    t.equal(at(20, { schedule, steps: 20 }), 0.2, 'no room to fall')
    t.ok(Math.abs(at(119, { schedule, finalFraction: 0 })) < 0.021)
  }
  t.ok(Math.abs(at(45, { schedule: 'linear' }) - 1.55) < 1e-12)
  t.ok(Math.abs(at(45, { schedule: 'cosine' }) - (0.2 + 1.8 * (0.5 + Math.SQRT1_2 / 2))) < 1e-12)
})

t.test('permutations', async (t) => {
  // Pinned: another order in another release would break the resume of old runs.
  t.strictSame([...permutation(10, 0, 0)], PINNED[0])
  t.strictSame([...permutation(10, 0, 1)], PINNED[1])
  t.strictSame([...permutation(10, 2 ** 40 + 1, 0)], PINNED[2])
  t.strictSame(
    [...permutation(1000, 7, 3)].sort((a, b) => a - b),
    [...Array(1000).keys()],
  )
  t.strictSame([...permutation(0, 1, 1)], [])
  // Each item comes to each place equally often: chi-square of 5 x 5 counts, 16 degrees of freedom.
  const counts = Array.from({ length: 25 }, () => 0)
  for (let seed = 0; seed < 5000; seed++) permutation(5, seed, 0).forEach((item, place) => counts[5 * item + place]++)
  const chi = counts.reduce((sum, count) => sum + (count - 1000) ** 2 / 1000, 0)
  t.ok(chi < 45, `chi-square ${chi}`)
})

t.test('concatenated windows', async (t) => {
  const data = [file(['abcde', '', 'fgh']), file(['ij'])]
  // 1abcde2 1fgh2 1ij2: 16 tokens
  const stream = [BOS, ...ids('abcde'), EOS, BOS, ...ids('fgh'), EOS, BOS, ...ids('ij'), EOS]
  const loader = await open({ data })
  t.strictSame(loader.size, { tokens: 16, documents: 3, windows: 4, validationWindows: 0 })
  const epoch = await take(loader, 4)
  const windows = [0, 4, 8, 12].map((at) => stream.slice(at, at + 4))
  t.strictSame(
    epoch,
    [...permutation(4, 0, 0)].map((i) => windows[i]),
    'every window once, in the order of the seed',
  )
  t.strictSame(await take(loader, 4, 2), epoch, 'rows do not change the order')
  const eight = await take(loader, 8)
  t.strictSame(
    eight.slice(4),
    [...permutation(4, 0, 1)].map((i) => windows[i]),
    'another order in the next epoch',
  )
  t.strictSame(await take(loader, 9, 3), await take(loader, 9), 'micro-batches cross the end of an epoch')
  const { sample, cursor } = await loader.next({ epoch: 0, index: 3 }, 2)
  t.strictSame(cursor, { epoch: 1, index: 1 })
  t.strictSame(rowsOf(sample), [eight[3], eight[4]], 'a cursor is all that is needed to go on')
  t.strictSame(sample.options, {}, 'attention runs across documents')
  t.match(sample.origin[0], /^window \d \(\d\.jsonl, document \d, tokens \d+\.\.\d+\)$/)
  const third = (await Promise.all([0, 1, 2, 3].map((index) => loader.next({ epoch: 0, index }, 1)))).flatMap(
    (n) => n.sample.origin,
  )
  t.ok(
    third.some((origin) => /^window 3 \(.*jsonl, document 1, tokens 12\.\.15\)$/.test(origin)),
    'the document of the second file',
  )

  const other = await open({ data, seed: 1, context: 3 })
  t.equal(other.size.windows, 5, 'the last token is left over')
  t.not(other.hash, loader.hash)
  t.notSame(await take(other, 5), await take(other, 5, 1, { epoch: 1, index: 0 }))
  const plain = await open({ data, eosId: undefined })
  t.equal(plain.size.tokens, 13)
  await t.rejects(open({ data, context: 17 }), {
    code: 'ERR_DATA',
    message: /a window of context 17 takes 17 tokens, but .* have 16: use a smaller context or more data/,
  })
  fs.writeFileSync(join(dir, 'binary.txt'), Buffer.from([1, 0, 2]))
  await t.rejects(open({ data: [join(dir, 'binary.txt')] }), { code: 'ERR_BINARY' })
  fs.writeFileSync(join(dir, 'empty.txt'), '')
  await t.rejects(open({ data: [join(dir, 'empty.txt')] }), { code: 'ERR_EMPTY' })
  await t.rejects(open({ data: [join(dir, 'none.txt')] }), { code: 'ERR_NOT_FOUND' })
})

t.test('documents apart', async (t) => {
  const data = [file(['ab', 'c', 'defghij'])]
  // 1ab2 1c2 1defghij2: 4 + 3 + 9 = 16 tokens, windows of 8
  const loader = await open({ data, context: 8, packing: 'documents' })
  const { sample } = await loader.next(start, 2)
  const windows = rowsOf(sample)
  const row = windows.findIndex(([, second]) => second === ids('a')[0])
  const of = (name: 'labels' | 'positions' | 'first', at: number) => [
    ...(sample.options[name] as { data: Int32Array }).data.subarray(8 * at, 8 * at + 8),
  ]
  t.strictSame(of('positions', row), [0, 1, 2, 3, 0, 1, 2, 0])
  t.strictSame(of('first', row), [0, 0, 0, 0, 4, 4, 4, 7])
  t.strictSame(
    of('labels', row),
    windows[row]!.map((id, i) => (i === 4 || i === 7 ? -100 : id)),
    'no document predicts the next one',
  )
  t.strictSame(of('positions', 1 - row), [0, 1, 2, 3, 4, 5, 6, 7], 'a cut document goes on as one of its own')
  t.strictSame(of('first', 1 - row), [0, 0, 0, 0, 0, 0, 0, 0])
  t.strictSame(of('labels', 1 - row), windows[1 - row])
  const boundary = await open({ data: [file(['ab', 'cd', 'ef'])], context: 4, packing: 'documents' })
  for (let index = 0; index < 3; index++) {
    const { options } = (await boundary.next({ epoch: 0, index }, 1)).sample
    t.strictSame(
      [...(options.first as { data: Int32Array }).data],
      [0, 0, 0, 0],
      'a document that starts with the window',
    )
    t.notOk([...(options.labels as { data: Int32Array }).data].includes(-100))
  }
})

t.test('examples: whole, filled up, prompts masked', async (t) => {
  const fields = { prompt: 'question', completion: 'answer' }
  let name = 0
  const examples = (...pairs: [question: string, answer: string][]): string => {
    const path = join(dir, `examples-${name++}.jsonl`)
    const rows = pairs.map(([question, answer]) => JSON.stringify({ answer, question }))
    fs.writeFileSync(path, rows.join('\n'))
    return path
  }
  // 1ab|cd2, 1|e2, 1fgh|ij2, 1k|l2: 6 + 3 + 7 + 4 tokens
  const data = [examples(['ab', 'cd'], ['', 'e'], ['fgh', 'ij']), examples(['k', 'l'])]
  const text = (s: string): number[] => [BOS, ...ids(s), EOS]
  const rest = (n: number): number[] => Array(n).fill(EOS)
  const X = -100
  const expected = [
    {
      tokens: [...text('abcd'), ...text('e'), ...rest(1)],
      labels: [X, X, X, ...ids('cd'), EOS, X, ...ids('e'), EOS, X],
      positions: [0, 1, 2, 3, 4, 5, 0, 1, 2, 0],
      first: [0, 0, 0, 0, 0, 0, 6, 6, 6, 9],
    },
    {
      tokens: [...text('fghij'), ...rest(3)],
      labels: [X, X, X, X, ...ids('ij'), EOS, X, X, X],
      positions: [0, 1, 2, 3, 4, 5, 6, 0, 1, 2],
      first: [0, 0, 0, 0, 0, 0, 0, 7, 7, 7],
    },
    {
      tokens: [...text('kl'), ...rest(6)],
      labels: [X, X, ...ids('l'), EOS, X, X, X, X, X, X],
      positions: [0, 1, 2, 3, 0, 1, 2, 3, 4, 5],
      first: [0, 0, 0, 0, 4, 4, 4, 4, 4, 4],
    },
  ]
  const documents = await open({ data, fields, context: 10, packing: 'documents' })
  const concat = await open({ data, fields, context: 10 })
  t.strictSame(documents.size, { tokens: 20, documents: 4, windows: 3, validationWindows: 0 })
  t.not(documents.hash, concat.hash)
  for (const loader of [documents, concat]) {
    const { sample } = await loader.next(start, 3)
    t.strictSame(Object.keys(sample.options), loader === concat ? ['labels'] : ['labels', 'positions', 'first'])
    const row = (tensor: unknown, at: number) => [
      ...(tensor as { data: Int32Array }).data.subarray(10 * at, 10 * at + 10),
    ]
    for (const [at, window] of [...permutation(3, 0, 0)].entries()) {
      const options = expected[window]!
      t.strictSame(rowsOf(sample)[at], options.tokens)
      for (const name of ['labels', 'positions', 'first'] as const) {
        if (name === 'labels' || loader === documents) t.strictSame(row(sample.options[name], at), options[name], name)
      }
    }
    t.match(sample.origin.sort()[1], /window 1 \(examples-0\.jsonl, document 3, tokens 9\.\.15\)/)
  }
  // from the cache, with the masks; and other fields are other tokens
  encoded = 0
  const again = await open({ data, fields, context: 10, packing: 'documents' })
  t.equal(encoded, 0)
  t.equal(again.hash, documents.hash)
  t.strictSame((await again.next(start, 3)).sample, (await documents.next(start, 3)).sample)
  const swapped = await open({ data, fields: { prompt: 'answer', completion: 'question' }, context: 10 }).catch(
    (e) => e,
  )
  t.match(swapped, {
    code: 'ERR_FIELD',
    message: /examples-0\.jsonl:2: "question" is "", but it must be a text to learn/,
  })
  const plain = await open({ data, field: 'answer', context: 4 })
  t.equal(plain.size.tokens, 2 + 1 + 2 + 1 + 2 * 4, 'the same files as texts')

  // a token that reaches from the prompt into the completion is learned
  const pairs = {
    hash: 'pairs',
    encode: (text: string) => (text.match(/..?/g) ?? []).map((two) => two.length * 1000 + two.charCodeAt(0)),
  }
  const { options } = (
    await (
      await DataLoader.open(settings({ data: [examples(['abc', 'd'])], fields, context: 4 }), pairs)
    ).next(start, 1)
  ).sample
  t.strictSame([...(options.labels as { data: Int32Array }).data], [X, 2000 + ids('c')[0]!, EOS, X])

  const warnings: string[] = []
  const short = await open({ data, fields, context: 6, onWarning: (message) => warnings.push(message) })
  t.strictSame(short.size, { tokens: 20, documents: 4, windows: 3, validationWindows: 0 })
  t.match(warnings, [
    /^data: 1 of 4 examples are longer than the context of 6 tokens, the first is examples-0\.jsonl, document 3 with 7: they are left out$/,
  ])
  await t.rejects(open({ data, fields, context: 2 }), {
    code: 'ERR_DATA',
    message: /4 of 4 examples are longer than .*: use a larger context or shorter examples/,
  })
  const held = await open({ data, fields, context: 6, validation: [data[1]!] })
  t.equal(held.size.validationWindows, 1)
  for await (const { sample } of held.validation(1)) t.strictSame(rowsOf(sample), [[...text('kl'), ...rest(2)]])
  t.equal((await open({ data, fields, context: 6, validation: 1 })).size.windows, 2)

  fs.writeFileSync(join(dir, 'plain.txt'), 'x')
  await t.rejects(open({ data: [join(dir, 'plain.txt')], fields }), { code: 'ERR_FORMAT', message: /has no fields/ })
  await t.rejects(open({ data: [examples()], fields }), { code: 'ERR_EMPTY' })
  const lines = join(dir, 'lines.jsonl')
  fs.writeFileSync(lines, '{"question":"a","answer":"b"}\n{"question":"a"}\n{"question":1,"answer":""}')
  await t.rejects(open({ data: [lines], fields }), { code: 'ERR_FIELD', message: /lines\.jsonl:2: no field "answer"/ })
})

t.test('validation', async (t) => {
  const data = [file([letters(78)])] // 80 tokens, 20 windows
  const all = await open({ data })
  const everything = (await take(all, 20)).map(String).sort()
  for (const [validation, size] of [
    [0.25, 5],
    [0.001, 1],
    [7, 7],
  ] as const) {
    const loader = await open({ data, validation })
    t.equal(loader.size.validationWindows, size)
    t.equal(loader.size.windows, 20 - size)
    const held: number[][] = []
    const counts: number[] = []
    for await (const { sample, count } of loader.validation(3)) {
      t.equal(rowsOf(sample).length, 3, 'always full groups')
      held.push(...rowsOf(sample).slice(0, count))
      counts.push(count)
    }
    t.equal(held.length, size)
    t.equal(counts.at(-1), size % 3 || 3)
    const trained = await take(loader, 20 - size)
    t.strictSame([...held, ...trained].map(String).sort(), everything, 'each window on one side')
    t.not(loader.hash, all.hash)
  }
  await t.rejects(open({ data, validation: 20 }), { code: 'ERR_DATA', message: /validation takes 20 of 20 windows/ })
  const own = await open({ data, validation: [file(['xyz'])] })
  t.equal(own.size.windows, 20)
  for await (const { sample, count } of own.validation(1)) {
    t.equal(count, 1)
    t.strictSame(rowsOf(sample), [[BOS, ...ids('xyz')]])
  }
  await t.rejects(open({ data, validation: [file(['x'])] }), { code: 'ERR_DATA', message: /^validation: / })
})

t.test('cache', async (t) => {
  const cacheDir = join(dir, 'own-cache')
  const data = [file(Array.from({ length: 300 }, (_, i) => letters(i % 50)))]
  const warnings: string[] = []
  const stages: string[] = []
  const options = {
    ...{ data, cacheDir, onWarning: (message: string) => warnings.push(message) },
    onProgress: ({ stage, bytes, totalBytes }: { stage: string; bytes: number; totalBytes: number }) => {
      t.ok(bytes <= totalBytes)
      stages.push(stage)
    },
  }
  const first = await open(options)
  const want = await take(first, first.size.windows)
  t.ok(stages.includes('hash') && stages.includes('tokenize'))
  const [name, ...more] = fs.readdirSync(cacheDir)
  t.strictSame(more, [], 'one file, nothing temporary')
  const path = join(cacheDir, name!)
  const bytes = fs.readFileSync(path)

  encoded = 0
  const same = async (what: string) => {
    const loader = await open(options)
    t.equal(loader.hash, first.hash)
    t.strictSame(await take(loader, loader.size.windows), want, what)
  }
  await same('from the cache')
  t.equal(encoded, 0)
  // every part of the file: tokens, ends, JSON, trailer, checksum; and what a crash leaves
  const places = [
    0,
    4000,
    bytes.length - 64 - 200,
    bytes.length - 66,
    bytes.length - 60,
    bytes.length - 45,
    bytes.length - 1,
  ]
  for (const [i, place] of places.entries()) {
    const damaged = Buffer.from(bytes)
    damaged[place]! ^= 1 << (i % 8)
    fs.writeFileSync(path, damaged)
    await same(`made again: byte ${place}`)
    t.match(warnings.at(-1), /the cached tokens are damaged .*made again/)
    t.equal(warnings.length, i + 1)
    t.ok(fs.readFileSync(path).equals(bytes), 'and the same as before')
  }
  for (const length of [0, 10, 64, bytes.length - 1]) {
    fs.truncateSync(path, length)
    await same(`made again: ${length} bytes`)
  }
  t.equal(warnings.length, places.length + 4)

  // Another tokenizer, field or file is another entry.
  const other = await DataLoader.open(settings(options), { ...encoder, hash: 'other' })
  t.not(other.hash, first.hash)
  fs.appendFileSync(data[0]!, `${JSON.stringify({ text: 'more' })}\n`)
  const changed = await open(options)
  t.not(changed.hash, first.hash)

  // Several at a time, in this process as in several.
  const together = join(dir, 'together')
  const loaders = await Promise.all(Array.from({ length: 5 }, () => open({ ...options, cacheDir: together })))
  for (const loader of loaders) {
    t.equal(loader.hash, changed.hash)
  }
  t.equal(fs.readdirSync(together).length, 1)

  const abort = new AbortController()
  abort.abort()
  await t.rejects(open({ ...options, cacheDir: join(dir, 'aborted'), signal: abort.signal }), { name: 'AbortError' })
  fs.writeFileSync(join(dir, 'a-file'), '')
  await t.rejects(open({ ...options, cacheDir: join(dir, 'a-file') }), { message: /set cacheDir/ })
})

t.test('long tokenising leaves the event loop free', async (t) => {
  const data = [file(Array.from({ length: 400 }, () => 'x'))]
  const slow = (text: string): number[] => {
    for (const end = performance.now() + 0.5; performance.now() < end;);
    return ids(text)
  }
  let turns = 0
  const timer = setInterval(() => turns++, 1)
  const cacheDir = join(dir, 'slow')
  const tokens = await openTokens(data, { encode: slow, tokenizerHash: 's', eosId: undefined, field: 'text', cacheDir })
  clearInterval(timer)
  t.equal(tokens.tokens, 400)
  t.ok(turns >= 5, `${turns} turns for others`)
  await t.rejects(tokens.read(390, 11), RangeError)
})

t.test('a shard for each file: one that is added costs only itself', async (t) => {
  const cacheDir = t.testdir()
  const [a, b] = [file(['abcdefgh']), file(['ijklmnop'])]
  const read: string[] = []
  const encode = (text: string): number[] => {
    read.push(text)
    return Array.from(text, (c) => c.charCodeAt(0))
  }
  const options = { encode, tokenizerHash: 'x', eosId: undefined, field: 'text', cacheDir }
  const one = await openTokens([a], options)
  const two = await openTokens([a, b], options)
  t.strictSame(read, ['abcdefgh', 'ijklmnop'], 'each text is encoded once')
  t.equal(fs.readdirSync(cacheDir).length, 2)
  t.not(one.key, two.key)
  t.strictSame(
    [...(await two.read(6, 4))],
    [...'ghij'].map((c) => c.charCodeAt(0)),
    'across the border of two shards',
  )
  t.strictSame([...two.ends], [8, 16])
})

t.test('PoSE: chunks', async (t) => {
  const pose = { length: 100, chunks: 2 }
  const [context, start, room] = [10, 50, 40]
  const gaps = new Map<number, number>()
  const skips = new Map<number, number>()
  const splits = new Map<number, number>()
  const count = (map: Map<number, number>, key: number): unknown => map.set(key, (map.get(key) ?? 0) + 1)
  const runs = 20000
  for (let window = 0; window < runs; window++) {
    const [first, second, ...more] = chunksOf(pose, context, { start, room }, 7, 0, window)
    if (more.length > 0 || first!.at !== 0 || first!.token !== start || first!.position !== 0) throw new Error('first')
    if (second!.at !== first!.length || first!.length + second!.length !== context) throw new Error('not a window')
    count(splits, first!.length)
    count(gaps, second!.token - start - first!.length)
    count(skips, second!.position - first!.length)
  }
  // As the authors draw them: split 1 .. (n + 1) / 2, text left out 0 .. room - n, positions 0 .. length - n, all uniform.
  for (const [map, size] of [
    [splits, 5],
    [gaps, 31],
    [skips, 91],
  ] as const) {
    const least = map === splits ? 1 : 0
    t.strictSame(Math.min(...map.keys()), least)
    t.strictSame(Math.max(...map.keys()), least + size - 1)
    const expected = runs / size
    const chi = Array.from({ length: size }, (_, i) => ((map.get(i + least) ?? 0) - expected) ** 2 / expected)
    const sum = chi.reduce((a, b) => a + b)
    t.ok(sum < size - 1 + 5 * Math.sqrt(2 * size), `${size} equally likely: chi-square ${sum}`)
  }
  for (const [chunks, context, length, room] of [
    [3, 10, 11, 1000],
    [10, 10, 50, 30],
    [7, 10, 10, 5],
    [2, 2, 3, 3],
    [2, 3, 1e9, 4e9],
  ] as const) {
    for (let window = 0; window < 500; window++) {
      const parts = chunksOf({ length, chunks }, context, { start: 20, room }, 1, 2, window)
      let [at, token, position] = [0, 20, 0]
      for (const part of parts) {
        const inOrder = part.at === at && part.token >= token && part.position >= position && part.length >= 1
        if (!inOrder) throw new Error(`out of order: ${JSON.stringify(parts)}`)
        at += part.length
        token = part.token + part.length
        position = part.position + part.length
      }
      if (parts.length !== chunks || at !== context || position > length) throw new Error(JSON.stringify(parts))
      if (token > 20 + Math.max(room, context)) throw new Error(`leaves its document: ${JSON.stringify(parts)}`)
    }
  }
  t.strictSame(chunksOf(pose, 10, { start, room }, 7, 3, 4), chunksOf(pose, 10, { start, room }, 7, 3, 4))
  const others = [chunksOf(pose, 10, { start, room }, 8, 3, 4), chunksOf(pose, 10, { start, room }, 7, 4, 3)]
  for (const other of others) t.notSame(other, chunksOf(pose, 10, { start, room }, 7, 3, 4))
})

t.test('PoSE: windows', async (t) => {
  // Every token says where it is: documents of 3 to 120 characters, all different.
  const texts = [90, 3, 120, 7, 60].map((size, d) =>
    String.fromCodePoint(...Array.from({ length: size }, (_, i) => 0x1000 * (d + 1) + i)),
  )
  const stream = texts.flatMap((text) => [BOS, ...Array.from(text, (c) => c.codePointAt(0)!), EOS])
  const context = 8
  const pose = { length: 64, chunks: 2 }
  const data = [file(texts)]
  const loader = await open({ data, context, pose })
  const plain = await open({ data, context })
  t.not(loader.hash, plain.hash)
  t.strictSame(loader.size, plain.size)
  const samples: { row: number[]; positions: number[] }[] = []
  const cursors: DataCursor[] = [start]
  const windows = loader.size.windows
  for (let i = 0; i < 3 * windows; i++) {
    const { sample, cursor } = await loader.next(cursors.at(-1)!, 1)
    t.strictSame(Object.keys(sample.options), ['positions'], 'labels are the tokens, over the gap too')
    const { data: positions } = sample.options.positions as { data: Int32Array }
    samples.push({ row: rowsOf(sample)[0]!, positions: [...positions] })
    cursors.push(cursor)
  }
  let skipped = 0
  for (const { row, positions } of samples) {
    const known = row.filter((id) => id > EOS)
    const places = known.map((id) => stream.indexOf(id))
    t.ok(
      places.every((place, i) => i === 0 || place > places[i - 1]!),
      'no token twice, none out of order',
    )
    t.equal(positions[0], 0)
    t.ok(positions.every((position, i) => i === 0 || position > positions[i - 1]!) && positions.at(-1)! < 64)
    t.ok(positions.filter((position, i) => i > 0 && position !== positions[i - 1]! + 1).length <= 1, 'one gap at most')
    // A window that leaves its document is the stream as it is: nothing is left out between documents.
    const from = places[0]! - row.indexOf(known[0]!)
    const whole = stream.slice(from, from + context).join() === row.join()
    const documents = new Set(known.map((id) => id >> 12))
    t.ok(whole || documents.size === 1, row.join())
    if (!whole) skipped++
  }
  t.ok(skipped > windows, `${skipped} windows leave text out`)
  t.notSame(samples.slice(0, windows).sort(), samples.slice(windows, 2 * windows).sort(), 'drawn anew in every epoch')
  // From any cursor on, in rows of any number, the same.
  const again = await open({ data, context, pose })
  const { sample } = await again.next(cursors[windows - 2]!, 4)
  t.strictSame(
    rowsOf(sample),
    samples.slice(windows - 2, windows + 2).map(({ row }) => row),
  )
  t.strictSame(
    [...(sample.options.positions as { data: Int32Array }).data],
    samples.slice(windows - 2, windows + 2).flatMap(({ positions }) => positions),
  )
  const other = await open({ data, context, pose, seed: 1 })
  t.notSame((await other.next(start, 4)).sample, (await again.next(start, 4)).sample)

  // Files of validation are read as they are.
  const held = await open({ data, context, pose, validation: data })
  for await (const { sample } of held.validation(2)) t.strictSame(sample.options, {})
})
