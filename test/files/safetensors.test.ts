import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { openSafetensors, tensorBytes, type TensorEntry, writeSafetensors } from '../../lib/files/safetensors.js'

const fixtures = fileURLToPath(new URL('../fixtures/', import.meta.url))
const dir = mkdtempSync(join(tmpdir(), 'ropewalk-safetensors-'))
t.teardown(() => rmSync(dir, { recursive: true }))

let serial = 0
function file(bytes: Uint8Array): string {
  const path = join(dir, `bad-${serial++}.safetensors`)
  writeFileSync(path, bytes)
  return path
}

/** A file of a header text (or bytes) and `data` zero bytes; `length` overrides the header length. */
function make(header: string | Uint8Array, data = 0, length?: bigint): Uint8Array {
  const text = Buffer.from(header as string)
  const start = Buffer.alloc(8)
  start.writeBigUInt64LE(length ?? BigInt(text.length))
  return Buffer.concat([start, text, Buffer.alloc(data)])
}

const tensor = (dtype: string, shape: unknown, offsets: unknown) => ({ dtype, shape, data_offsets: offsets })
const one = (entry: unknown, data = 4) => make(JSON.stringify({ w: entry }), data)
const two = (a: number[], b: number[], data: number) =>
  make(JSON.stringify({ a: tensor('F32', [1], a), b: tensor('F32', [1], b) }), data)

t.test('valid files', async (t) => {
  const good: [string, Uint8Array, number][] = [
    ['no tensors', make('{}'), 0],
    ['padded with spaces', make('{}      '), 0],
    [
      'leading and trailing whitespace',
      make(' \t\r\n{"w":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}}\n ', 16),
      1,
    ],
    ['metadata only', make('{"__metadata__":{"framework":"pt"}}'), 0],
    ['a scalar', one(tensor('F32', [], [0, 4])), 1],
    ['an empty tensor', one(tensor('F32', [2, 0], [0, 0]), 0), 1],
    [
      'empty tensors between others',
      make(
        JSON.stringify({ a: tensor('F32', [1], [0, 4]), e: tensor('U8', [0], [4, 4]), b: tensor('U8', [1], [4, 5]) }),
        5,
      ),
      3,
    ],
    ['any order in the header', two([4, 8], [0, 4], 8), 2],
    ['a name of an object property', make('{"__proto__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1), 1],
    ['F4 in pairs', one(tensor('F4', [8], [0, 4])), 1],
    ['the 2^63 product of a zero', one(tensor('F32', [0, 4294967296, 2], [0, 0]), 0), 1],
    // 640 = 0x280: the same first bytes as a pickle, but a length that fits
    ['a length that looks like pickle', make(`{}${' '.repeat(638)}`), 0],
  ]
  for (const [name, bytes, count] of good) {
    const opened = await openSafetensors(file(bytes))
    t.equal(opened.tensors.size, count, name)
    await opened.close()
  }
})

t.test('bad files: each is refused with file, tensor, rule and numbers', async (t) => {
  const big = Number.MAX_SAFE_INTEGER
  const attack = Object.fromEntries(
    Array.from({ length: 10 }, (_, i) => [`weight_${i}`, tensor('F32', [2, 2], [0, 16])]),
  )
  const bad: [string, Uint8Array, RegExp][] = [
    // the classes of the reference's own tests
    [
      'json attack: ten tensors on one range',
      make(JSON.stringify(attack), 16),
      /tensor "weight_\d": begins at 0.*"weight_\d", ends at 16: they overlap/,
    ],
    [
      'incomplete buffer: trailing bytes',
      one(tensor('F32', [1], [0, 4]), 6),
      /"w", ends at byte 66, but the file has 68: 2 bytes belong to no tensor/,
    ],
    [
      'incomplete buffer: two bytes short',
      one(tensor('F32', [1], [0, 4]), 2),
      /"w", ends at byte 66, but the file has 64: the file is truncated/,
    ],
    ['header too large', make('{}', 0, 100000001n), /header length 100000001, but the limit is 100000000/],
    ['header far too large', make('{}', 0, 0xffffffffffffffffn), /header length 18446744073709551615, but the limit/],
    ['header too small: empty file', new Uint8Array(0), /the file has 0 bytes, but the header length alone takes 8/],
    ['header too small: 7 bytes', new Uint8Array(7), /the file has 7 bytes/],
    [
      'invalid header length',
      make('{', 0, 60n),
      /header length 60 \+ 8 is more than the file's 9 bytes: the file is truncated/,
    ],
    ['invalid header length by one', make('{}', 0, 3n), /header length 3 \+ 8 is more than the file's 10 bytes/],
    ['invalid header: not UTF-8', make(new Uint8Array([0xff]), 0), /byte 0 \(0xff\) is not valid UTF-8/],
    ['invalid header: not JSON', make('{'), /line 1, byte 1.*truncated/],
    ['invalid header: empty', make(''), /a value is expected, not the end of the file/],
    ['whitespace only', make('    '), /a value is expected/],
    ['no-break space first', make('\u00a0{}'), /a value is expected, not "\u00a0"/],
    ['NUL padding', make('{}\0\0\0\0\0\0'), /after the end/],
    [
      'zero sized with bytes',
      one(tensor('F32', [2, 0], [0, 4])),
      /tensor "w": data_offsets \[0, 4\] hold 4 bytes, but F32 of shape \[2,0\] takes 0/,
    ],
    [
      'invalid info: too few bytes',
      one(tensor('F32', [2, 2], [0, 4])),
      /hold 4 bytes, but F32 of shape \[2,2\] takes 16/,
    ],
    ['overflow of the shape', one(tensor('F32', [2, 1.8446744073709552e19], [0, 4])), /line 1.*beyond 2\^53/],
    [
      'overflow of the product',
      one(tensor('F32', [big, 2], [0, 4])),
      /tensor "w": shape \[9007199254740991,2\]: the product is beyond 2\^53/,
    ],
    [
      'overflow of the bytes',
      one(tensor('F64', [big], [0, 4])),
      /tensor "w": shape \[9007199254740991\] of F64: the size is beyond 2\^53 bits/,
    ],
    [
      'sub-byte misaligned',
      one(tensor('F4', [3], [0, 2]), 2),
      /tensor "w": shape \[3\] of F4: 12 bits are not a whole number of bytes/,
    ],
    ['F6 misaligned', one(tensor('F6_E2M3', [2], [0, 2]), 2), /12 bits/],
    // ours
    [
      'duplicate tensor',
      make(
        '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
      ),
      /the key "w" stands twice/,
    ],
    [
      'duplicate tensor behind an escape',
      make(
        '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0077":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
      ),
      /the key "w" stands twice/,
    ],
    [
      'duplicate field',
      make('{"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
      /at "w": the key "dtype" stands twice/,
    ],
    ['duplicate metadata block', make('{"__metadata__":{},"__metadata__":{}}'), /"__metadata__" stands twice/],
    ['duplicate metadata key', make('{"__metadata__":{"a":"1","a":"2"}}'), /"a" stands twice/],
    [
      'first tensor not at 0',
      one(tensor('F32', [1], [4, 8]), 8),
      /tensor "w": begins at 4, but the data begins at 0: 4 bytes belong to no tensor/,
    ],
    [
      'a hole',
      two([0, 4], [8, 12], 12),
      /tensor "b": begins at 8, but the tensor before it, "a", ends at 4: 4 bytes belong/,
    ],
    [
      'an overlap',
      two([0, 4], [2, 6], 6),
      /tensor "b": begins at 2, but the tensor before it, "a", ends at 4: they overlap/,
    ],
    ['two tensors on the same bytes', two([0, 4], [0, 4], 4), /tensor "b": begins at 0.*they overlap/],
    [
      'end before begin',
      one(tensor('F32', [1], [4, 0])),
      /tensor "w": data_offsets \[4, 0\]: the end lies before the begin/,
    ],
    ['too many bytes', one(tensor('F32', [1], [0, 8]), 8), /hold 8 bytes, but F32 of shape \[1\] takes 4/],
    ['dtype of another size', one(tensor('BF16', [1], [0, 4])), /hold 4 bytes, but BF16 of shape \[1\] takes 2/],
    ['unknown dtype', one(tensor('FP32', [1], [0, 4])), /tensor "w": dtype "FP32" is not one of .*did you mean "F32"/],
    ['lower-case dtype', one(tensor('f32', [1], [0, 4])), /dtype "f32".*did you mean "F32"/],
    ['dtype of a prototype', one(tensor('constructor', [1], [0, 4])), /dtype "constructor"/],
    ['dtype a number', one({ dtype: 4, shape: [1], data_offsets: [0, 4] }), /dtype 4 is not one of/],
    ['no dtype', one({ shape: [1], data_offsets: [0, 4] }), /tensor "w": the field "dtype" is missing/],
    ['no shape', one({ dtype: 'F32', data_offsets: [0, 4] }), /tensor "w": the field "shape" is missing/],
    ['no offsets', one({ dtype: 'F32', shape: [1] }), /tensor "w": the field "data_offsets" is missing/],
    ['unknown field', one({ ...tensor('F32', [1], [0, 4]), offset: 0 }), /tensor "w": unknown field "offset"/],
    [
      'misspelt field',
      one({ dtype: 'F32', shape: [1], data_ofsets: [0, 4] }),
      /"data_ofsets"; did you mean "data_offsets"/,
    ],
    ['shape a number', one(tensor('F32', 1, [0, 4])), /tensor "w": shape 1, but it must be a list/],
    ['shape null', one(tensor('F32', null, [0, 4])), /tensor "w": shape null/],
    ['shape negative', one(tensor('F32', [-1], [0, 4])), /shape \[-1\]: -1 is not a whole number of at least 0/],
    ['shape twice negative', one(tensor('F32', [-1, -1], [0, 4])), /-1 is not a whole number/],
    ['shape a fraction', one(tensor('F32', [0.5, 2], [0, 4])), /0\.5 is not a whole number/],
    ['shape a string', one(tensor('F32', ['1'], [0, 4])), /"1" is not a whole number/],
    ['shape of booleans', one(tensor('F32', [true], [0, 4])), /true is not a whole number/],
    ['shape nested', one(tensor('F32', [[1]], [0, 4])), /\[1\] is not a whole number/],
    ['shape minus zero', make('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), /not a whole number/],
    ['shape NaN', make('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4), /NaN is not JSON/],
    ['offsets one number', one(tensor('F32', [1], [0])), /data_offsets \[0\], but it must be \[begin, end\]/],
    [
      'offsets three numbers',
      one(tensor('F32', [1], [0, 4, 8])),
      /data_offsets \[0,4,8\], but it must be \[begin, end\]/,
    ],
    ['offsets empty', one(tensor('F32', [1], [])), /data_offsets \[\], but it must be \[begin, end\]/],
    ['offsets negative', one(tensor('F32', [1], [-4, 0])), /-4 is not a whole number/],
    ['offsets fractional', one(tensor('F32', [1], [0.5, 4.5])), /0\.5 is not a whole number/],
    ['offsets strings', one(tensor('F32', [1], ['0', '4'])), /"0" is not a whole number/],
    [
      'offsets beyond 2^53',
      make('{"w":{"dtype":"U8","shape":[1],"data_offsets":[9007199254740993,9007199254740994]}}', 1),
      /beyond 2\^53/,
    ],
    ['offsets beyond the file', one(tensor('U8', [big], [0, big])), /beyond 2\^53 bits|truncated/],
    [
      'offsets 2^40 beyond the file',
      one(tensor('U8', [2 ** 40], [0, 2 ** 40])),
      /ends at byte 1099511627\d+, but the file has \d+: the file is truncated/,
    ],
    ['offsets an object', one(tensor('F32', [1], { 0: 0, 1: 4 })), /data_offsets .* must be a list/],
    ['entry a list', one([1, 2]), /tensor "w": \[1,2\], but it must be an object/],
    ['entry null', one(null), /tensor "w": null, but it must be an object/],
    ['entry a string', one('F32'), /tensor "w": "F32"/],
    ['header a list', make('[]'), /the header is not a JSON object/],
    ['header a string', make('"{}"'), /the header is not a JSON object/],
    ['header a number', make('12'), /the header is not a JSON object/],
    [
      'header with a comma too many',
      make('{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},}'),
      /a key "\.\.\." is expected/,
    ],
    ['header with a comment', make('{/* */}'), /a key/],
    ['header with a byte order mark', make('\ufeff{}'), /byte order mark/],
    ['second document', make('{}{}'), /after the end/],
    ['deep nesting', make(`{"w":${'['.repeat(100000)}`), /nested deeper than 8/],
    ['lone surrogate in a name', make('{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), /lone surrogate/],
    [
      'control character in a name',
      make('{"a\u0001":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
      /control character 0x01/,
    ],
    [
      'UTF-8 overlong',
      make(new Uint8Array([0x7b, 0x22, 0xc0, 0x80, 0x22, 0x7d])),
      /byte 2 \(0xc0\) is not valid UTF-8/,
    ],
    ['metadata a string', make('{"__metadata__":"pt"}'), /__metadata__: "pt", but it must be an object/],
    ['metadata of numbers', make('{"__metadata__":{"step":1}}'), /__metadata__: "step" is 1, but it must be a string/],
    ['metadata null', make('{"__metadata__":null}'), /__metadata__: null/],
    ['metadata nested', make('{"__metadata__":{"a":{}}}'), /__metadata__: "a" is \{\}/],
    ['metadata a list', make('{"__metadata__":[]}'), /__metadata__: \[\]/],
    [
      'bytes without tensors',
      make('{}', 4),
      /the header without tensors ends at byte 10, but the file has 14: 4 bytes/,
    ],
    [
      'a zip behind the data (polyglot)',
      Buffer.concat([one(tensor('F32', [1], [0, 4])), Buffer.from('PK\x03\x04evil')]),
      /8 bytes belong to no tensor/,
    ],
    [
      'a pickle',
      Buffer.concat([Buffer.from([0x80, 0x02]), Buffer.from('ccollections\nOrderedDict\n')]),
      /PyTorch pickle file.*Convert it once/,
    ],
    ['a zip of pickles', Buffer.from('PK\x03\x04\x14\x00\x00\x00\x08\x00archive/data.pkl'), /PyTorch pickle file/],
    [
      'a Git LFS pointer',
      Buffer.from('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 100\n'),
      /Git LFS pointer.*git lfs pull/,
    ],
    ['an HTML page', Buffer.from('<!doctype html><html>Access denied</html>'), /an HTML page/],
    ['a GGUF file', Buffer.from('GGUF\x03\x00\x00\x00\xff\xff\xff\xff'), /a GGUF file/],
    ['random bytes', Buffer.from('9f3c7e21aa55d1e800112233', 'hex'), /header length \d+, but the limit/],
  ]
  t.ok(bad.length >= 82, `${bad.length} classes`)
  for (const [name, bytes, message] of bad) {
    const path = file(bytes)
    const error: Error = await openSafetensors(path).then(
      () => new Error('accepted'),
      (error) => error,
    )
    t.match(error.message, message, name)
    t.ok(error.message.startsWith(path), `${name}: the file is named`)
    t.match(error, { name: 'RopewalkError', code: /^ERR_/ }, name)
  }
})

t.test('a header beyond the limit is refused unread, also where the file is long enough for it', async (t) => {
  const path = file(make('{}', 0, 100000001n))
  truncateSync(path, 100000009)
  await t.rejects(openSafetensors(path), /header length 100000001, but the limit is 100000000/)
  rmSync(path)
})

t.test('every truncation and every extension of a real file is refused', async (t) => {
  const bytes = readFileSync(join(fixtures, 'mha-f32', 'model.safetensors'))
  for (let i = 0; i < 60; i++) {
    const cut = i < 20 ? i : Math.floor((bytes.length * (i - 19)) / 41)
    await t.rejects(openSafetensors(file(bytes.subarray(0, Math.min(cut, bytes.length - 1)))), {
      name: 'RopewalkError',
    })
  }
  await t.rejects(openSafetensors(file(Buffer.concat([bytes, Buffer.alloc(1)]))), /1 bytes belong to no tensor/)
})

t.test('no single bit of a header can change a tensor unseen', async (t) => {
  const original = one(tensor('F32', [3, 5], [0, 60]), 60)
  let accepted = 0
  for (let bit = 0; bit < (original.length - 60) * 8; bit++) {
    const bytes = Buffer.from(original)
    bytes[bit >> 3] ^= 1 << (bit & 7)
    const path = file(bytes)
    const opened = await openSafetensors(path).catch((error) => {
      if (error.name !== 'RopewalkError') t.fail(`bit ${bit}: ${error.stack}`)
      return undefined
    })
    rmSync(path)
    if (opened === undefined) continue
    accepted++
    for (const { dtype, dims, bytes } of opened.tensors.values()) t.equal(tensorBytes(dtype, dims), bytes)
    await opened.close()
  }
  t.ok(accepted < 40, `${accepted} accepted: another name, another 32-bit type`)
})

t.test('what is no file', async (t) => {
  await t.rejects(openSafetensors(join(dir, 'none.safetensors')), {
    code: 'ERR_NOT_FOUND',
    message: /none\.safetensors: does not exist/,
  })
  await t.rejects(openSafetensors(dir), { code: 'ERR_NOT_A_FILE' })
  await t.rejects(openSafetensors('/dev/zero'), { code: 'ERR_NOT_A_FILE' })
  const fifo = join(dir, 'fifo')
  execFileSync('mkfifo', [fifo])
  await t.rejects(
    openSafetensors(fifo),
    { code: 'ERR_NOT_A_FILE', message: /fifo: not a regular file/ },
    'and does not hang',
  )
})

t.test("the reference writer's files are written again byte for byte", async (t) => {
  const found = readdirSync(fixtures, { recursive: true, encoding: 'utf8' }).filter((name) =>
    name.endsWith('.safetensors'),
  )
  t.ok(found.length >= 20)
  for (const name of found) {
    const source = await openSafetensors(join(fixtures, name))
    const entries = [...source.tensors.values()]
      .reverse()
      .map((info): TensorEntry => ({ ...info, data: () => source.read(info.name) }))
    const path = join(dir, 'again.safetensors')
    const { sha256, bytes } = await writeSafetensors(path, entries, source.metadata, { sync: true })
    const expected = readFileSync(join(fixtures, name))
    t.ok(readFileSync(path).equals(expected), name)
    t.equal(bytes, expected.length)
    t.equal(sha256, createHash('sha256').update(expected).digest('hex'))
    rmSync(path)
    await source.close()
  }
})

t.test('writing', async (t) => {
  const entry = (name: string, dtype: 'F32' | 'BF16' | 'U8', dims: number[], fill = 0): TensorEntry => {
    const bytes = tensorBytes(dtype, dims)
    return { name, dtype, dims, bytes, data: () => new Uint8Array(bytes).fill(fill) }
  }
  const path = join(dir, 'w.safetensors')
  async function* pieces() {
    yield new Uint8Array([1, 2, 3])
    yield new Uint8Array(0)
    yield new Uint8Array([4])
  }
  const odd = ['__proto__', '10', '9', 'b', 'a', 'é', '\u{1f600}', '\uffff']
  await writeSafetensors(path, [
    ...odd.map((name, i) => entry(name, 'U8', [1], i)),
    entry('half', 'BF16', [2], 7),
    { ...entry('stream', 'F32', [1]), data: pieces },
    entry('empty', 'F32', [0, 3]),
  ])
  const opened = await openSafetensors(path)
  t.strictSame(
    [...opened.tensors.keys()],
    ['empty', 'stream', 'half', '10', '9', '__proto__', 'a', 'b', 'é', '\uffff', '\u{1f600}'],
    'alignment first, then the bytes of the name (not UTF-16 order)',
  )
  t.strictSame([...(await opened.read('stream'))], [1, 2, 3, 4])
  t.strictSame([...(await opened.read('9'))], [2])
  t.equal((opened.tensors.get('half')?.offset ?? 1) % 8, 4)
  await t.rejects(opened.read('strem'), /no tensor "strem"; did you mean "stream"/)
  await opened.close()

  await t.rejects(writeSafetensors(path, []), /cannot be written \(EEXIST/, 'an existing file is not replaced')
  rmSync(path)
  const bad: [TensorEntry[], RegExp, [string, string][]?][] = [
    [[entry('a', 'U8', [1]), entry('a', 'U8', [1])], /tensor "a": this name is taken/],
    [[entry('__metadata__', 'U8', [1])], /this name is taken/],
    [[{ ...entry('a', 'U8', [1]), bytes: 2 }], /tensor "a": 2 bytes, but U8 of shape \[1\] takes 1/],
    [[{ ...entry('a', 'U8', [1]), dtype: 'U9' as never }], /dtype "U9"; did you mean "U8"/],
    [[{ ...entry('a', 'U8', [1]), dims: [-1] }], /-1 is not a dimension/],
    [[entry('\ud800', 'U8', [1])], /lone surrogate/],
    [[{ ...entry('a', 'F32', [1]), data: () => new Uint8Array(3) }], /data\(\) gave 3 bytes, not the announced 4/],
    [[{ ...entry('a', 'F32', [1]), data: () => new Uint8Array(5) }], /data\(\) gave 5 bytes, not the announced 4/],
    [[], /metadata "a": 1 is not a string/, [['a', 1 as never]]],
  ]
  for (const [entries, message, metadata] of bad) {
    await t.rejects(writeSafetensors(path, entries, metadata), message)
    t.notOk(existsSync(path), 'no half-written file is left')
  }
  const full = Object.assign(new Error('write'), { code: 'ENOSPC' })
  const failing: TensorEntry = {
    ...entry('a', 'F32', [1]),
    data: () => Promise.reject(full),
  }
  await t.rejects(writeSafetensors(path, [entry('b', 'F32', [9]), failing]), {
    code: 'ERR_NO_SPACE',
    message: /w\.safetensors: the disk is full: \d+ bytes are needed, \d+ bytes .*free/,
  })
  t.notOk(existsSync(path))
  await t.rejects(writeSafetensors(path, [entry('b', 'F32', [9])], [], { signal: AbortSignal.abort() }), {
    name: 'AbortError',
  })
  t.notOk(existsSync(path))
  const huge = Array.from({ length: 1000 }, (_, i) => [`${i}`, 'x'.repeat(100001)] as [string, string])
  await t.rejects(writeSafetensors(path, [], huge), /a header of .* readers take 100000000/)
})
