import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers'
import t from 'tap'
import { bpeEncoder } from '../../lib/files/bpe.js'
import { loadTokenizer, repeatsARepeat } from '../../lib/files/tokenizer.js'

const fixtures = fileURLToPath(new URL('../fixtures/', import.meta.url))
const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-tokenizer-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))
const kinds = ['llama2_bytefallback', 'llama3_bytelevel']
const read = (name: string) => JSON.parse(fs.readFileSync(join(fixtures, 'tokenizers', name), 'utf8'))

t.test('goldens of the Rust tokenizers library', async (t) => {
  for (const kind of kinds) {
    const tokenizer = await loadTokenizer(join(fixtures, 'tokenizers', `${kind}.json`))
    const goldens: any[] = read(`${kind}.golden.json`)
    t.ok(goldens.length >= 35)
    for (const { text, ids, ids_no_special, decoded, decoded_keep_special } of goldens) {
      const name = `${kind}: ${JSON.stringify(text.slice(0, 40))}`
      t.strictSame(tokenizer.encode(text), ids, name)
      t.strictSame(tokenizer.encode(text, { addSpecialTokens: false }), ids_no_special, name)
      t.equal(tokenizer.decode(ids), decoded, name)
      t.equal(tokenizer.decode(ids, { skipSpecialTokens: false }), decoded_keep_special, name)
    }
  }
})

/** Seeded numbers in [0, 1) (mulberry32). */
function random(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0
    let x = Math.imul(seed ^ (seed >>> 15), seed | 1)
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61)
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32
  }
}

t.test("our merge equals the library's on random texts", async (t) => {
  for (const kind of kinds) {
    const tokenizer = await loadTokenizer(join(fixtures, 'tokenizers', `${kind}.json`))
    const json = read(`${kind}.json`)
    const library = new LibraryTokenizer(json, {})
    const pieces = [
      ...Object.keys(json.model.vocab).map((token) => token.replaceAll(/[\u2581Ġ]/g, ' ')),
      ' ',
      '  ',
      '\n',
      'é',
      '漢',
      '😀',
      '\u2581',
      '<s>',
      '0',
      '12',
    ]
    const next = random(7)
    let different = 0
    for (let i = 0; i < 400; i++) {
      const count = 1 + Math.floor(next() * 60)
      const text = Array.from({ length: count }, () => pieces[Math.floor(next() * pieces.length)]).join('')
      const expected = library.encode(text).ids
      if (JSON.stringify(tokenizer.encode(text)) !== JSON.stringify(expected)) different++
    }
    t.equal(different, 0, kind)
  }
})

t.test('merging by the definition', async (t) => {
  const names = ['a', 'b', 'c', 'ab', 'bc', 'abc', '\u2581', '\u2581a', '\u2581\u2581', 'aa', '?', '<0xC3>', '<0xA9>']
  const vocab = new Map(names.map((name, id) => [name, id]))
  const model = { vocab, unkToken: '?', fuseUnk: false, byteFallback: true, ignoreMerges: false }
  const merges: [string, string][] = [
    ['b', 'c'],
    ['a', 'b'],
    ['ab', 'c'],
    ['\u2581', 'a'],
    ['\u2581', '\u2581'],
    ['a', 'a'],
  ]
  const encode = (word: string, more: object = {}) =>
    bpeEncoder({ ...model, merges, ...more })(word).map((id) => names[id])
  t.strictSame(encode('abc'), ['a', 'bc'], 'the lowest rank first, not the longest token')
  t.strictSame(encode('abc', { ignoreMerges: true }), ['abc'])
  t.strictSame(encode('aaaaa'), ['aa', 'aa', 'a'], 'the leftmost of equals first')
  t.strictSame(encode('ab\u2581\u2581\u2581ab'), ['ab', '\u2581\u2581', '\u2581', 'ab'])
  t.strictSame(encode('é'), ['<0xC3>', '<0xA9>'], 'bytes of a character without a token')
  t.strictSame(encode('ü漢a'), ['?', '?', 'a'], 'unknown, as a byte token is missing')
  t.strictSame(encode('ü漢a漢', { fuseUnk: true }), ['?', 'a', '?'])
  t.strictSame(encode('ü', { unkToken: null }), [])
  t.strictSame(encode(''), [])
  // a token with a space inside: no cutting at spaces then
  vocab.set('a\u2581', names.push('a\u2581') - 1)
  t.strictSame(encode('a\u2581a', { merges: [['a', '\u2581'], ...merges] }), ['a\u2581', 'a'])
  t.throws(() => bpeEncoder({ ...model, merges: [['a', 'x']] }), /merge 0 \(a x\): the vocabulary has no token "x"/)
})

t.test('beside a model', async (t) => {
  const where = join(dir, 'model')
  fs.mkdirSync(where)
  fs.copyFileSync(join(fixtures, 'tokenizers', 'llama3_bytelevel.json'), join(where, 'tokenizer.json'))
  fs.writeFileSync(join(where, 'config.json'), '{"bos_token_id": 318, "eos_token_id": [319, 318]}')
  const plain = await loadTokenizer(where)
  t.equal(plain.bosId, 318)
  t.equal(plain.eosId, 319)
  t.equal(plain.vocabSize, 320)
  t.equal(plain.maxId, 319)
  t.match(plain.hash, /^[0-9a-f]{64}$/)
  fs.writeFileSync(
    join(where, 'tokenizer_config.json'),
    '{"bos_token": "<|end_of_text|>", "eos_token": {"content": "<|begin_of_text|>"}, "clean_up_tokenization_spaces": true, "remove_space": true}',
  )
  const told = await loadTokenizer(where)
  t.equal(told.bosId, 319, 'tokenizer_config.json comes before config.json')
  t.equal(told.eosId, 318)
  const text = 'spaces  . stay , as they are !  '
  t.equal(told.decode(told.encode(text)), text, 'no clean-up of spaces')
  t.equal(told.decode([]), '')
  t.equal(
    told.decode([99999, ...told.encode('a', { addSpecialTokens: false })]),
    'a',
    'an id without a token says nothing',
  )
  t.throws(() => told.decode([-1]), /ids: -1 is not a token id/)
  t.throws(() => told.decode([1.5]), RangeError)
  t.throws(() => told.encode(7 as never), /text: 7, but a string/)
})

t.test('what is wrong is named', async (t) => {
  const base = read('llama2_bytefallback.json')
  const spoil = (edit: (json: any) => void) => {
    const json = structuredClone(base)
    edit(json)
    return JSON.stringify(json)
  }
  const bad: [string, string, any][] = [
    ['not JSON', '{', { code: 'ERR_JSON' }],
    ['no model', '{"version": "1.0"}', { code: 'ERR_TOKENIZER', message: /tokenizer\.json: no "model" object/ }],
    [
      'a merge without its token',
      spoil((json) => json.model.merges.push(['zq', 'qz'])),
      { code: 'ERR_TOKENIZER', message: /\(zq qz\): the vocabulary has no token "zq"/ },
    ],
    [
      'a merge of three',
      spoil((json) => json.model.merges.push(['a', 'b', 'c'])),
      { code: 'ERR_TOKENIZER', message: /is not a pair/ },
    ],
    [
      'an id that is no number',
      spoil((json) => (json.model.vocab.a = '7')),
      { code: 'ERR_TOKENIZER', message: /the id of "a" is "7"/ },
    ],
    [
      'an unknown part',
      spoil((json) => (json.normalizer = { type: 'Nonsense' })),
      { code: 'ERR_TOKENIZER', message: /tokenizer\.json: .*Nonsense/ },
    ],
    [
      'a pattern that takes for ever',
      spoil((json) => (json.pre_tokenizer = { type: 'Split', pattern: { Regex: '(a+)+$' }, behavior: 'Isolated' })),
      { code: 'ERR_TOKENIZER', message: /\(a\+\)\+\$" repeats a group/ },
    ],
  ]
  for (const [name, text, expected] of bad) {
    const where = fs.mkdtempSync(join(dir, 'bad-'))
    fs.writeFileSync(join(where, 'tokenizer.json'), text)
    await t.rejects(loadTokenizer(where), expected, name)
  }
  const none = fs.mkdtempSync(join(dir, 'none-'))
  await t.rejects(loadTokenizer(none), { code: 'ERR_NOT_FOUND', message: /no tokenizer\.json: download it/ })
  fs.writeFileSync(join(none, 'tokenizer.model'), 'x')
  await t.rejects(loadTokenizer(none), {
    code: 'ERR_NOT_FOUND',
    message: /tokenizer\.model \(SentencePiece\): convert it once/,
  })
  await t.rejects(loadTokenizer(join(dir, 'nowhere')), { code: 'ERR_NOT_FOUND' })
  fs.symlinkSync(join(fixtures, 'tokenizers', 'llama2_bytefallback.json'), join(none, 'tokenizer.json'))
  await t.rejects(loadTokenizer(none), { code: 'ERR_PATH' })
})

t.test('patterns', async (t) => {
  for (const kind of ['(a+)+', '(a*)*', '((a|b+)c)*', '(?:\\s+x?)+', '(a{2,})+', '([a-z]+)*', '(?i:a+){3,}'])
    t.ok(repeatsARepeat(kind), kind)
  const known = [
    read('llama3_bytelevel.json').pre_tokenizer.pretokenizers[0].pattern.Regex,
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*",
    '(a|b)+',
    '[(+]+x(y)',
    '\\(a+\\)+',
  ]
  for (const pattern of known) t.notOk(repeatsARepeat(pattern), pattern)
})

t.test('a megabyte without a break takes less than 2 s; no text makes time grow faster than length', async (t) => {
  for (const kind of kinds) {
    const tokenizer = await loadTokenizer(join(fixtures, 'tokenizers', `${kind}.json`))
    const time = (piece: string, bytes: number) => {
      const text = piece.repeat(Math.ceil(bytes / Buffer.byteLength(piece)))
      const start = performance.now()
      tokenizer.encode(text)
      return performance.now() - start
    }
    for (const piece of ['thehadwithbeatit', '漢字', ' ']) {
      const took = time(piece, 1 << 20)
      t.ok(took < 2000, `${kind}, 1 MiB of ${JSON.stringify(piece)}: ${took.toFixed(0)} ms`)
    }
    // 128 KiB in a fraction of the time: one quadratic step would take minutes
    for (const piece of [
      'a',
      'the had with be at it ',
      ' \n',
      '1234567890',
      '!?',
      '<|begin_of_tex',
      "'",
      '\u2581',
      '<s> ',
      '\r',
    ]) {
      const took = time(piece, 1 << 17)
      t.ok(took < 1000, `${kind}, 128 KiB of ${JSON.stringify(piece)}: ${took.toFixed(0)} ms`)
    }
  }
})
