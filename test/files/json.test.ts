import { mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { cloneJson, type JsonObject, parseJson, readJsonObject, stringifyJson } from '../../lib/files/json.js'

const file = 'some/config.json'

t.test('valid documents parse as JSON.parse does', async (t) => {
  for (const text of [
    '{}',
    ' [ ] ',
    'null',
    'true',
    'false',
    '0',
    '-0',
    '-1.5e-3',
    '9007199254740991',
    '1E400'.replace('400', '300'),
    '"a"',
    '"\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\ud83d\\ude00é😀"',
    '{"a":[1,2,{"b":null}],"":{"":0},"x y":"z"}',
    '\t{\r\n"a" : 1 ,\n"b" : [ ] }\n',
    '[[[[[[[[1]]]]]]]]',
    '{"constructor":1,"toString":2,"hasOwnProperty":3}',
  ]) {
    const parsed = parseJson(new TextEncoder().encode(text), file)
    t.strictSame(JSON.parse(JSON.stringify(parsed)), JSON.parse(text), text)
  }
  const evil = parseJson('{"__proto__": {"polluted": true}, "a": 1}', file) as JsonObject
  t.equal(Object.getPrototypeOf(evil), null)
  t.strictSame(Object.keys(evil), ['__proto__', 'a'])
  t.notOk('polluted' in {}, 'no prototype was touched')
})

t.test('bad documents: file, line, byte and reason', async (t) => {
  const bad: [string, RegExp][] = [
    ['', /line 1, byte 0.*end of the file/],
    ['{', /byte 1.*a key.*truncated/],
    ['{"a"', /":" is expected after "a"/],
    ['{"a":', /byte 5 at "a": a value is expected, not the end of the file/],
    ['{"a":1', /"," or "}" is expected, not the end/],
    ['{"a":1,}', /a key "\.\.\." is expected, not "}"/],
    ['[1,]', /byte 3 at "\[1\]": a value is expected, not "\]"/],
    ['[1 2]', /"," or "\]" is expected, not "2"/],
    ['{"a":1}x', /"x" after the end/],
    ['{"a":1}\0', /after the end/],
    ['{"a":1,"b":2,\n"a":3}', /line 2, byte 14: the key "a" stands twice/],
    ['{"x":{"a":1,"\\u0061":3}}', /at "x": the key "a" stands twice/],
    ['{"__proto__":1,"__proto__":2}', /"__proto__" stands twice/],
    ['{a:1}', /a key "\.\.\." is expected, not "a"/],
    ["{'a':1}", /a key/],
    ['01', /leading zero/],
    ['[1.]', /"," or "\]" is expected, not "\."/],
    ['.5', /a value is expected, not "\."/],
    ['+1', /a value is expected, not "\+"/],
    ['-', /a value is expected, not "-"/],
    ['1e', /after the end/],
    ['9007199254740993', /"9007199254740993" is beyond 2\^53/],
    ['[18446744073709551616]', /beyond 2\^53/],
    ['1e999', /too large for a float64/],
    ['NaN', /NaN is not JSON/],
    ['{"a":{"b":[Infinity]}}', /at "a\.b\[0\]": Infinity is not JSON/],
    ['[-Infinity]', /-Infinity is not JSON/],
    ['"a\nb"', /control character 0x0a/],
    ['"\\x41"', /escape "\\\\x" does not exist/],
    ['"\\u00g1"', /four hexadecimal digits, not "00g1"/],
    ['"\\ud800"', /lone surrogate/],
    ['"abc', /ends inside a string/],
    ['"abc\\', /does not exist/],
    ['tru', /a value is expected, not "t"/],
    ['\ufeff{}', /byte order mark/],
    ['['.repeat(65) + ']'.repeat(65), /nested deeper than 64/],
    ['{"a":'.repeat(100000), /nested deeper than 64/],
    ['{"é":1,"é":1}', /byte 8: the key/],
  ]
  for (const [text, message] of bad) {
    t.throws(() => parseJson(text, file), { code: 'ERR_JSON', message }, JSON.stringify(text.slice(0, 40)))
    t.throws(() => parseJson(text, file), { message: /^some\/config\.json: line \d+, byte \d+/ })
  }
  const bytes = Buffer.concat([Buffer.from('{"\ufffd":"é'), Buffer.from([0xc3, 0x28]), Buffer.from('"}')])
  t.throws(() => parseJson(bytes, file), {
    code: 'ERR_UTF8',
    message: /config\.json: byte 10 \(0xc3\) is not valid UTF-8/,
  })
})

t.test("Python's numbers are read, kept and written back", async (t) => {
  const text = `{
  "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0,
  "list": [
    1.0,
    2,
    NaN
  ],
  "model_max_length": 1000000000000000019884624838656,
  "big": Infinity,
  "small": -Infinity,
  "none": null,
  "empty": {},
  "no": []
}`
  const value = parseJson(text, file, { python: true }) as JsonObject
  t.equal(value.rms_norm_eps, 1e-5)
  t.equal(value.model_max_length, 1e30)
  t.equal(value.big, Infinity)
  t.equal(stringifyJson(value), text, 'byte for byte')
  const copy = cloneJson(value)
  t.equal(stringifyJson(copy), text, 'a copy too')
  copy.rope_theta = 20000
  t.match(stringifyJson(copy), '"rope_theta": 20000,', 'a new value has a new spelling')
  t.match(stringifyJson(copy, { floats: new Set(['rope_theta']) }), '"rope_theta": 20000.0,')
  t.match(stringifyJson(value), '"rope_theta": 10000.0,', 'the original is not touched')
  ;(copy.list as number[])[0] = 7
  t.match(stringifyJson(copy), '    7,\n    2,\n    NaN')
  t.throws(() => stringifyJson({ a: Infinity }), /a: Infinity has no JSON spelling/)
  t.throws(() => stringifyJson({ a: () => 1 }), /a: a function/)
  t.equal(stringifyJson({ a: undefined, b: 1n, c: 'é\n' }, { indent: 0 }), '{"b":1,"c":"é\\n"}')
})

t.test('numbers are spelt as Python does', async (t) => {
  const spellings: [number, string][] = [
    [0.1, '0.1'],
    [1e-4, '0.0001'],
    [1e-5, '1e-05'],
    [1.5e-7, '1.5e-07'],
    [-1e-6, '-1e-06'],
    [107672.01541058847, '107672.01541058847'],
    [1e15, '1000000000000000'],
    [1e22, '1e+22'],
    [123456789012345680000, '1.2345678901234568e+20'],
    [-0, '-0.0'],
    [-2.5, '-2.5'],
    [5e-324, '5e-324'],
    [1.7976931348623157e308, '1.7976931348623157e+308'],
  ]
  for (const [value, text] of spellings) {
    t.equal(stringifyJson(value), text)
    t.ok(Object.is(Number(stringifyJson(value)), value), `${text} reads back`)
  }
})

t.test('reading files', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'ropewalk-json-'))
  t.teardown(async () => (await import('node:fs/promises')).rm(dir, { recursive: true }))
  const path = join(dir, 'a.json')
  writeFileSync(path, '{"a": 1}')
  t.strictSame({ ...(await readJsonObject(path, { maxBytes: 100 })) }, { a: 1 })
  await t.rejects(readJsonObject(path, { maxBytes: 4 }), { code: 'ERR_TOO_LARGE', message: /a\.json: 8 bytes/ })
  writeFileSync(path, '[1]')
  await t.rejects(readJsonObject(path, { maxBytes: 100 }), { code: 'ERR_JSON', message: /the root is a list/ })
  await t.rejects(readJsonObject(dir, { maxBytes: 100 }), { code: 'ERR_NOT_A_FILE' })
})

t.test('a 10 MB header is read in time that does not matter', async (t) => {
  const entry = (i: number) =>
    `"model.layers.${i}.w":{"dtype":"BF16","shape":[4096,4096],"data_offsets":[${i},${i + 1}]}`
  const text = `{${Array.from({ length: 120000 }, (_, i) => entry(i)).join(',')}}`
  const bytes = Buffer.from(text)
  const start = performance.now()
  const parsed = parseJson(bytes, file) as JsonObject
  const took = performance.now() - start
  t.comment(`${(bytes.length / 1e6).toFixed(1)} MB in ${took.toFixed(0)} ms`)
  t.equal(Object.keys(parsed).length, 120000)
  t.ok(took < 3000)
})
