import { quote, RopewalkError } from '../errors.js'
import { decodeUtf8, readSmallFile } from './bytes.js'

/**
 * JSON for headers and configs that came from elsewhere. JSON.parse keeps the last of two equal keys and rounds
 * integers beyond 2^53 in silence; here both are errors, and every error names the file and the place. Objects have no
 * prototype, so "__proto__" is a key like any other. Numbers keep their spelling (1e-05, 10000.0) when `python` is set,
 * so that what is not touched is written back byte for byte.
 */
export type JsonValue = null | boolean | number | string | JsonValue[] | JsonObject
export type JsonObject = { [key: string]: JsonValue }

export type JsonOptions = {
  /** Accept what Python's json module writes: NaN, Infinity, -Infinity, integers beyond 2^53 (rounded). */
  python?: boolean
  /** Deepest nesting of objects and lists that is read. */
  maxDepth?: number
}

/** The spelling of numbers whose text is not what JavaScript would print, by container and key. */
const spellings = new WeakMap<object, Map<string | number, string>>()

/** Parses `input` (UTF-8 bytes or text); `file` is the name for messages. Throws RopewalkError ERR_JSON. */
export function parseJson(input: Uint8Array | string, file: string, options: JsonOptions = {}): JsonValue {
  return new Scanner(typeof input === 'string' ? input : decodeUtf8(input, file), file, options).document()
}

/** Reads and parses a whole file of at most `maxBytes`; its root must be an object. */
export async function readJsonObject(
  path: string,
  options: JsonOptions & { maxBytes: number; shownPath?: string },
): Promise<JsonObject> {
  const name = options.shownPath ?? path
  const bytes = await readSmallFile(path, options.maxBytes, name)
  const value = parseJson(bytes, name, options)
  if (!isObject(value)) {
    throw new RopewalkError('ERR_JSON', `${name}: the root is ${kindOf(value)}, but it must be an object {...}`)
  }
  return value
}

export function isObject(value: JsonValue | undefined): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** A deep copy that keeps the spelling of numbers. */
export function cloneJson<T extends JsonValue>(value: T): T {
  if (typeof value !== 'object' || value === null) return value
  const copy: JsonValue[] | JsonObject = Array.isArray(value) ? value.map(cloneJson) : Object.create(null)
  if (isObject(value)) for (const key of Object.keys(value)) (copy as JsonObject)[key] = cloneJson(value[key])
  const spelling = spellings.get(value)
  if (spelling !== undefined) spellings.set(copy, new Map(spelling))
  return copy as T
}

/**
 * JSON text with Python's number spelling. A number that still has the value it was parsed with keeps its text; one
 * whose key is in `floats` is written with a fraction (8 -> 8.0: transformers before 4.43 refuses an int factor).
 * Properties that are undefined are left out.
 */
export function stringifyJson(
  value: unknown,
  { indent = 2, floats = new Set() }: { indent?: number; floats?: ReadonlySet<string> } = {},
): string {
  const write = (
    node: unknown,
    key: string | number,
    holder: object | undefined,
    name: string,
    margin: string,
  ): string => {
    if (node === null || typeof node === 'boolean' || typeof node === 'string') return JSON.stringify(node)
    if (typeof node === 'bigint') return String(node)
    if (typeof node === 'number') {
      const spelling = holder && spellings.get(holder)?.get(key)
      if (spelling !== undefined && Object.is(numberOf(spelling), node)) return spelling
      return pythonNumber(node, floats.has(name), name)
    }
    if (typeof node !== 'object') throw new TypeError(`${name}: a ${typeof node} has no JSON spelling`)
    const inner = margin + ' '.repeat(indent)
    const list = Array.isArray(node)
    const items = list
      ? node.map((item, i) => write(item, i, node, name, inner))
      : Object.entries(node)
          .filter(([, item]) => item !== undefined)
          .map(([k, item]) => `${JSON.stringify(k)}:${indent > 0 ? ' ' : ''}${write(item, k, node, k, inner)}`)
    const [open, close] = list ? ['[', ']'] : ['{', '}']
    if (items.length === 0) return open + close
    if (indent === 0) return open + items.join(',') + close
    return `${open}\n${items.map((item) => inner + item).join(',\n')}\n${margin}${close}`
  }
  return write(value, '', undefined, 'the root', '')
}

/** Python's repr of a number: JavaScript's digits, an exponent from 1e16 and below 1e-4, two digits of it. */
function pythonNumber(value: number, asFloat: boolean, name: string): string {
  if (!Number.isFinite(value)) throw new TypeError(`${name}: ${value} has no JSON spelling`)
  if (Number.isSafeInteger(value) && !Object.is(value, -0)) return asFloat ? `${value}.0` : String(value)
  const [digits, exponent] = value.toExponential().split('e')
  const power = Number(exponent)
  if (power < -4 || power >= 16) {
    return `${digits}e${power < 0 ? '-' : '+'}${String(Math.abs(power)).padStart(2, '0')}`
  }
  const sign = value < 0 || Object.is(value, -0) ? '-' : ''
  const all = digits.replace('-', '').replace('.', '')
  if (power < 0) return `${sign}0.${'0'.repeat(-power - 1)}${all}`
  const whole = all.slice(0, power + 1).padEnd(power + 1, '0')
  return `${sign}${whole}.${all.slice(power + 1) || '0'}`
}

/** Python's words for what is no number in JSON. */
const words: Record<string, number> = { NaN: NaN, Infinity: Infinity, '-Infinity': -Infinity }

function numberOf(spelling: string): number {
  return words[spelling] ?? Number(spelling)
}

function kindOf(value: JsonValue): string {
  if (value === null) return 'null'
  return Array.isArray(value)
    ? 'a list'
    : typeof value === 'object'
      ? 'an object'
      : `a ${typeof value} (${quote(value)})`
}

const Char = {
  tab: 0x09,
  newline: 0x0a,
  return: 0x0d,
  space: 0x20,
  quote: 0x22,
  comma: 0x2c,
  minus: 0x2d,
  zero: 0x30,
  nine: 0x39,
  colon: 0x3a,
  bracket: 0x5b,
  backslash: 0x5c,
  bracketEnd: 0x5d,
  brace: 0x7b,
  braceEnd: 0x7d,
} as const

const numberPattern = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y
const wordPattern = /NaN|-?Infinity/y
const escapes: Record<string, string> = {
  '"': '"',
  '\\': '\\',
  '/': '/',
  b: '\b',
  f: '\f',
  n: '\n',
  r: '\r',
  t: '\t',
}

class Scanner {
  private at = 0
  private depth = 0
  private readonly path: (string | number)[] = []
  private readonly python: boolean
  private readonly maxDepth: number

  constructor(
    private readonly text: string,
    private readonly file: string,
    { python = false, maxDepth = 64 }: JsonOptions,
  ) {
    this.python = python
    this.maxDepth = maxDepth
  }

  document(): JsonValue {
    if (this.text.charCodeAt(0) === 0xfeff)
      this.fail('a byte order mark stands first: save the file as UTF-8 without it')
    this.blank()
    const value = this.value(undefined, '')
    this.blank()
    if (this.at < this.text.length) this.fail(`${this.here()} after the end of the document`)
    return value
  }

  private value(holder: object | undefined, key: string | number): JsonValue {
    const code = this.text.charCodeAt(this.at)
    if (code === Char.quote) return this.string()
    if (code === Char.brace) return this.object()
    if (code === Char.bracket) return this.list()
    if (code === Char.minus || (code >= Char.zero && code <= Char.nine)) return this.number(holder, key)
    for (const [word, value] of [
      ['true', true],
      ['false', false],
      ['null', null],
    ] as const) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length
        return value
      }
    }
    return this.word(holder, key)
  }

  private object(): JsonObject {
    const object: JsonObject = Object.create(null)
    this.enter()
    if (this.text.charCodeAt(this.at) === Char.braceEnd) this.at++
    else {
      for (;;) {
        if (this.text.charCodeAt(this.at) !== Char.quote) this.fail(`a key "..." is expected, not ${this.here()}`)
        const start = this.at
        const key = this.string()
        if (key in object) {
          this.at = start
          this.fail(`the key ${quote(key)} stands twice: which one counts would depend on the reader`)
        }
        this.blank()
        if (this.text.charCodeAt(this.at) !== Char.colon)
          this.fail(`":" is expected after ${quote(key)}, not ${this.here()}`)
        this.at++
        this.blank()
        this.path.push(key)
        object[key] = this.value(object, key)
        this.path.pop()
        if (!this.next(Char.braceEnd, '}')) break
      }
    }
    this.depth--
    return object
  }

  private list(): JsonValue[] {
    const list: JsonValue[] = []
    this.enter()
    if (this.text.charCodeAt(this.at) === Char.bracketEnd) this.at++
    else {
      for (;;) {
        this.path.push(list.length)
        list.push(this.value(list, list.length))
        this.path.pop()
        if (!this.next(Char.bracketEnd, ']')) break
      }
    }
    this.depth--
    return list
  }

  /** Steps over the opening bracket. */
  private enter(): void {
    if (++this.depth > this.maxDepth) this.fail(`nested deeper than ${this.maxDepth} levels`)
    this.at++
    this.blank()
  }

  /** After a member: true if another follows, false at the closing bracket. */
  private next(close: number, bracket: string): boolean {
    this.blank()
    const code = this.text.charCodeAt(this.at)
    if (code !== Char.comma && code !== close) this.fail(`"," or "${bracket}" is expected, not ${this.here()}`)
    this.at++
    if (code === close) return false
    this.blank()
    return true
  }

  private string(): string {
    const start = ++this.at
    let result = ''
    let from = start
    for (;;) {
      const code = this.text.charCodeAt(this.at)
      if (code === Char.quote) break
      if (Number.isNaN(code)) this.fail('the text ends inside a string: the file is truncated')
      if (code < Char.space) this.fail(`a control character 0x${code.toString(16).padStart(2, '0')} inside a string`)
      if (code === Char.backslash) {
        result += this.text.slice(from, this.at) + this.escape()
        from = this.at
      } else this.at++
    }
    result = from === start ? this.text.slice(start, this.at) : result + this.text.slice(from, this.at)
    this.at++
    // only an escape can make a lone surrogate: decoded UTF-8 has none
    if (from !== start && /\p{Surrogate}/u.test(result)) this.fail('a lone surrogate in a \\u escape: not a character')
    return result
  }

  private escape(): string {
    const letter = this.text[this.at + 1] ?? ''
    if (letter === 'u') {
      const digits = this.text.slice(this.at + 2, this.at + 6)
      if (!/^[0-9a-fA-F]{4}$/.test(digits))
        this.fail(`\\u must be followed by four hexadecimal digits, not ${quote(digits)}`)
      this.at += 6
      return String.fromCharCode(parseInt(digits, 16))
    }
    const character = escapes[letter]
    if (character === undefined) this.fail(`the escape ${quote('\\' + letter)} does not exist in JSON`)
    this.at += 2
    return character
  }

  private number(holder: object | undefined, key: string | number): number {
    numberPattern.lastIndex = this.at
    const match = numberPattern.exec(this.text)
    if (match === null) return this.word(holder, key)
    const [token, fraction, exponent] = match
    const value = Number(token)
    const integer = fraction === undefined && exponent === undefined
    if (integer && !Number.isSafeInteger(value) && !this.python) {
      this.fail(`the integer ${quote(token)} is beyond 2^53 and cannot be held exactly`)
    }
    if (!Number.isFinite(value)) this.fail(`the number ${quote(token)} is too large for a float64`)
    this.at += token.length
    const after = this.text.charCodeAt(this.at)
    if (after >= Char.zero && after <= Char.nine) {
      this.at -= token.length
      this.fail(`a number with a leading zero: ${this.here()}`)
    }
    if (this.python && String(value) !== token) this.spell(holder, key, token)
    return value
  }

  private word(holder: object | undefined, key: string | number): number {
    wordPattern.lastIndex = this.at
    const token = wordPattern.exec(this.text)?.[0]
    if (token === undefined) return this.fail(`a value is expected, not ${this.here()}`)
    if (!this.python) this.fail(`${token} is not JSON: a finite number, or null, is expected`)
    this.at += token.length
    this.spell(holder, key, token)
    return words[token]
  }

  private spell(holder: object | undefined, key: string | number, token: string): void {
    if (holder === undefined) return
    const known = spellings.get(holder)
    if (known === undefined) spellings.set(holder, new Map([[key, token]]))
    else known.set(key, token)
  }

  private blank(): void {
    for (;;) {
      const code = this.text.charCodeAt(this.at)
      if (code !== Char.space && code !== Char.newline && code !== Char.return && code !== Char.tab) return
      this.at++
    }
  }

  private here(): string {
    if (this.at >= this.text.length) return 'the end of the file (it is truncated)'
    return quote(String.fromCodePoint(this.text.codePointAt(this.at) as number))
  }

  private fail(what: string): never {
    const before = this.text.slice(0, this.at)
    // of JSON Lines the file's name says which
    const line = /:\d+$/.test(this.file) ? '' : `line ${before.split('\n').length}, `
    const names = this.path
      .filter((name) => name !== '')
      .map((name) => (typeof name === 'number' ? `[${name}]` : `.${name}`))
    const place = names.length > 0 ? ` at ${quote(names.join('').replace(/^\./, ''))}` : ''
    throw new RopewalkError('ERR_JSON', `${this.file}: ${line}byte ${Buffer.byteLength(before)}${place}: ${what}`)
  }
}
