import { execFileSync } from 'node:child_process'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { readDocuments } from '../../lib/files/text.js'
import { ThriftReader } from '../../lib/files/thrift.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-text-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

function file(name: string, content: string | Uint8Array): string {
  const path = join(dir, name)
  fs.mkdirSync(join(path, '..'), { recursive: true })
  fs.writeFileSync(path, content)
  return path
}

const all = async (paths: string[], options?: { field?: string }) => {
  const found: { text: string; source: string }[] = []
  for await (const document of readDocuments(paths, options)) found.push(document)
  return found
}
const texts = async (path: string, field?: string) => (await all([path], { field })).map(({ text }) => text)

t.test('text and JSON Lines', async (t) => {
  const plain = file('a.txt', '\ufeffA text\nof two lines — é😀\n')
  t.strictSame(await all([plain]), [{ text: 'A text\nof two lines — é😀\n', source: plain }])
  const lines = file('b.jsonl', '{"text":"one","n":1}\r\n\n{"text":"","x":NaN}\n  \n{"text":"t\\u00e9\\n"}')
  t.strictSame(await all([lines]), [
    { text: 'one', source: `${lines}:1` },
    { text: '', source: `${lines}:3` },
    { text: 'té\n', source: `${lines}:5` },
  ])
  t.strictSame(await texts(file('c.NDJSON', '{"body":"x"}\n'), 'body'), ['x'])
  // lines and characters over the reader's pieces of 1 MiB
  const long = 'é漢😀'.repeat(200_000)
  const rows = Array.from({ length: 7 }, (_, i) => `${i}${long}`)
  const big = file('big.jsonl', rows.map((text) => JSON.stringify({ text })).join('\n'))
  t.ok((await texts(big)).every((text, i) => text === rows[i]))
})

t.test('folders: recursive, sorted, only what is known', async (t) => {
  for (const name of ['d/2.txt', 'd/10.txt', 'd/sub/a.jsonl', 'd/sub/z.txt', 'd/.hidden', 'd/notes.md', 'd/x.json']) {
    file(name, name.endsWith('.jsonl') ? '{"text":"line"}' : name)
  }
  t.strictSame(await texts(join(dir, 'd')), ['d/10.txt', 'd/2.txt', 'line', 'd/sub/z.txt'])
  fs.mkdirSync(join(dir, 'empty'))
  await t.rejects(all([join(dir, 'empty')]), {
    code: 'ERR_EMPTY',
    message: /empty: no document in this folder: files that end in \.txt/,
  })
})

t.test('a file that is named twice is refused, in whatever way', async (t) => {
  const [one, two] = [file('twice/1.txt', 'one'), file('twice/2.txt', 'two')]
  for (const paths of [
    [one, one],
    [one, two, join(dir, 'twice', '..', 'twice') + '/./1.txt'],
    [join(dir, 'twice'), two],
    [two, join(dir, 'twice')],
  ]) {
    await t.rejects(all(paths), {
      name: 'RangeError',
      message: /[12]\.txt: given twice, .* count twice\. Name it once/,
    })
  }
  t.equal((await all([two, one])).length, 2)
})

t.test('what is wrong is named', async (t) => {
  const cases: [string, string | Uint8Array, any][] = [
    ['e.txt', '', { code: 'ERR_EMPTY', message: /e\.txt: the file is empty/ }],
    ['e.jsonl', '\n \n', { code: 'ERR_EMPTY', message: /e\.jsonl: no line with a document/ }],
    ['bin.txt', 'ab\0c', { code: 'ERR_BINARY', message: /bin\.txt: a NUL byte at offset 2/ }],
    ['utf16.txt', Buffer.from('\ufeffhi', 'utf16le'), { code: 'ERR_BINARY', message: /UTF-16/ }],
    [
      'latin.txt',
      Buffer.from([0x61, 0xe9, 0x62]),
      { code: 'ERR_UTF8', message: /latin\.txt: byte 1 \(0xe9\) is not valid UTF-8.*convert/ },
    ],
    [
      'latin.jsonl',
      Buffer.concat([Buffer.from('{"text":"a"}\n{"text":"'), Buffer.from([0xe9]), Buffer.from('"}')]),
      { code: 'ERR_UTF8', message: /latin\.jsonl:2: byte 9/ },
    ],
    [
      'f.jsonl',
      '{"text":"a"}\n{"txet":"b","id":1}',
      { code: 'ERR_FIELD', message: /f\.jsonl:2: no field "text"; there are "txet", "id"; did you mean "txet"/ },
    ],
    ['g.jsonl', '{}', { code: 'ERR_FIELD', message: /there are none/ }],
    ['n.jsonl', '{"text":null}', { code: 'ERR_FIELD', message: /n\.jsonl:1: "text" is null, but it must be a string/ }],
    ['l.jsonl', '{"text":["a"]}', { code: 'ERR_FIELD', message: /"text" is \["a"\]/ }],
    ['p.jsonl', '{"__proto__":{"text":"x"}}', { code: 'ERR_FIELD', message: /no field "text"/ }],
    ['j.jsonl', '{"text":"a"}\n{"text":"b"\n', { code: 'ERR_JSON', message: /j\.jsonl:2: byte 11.*truncated/ }],
    ['k.jsonl', '{"text":"a","text":"b"}', { code: 'ERR_JSON', message: /"text" stands twice/ }],
    ['m.jsonl', '["a"]', { code: 'ERR_FORMAT', message: /m\.jsonl:1: \["a"\], but a line must be an object/ }],
    [
      'x.json',
      '[{"text":"a"}]',
      { code: 'ERR_FORMAT', message: /"\.json" is not a document format: write one object a line.*jq/ },
    ],
    ['x.text', 'a', { code: 'ERR_FORMAT', message: /"\.text".*did you mean "\.txt"/ }],
    ['x.csv', 'a,b', { code: 'ERR_FORMAT', message: /"\.csv" is not a document format/ }],
    ['image.png', Uint8Array.of(0x89, 0x50, 0, 1), { code: /ERR_(FORMAT|UTF8|BINARY)/ }],
    [
      'r.parquet',
      'no parquet file',
      { code: 'ERR_PARQUET', message: /r\.parquet: footer: the file ends in "file", not "PAR1"/ },
    ],
  ]
  for (const [name, content, expected] of cases) await t.rejects(all([file(name, content)]), expected, name)
  await t.rejects(all([join(dir, 'nowhere.txt')]), { code: 'ERR_NOT_FOUND', message: /nowhere\.txt: does not exist/ })
  await t.rejects(all(['/dev/null']), { code: 'ERR_NOT_A_FILE' })
  const fifo = join(dir, 'fifo.txt')
  execFileSync('mkfifo', [fifo])
  await t.rejects(all([fifo]), { code: 'ERR_NOT_A_FILE' })
  await t.rejects(all([]), TypeError)
  await t.rejects(all('a.txt' as never), TypeError)
  const first = await readDocuments([file('two.jsonl', '{"text":"a"}\nbroken')]).next()
  t.match(first, { value: { text: 'a' } }, 'documents before the bad line are given')
})

const golden = JSON.parse(fs.readFileSync(new URL('parquet.golden.json', import.meta.url), 'utf8'))

t.test("pyarrow's files: every codec, both page versions, dictionary and plain", async (t) => {
  for (const [name, base64] of Object.entries<string>(golden.files)) {
    const path = file('golden.parquet', Buffer.from(base64, 'base64'))
    if (name === 'delta') {
      await t.rejects(all([path]), { code: 'ERR_PARQUET', message: /column "text": encoding 7 is not supported/ })
      continue
    }
    const found: string[] = []
    const error = await (async () => {
      for await (const { text, source } of readDocuments([path])) found.push(`${source.split('#')[1]} ${text}`)
    })().catch((error) => error)
    t.strictSame(found, ['0 one', '1 zwei — é'], name)
    t.match(error, { code: 'ERR_FIELD', message: /golden\.parquet#2: "text" is null/ }, `${name}: a null is no text`)
  }
  const path = join(dir, 'golden.parquet')
  await t.rejects(all([path], { field: 'txt' }), {
    code: 'ERR_FIELD',
    message: /no column "txt"; there are "id", "text"; did you mean "text"/,
  })
  await t.rejects(all([path], { field: 'id' }), { code: 'ERR_FIELD', message: /column "id" does not hold texts/ })
})

/** hyparquet-writer's file; in a process of its own, as the loader of the tests cannot resolve that package. */
function write(name: string, options: object): string {
  const script = `import { parquetWriteBuffer } from 'hyparquet-writer'
    import { readFileSync } from 'node:fs'
    process.stdout.write(new Uint8Array(parquetWriteBuffer(JSON.parse(readFileSync(0, 'utf8')))))`
  const bytes = execFileSync(process.execPath, ['--input-type=module', '--eval', script], {
    input: JSON.stringify(options),
    cwd: fileURLToPath(new URL('../..', import.meta.url)),
    env: { ...process.env, NODE_OPTIONS: '' },
    maxBuffer: 1 << 28,
  })
  return file(name, bytes)
}

t.test('larger parquet files', async (t) => {
  const words = ['alpha', 'beta', 'gamma', 'δέλτα']
  const line = (i: number) => Array.from({ length: i % 97 }, (_, j) => words[(i * j) % 4]).join(' ')
  const data = Array.from({ length: 5000 }, (_, i) => line(i))
  const numbers = { name: 'n', data: data.map((_, i) => i) }
  for (const options of [
    { encoding: 'DELTA_LENGTH_BYTE_ARRAY' },
    { codec: 'UNCOMPRESSED' },
    { rowGroupSize: 700, pageSize: 5000 },
  ]) {
    const { encoding, ...more } = { encoding: undefined, ...options }
    const columnData = [numbers, { name: 'text', data, type: 'STRING', encoding }]
    t.strictSame(await texts(write('large.parquet', { columnData, ...more })), data, JSON.stringify(options))
  }
  const column = (data: string[]) => ({ columnData: [{ name: 'text', data, type: 'STRING' }] })
  await t.rejects(texts(write('none.parquet', column([]))), { code: 'ERR_EMPTY', message: /no row/ })
  const nul = write('nul.parquet', column(['ok', 'a\0b']))
  await t.rejects(texts(nul), { code: 'ERR_BINARY', message: /nul\.parquet#1: a NUL byte/ })
})

t.test('forged parquet: no count is believed', async (t) => {
  const bytes = Buffer.from(golden.files['NONE v1.0 plain'], 'base64')
  const before = process.memoryUsage().rss
  // every byte set to values that make counts, lengths and offsets wild
  let refused = 0
  const messages = new Set<string>()
  for (const name of [
    'NONE v1.0 plain',
    'NONE v2.0 dictionary',
    'SNAPPY v1.0 dictionary',
    'ZSTD v2.0 plain',
    'GZIP v1.0 plain',
    'delta length',
  ]) {
    const original = Buffer.from(golden.files[name], 'base64')
    for (let at = 4; at < original.length; at++) {
      const value = [0xff, 0x80, 0x7e][at % 3]
      const forged = Buffer.from(original)
      forged[at] = value
      const error = await all([file('forged.parquet', forged)]).then(
        () => undefined,
        (error) => error,
      )
      if (error === undefined) continue
      refused++
      messages.add(error.message)
      if (error.name !== 'RopewalkError') t.fail(`${name}, byte ${at} = ${value}: ${error.stack}`)
    }
  }
  t.ok(refused > 500)
  for (const guard of [
    /values, but the row group has 4 rows/,
    /a page of \d+ values, but \d are left/,
    /the file has \d+/,
  ]) {
    t.ok(
      [...messages].some((message) => guard.test(message)),
      `some of them by ${guard}`,
    )
  }
  const grown = (process.memoryUsage().rss - before) / 2 ** 20
  t.ok(grown < 600, `${grown.toFixed(0)} MiB more after ${refused} refusals`)

  const footer = (edit: (length: Buffer) => void) => {
    const forged = Buffer.from(bytes)
    edit(forged.subarray(forged.length - 8))
    return forged
  }
  const cases: [string, Uint8Array, RegExp][] = [
    ['nothing', bytes.subarray(0, 8), /8 bytes, but a parquet file has at least 12/],
    [
      'a footer longer than the file',
      footer((tail) => tail.writeUInt32LE(0xffffffff)),
      /4294967295 bytes, but the file has/,
    ],
    ['an encrypted footer', footer((tail) => tail.write('PARE', 4)), /encrypted/],
    [
      'cut in the middle',
      Buffer.concat([bytes.subarray(0, 60), bytes.subarray(bytes.length - 200)]),
      /row group 0|footer|schema/,
    ],
  ]
  for (const [name, forged, message] of cases) {
    await t.rejects(all([file('forged.parquet', forged)]), { code: 'ERR_PARQUET', message }, name)
  }
  // bombs: both counts of 4 become 2^30 (which two bytes of the footer they are is found by trying)
  const huge = [0x80, 0x80, 0x80, 0x80, 0x08]
  const start = bytes.length - 8 - bytes.readUInt32LE(bytes.length - 8)
  const fours = [...bytes.keys()].filter((at) => at >= start && bytes[at] === 8)
  const bombs: string[] = []
  for (const a of fours) {
    for (const b of fours.filter((b) => b > a)) {
      const end = bytes.subarray(b + 1, -8)
      const footer = [...bytes.subarray(start, a), ...huge, ...bytes.subarray(a + 1, b), ...huge, ...end]
      const forged = Buffer.from([...bytes.subarray(0, start), ...footer, 0, 0, 0, 0, ...Buffer.from('PAR1')])
      forged.writeUInt32LE(footer.length, forged.length - 8)
      await all([file('forged.parquet', forged)]).catch((error) => bombs.push(error.message))
    }
  }
  t.ok(bombs.some((message) => /column "text": 1073741824 values cannot come from \d+ bytes/.test(message)))
  // a page header (type 0) that claims 2^29 bytes of a few
  const page = /\x15\x00\x15.\x15.\x2c/gs
  const header = [...bytes.toString('latin1').matchAll(page)].map((match) => match.index)[1]
  const claim = Buffer.from([
    ...bytes.subarray(0, header + 3),
    0x80,
    0x80,
    0x80,
    0x80,
    0x04,
    ...bytes.subarray(header + 4),
  ])
  const claiming = Buffer.concat([claim.subarray(0, start), bytes.subarray(start)])
  await t.rejects(all([file('forged.parquet', claiming)]), { message: /a page of 536870912 bytes cannot come from/ })
  // a footer of nothing but continuation bytes must not be quadratic, nor a list of claimed length allocate
  const hostile: [number[], RegExp][] = [
    [[0x16, ...Array<number>(5000).fill(0xff)], /more than 64 bits/],
    [[0x19, 0xfc, 0xff, 0xff, 0xff, 0xff, 0x07], /a list of 2147483647 elements/],
    [Array<number>(200).fill(0x1c), /nested deeper than 16/],
    [[0x18, 0xff, 0xff, 0xff, 0xff, 0x07], /bytes at byte/],
    [[0x1b], /unknown thrift type 11/],
    [[0x15], /the data ends at byte 1/],
  ]
  for (const [data, message] of hostile) t.throws(() => new ThriftReader(Uint8Array.from(data)).struct(), message)
})

t.test('any text that is named itself is one document', async (t) => {
  for (const name of ['README.md', 'LICENSE', 'constructor']) {
    const path = file(name, 'a text')
    const found = []
    for await (const document of readDocuments([path])) found.push(document)
    t.strictSame(found, [{ text: 'a text', source: path }])
  }
})
