// Stands in for tap where nothing but Node is: a bundle for a machine with a GPU has this file as its node_modules/tap
// (gpu-bundle.js). It implements what test/ops and test/model use, with tap's meaning, runs the tests of a file one after
// the other, and ends with "N passed, N failed, N skipped". ROPEWALK_TEST_ONLY, a regular expression, picks tests by name.
import { deepEqual } from 'node:assert'
import { inspect, isDeepStrictEqual } from 'node:util'

const only = new RegExp(process.env.ROPEWALK_TEST_ONLY ?? '')
const total = { passed: 0, failed: 0, skipped: 0 }

/** How a value is shown: enough to understand it, not a megabyte. */
const show = (value) => inspect(value, { depth: 4, maxArrayLength: 20, maxStringLength: 500, breakLength: 120 })

const loose = (a, b) => {
  try {
    deepEqual(a, b)
    return true
  } catch {
    return false
  }
}

/** Whether a value has the pattern: regular expressions, types, parts of strings, and all that an object names. */
function matches(value, pattern) {
  if (pattern instanceof RegExp) return pattern.test(value instanceof RegExp ? value.source : String(value))
  if (typeof pattern === 'function') {
    return value !== undefined && value !== null && (value instanceof pattern || value.constructor === pattern)
  }
  if (typeof pattern === 'string') return typeof value === 'string' && value.includes(pattern)
  if (typeof pattern !== 'object' || pattern === null) return Object.is(value, pattern)
  if (typeof value !== 'object' || value === null) return false
  return Object.entries(pattern).every(([key, part]) => matches(value[key], part))
}

class Test {
  #teardowns = []
  #queue = Promise.resolve()

  constructor(name) {
    this.name = name
  }

  test(name, ...rest) {
    const body = rest.at(-1)
    const { skip } = rest.length > 1 ? rest[0] : {}
    const full = this.name ? `${this.name} > ${name}` : name
    if (!this.name && !only.test(name)) return Promise.resolve()
    this.#queue = this.#queue.then(async () => {
      if (skip) {
        total.skipped++
        console.log(`skipped: ${full}${skip === true ? '' : ` (${skip})`}`)
      } else await new Test(full).run(body)
    })
    return this.#queue
  }

  async run(body) {
    const before = { ...total }
    const start = performance.now()
    try {
      await body(this)
    } catch (error) {
      this.fail(`threw ${error instanceof Error ? error.stack : show(error)}`)
    }
    await this.finish()
    const state = total.failed > before.failed ? 'not ok' : 'ok'
    const seconds = ((performance.now() - start) / 1000).toFixed(1)
    console.log(`${state}: ${this.name} (${total.passed - before.passed} passed, ${seconds} s)`)
  }

  /** Waits for the subtests, also those that they begin, then tears down in reverse. */
  async finish() {
    for (let queue; queue !== this.#queue;) await (queue = this.#queue)
    while (this.#teardowns.length > 0) await this.#teardowns.pop()()
  }

  teardown(body) {
    this.#teardowns.push(body)
  }

  comment(text) {
    console.log(`# ${text}`)
  }

  fail(message) {
    total.failed++
    console.log(`not ok: ${this.name}: ${message ?? 'failed'}`)
    return false
  }

  #check(holds, message, ...values) {
    if (!holds) return this.fail([message ?? '', ...values.map(show)].join('\n  '))
    total.passed++
    return true
  }

  ok = (value, message) => this.#check(value, message, value)
  notOk = (value, message) => this.#check(!value, message, value)
  equal = (got, wanted, message) => this.#check(got === wanted, message, got, wanted)
  not = (got, unwanted, message) => this.#check(got !== unwanted, message, got)
  strictSame = (got, wanted, message) => this.#check(isDeepStrictEqual(got, wanted), message, got, wanted)
  same = (got, wanted, message) => this.#check(loose(got, wanted), message, got, wanted)
  notSame = (got, unwanted, message) => this.#check(!loose(got, unwanted), message, got)
  match = (got, pattern, message) => this.#check(matches(got, pattern), message, got, pattern)

  throws(body, ...rest) {
    try {
      body()
    } catch (error) {
      return this.#thrown(error, rest)
    }
    return this.fail('nothing was thrown')
  }

  async rejects(work, ...rest) {
    try {
      await (typeof work === 'function' ? work() : work)
    } catch (error) {
      return this.#thrown(error, rest)
    }
    return this.fail(`it did not reject: ${rest.map(show).join(' ')}`)
  }

  #thrown(error, rest) {
    const pattern = typeof rest[0] === 'object' || typeof rest[0] === 'function' ? rest[0] : {}
    const holds = pattern instanceof RegExp ? pattern.test(error.message) : matches(error, pattern)
    return this.#check(holds, rest.find((part) => typeof part === 'string') ?? 'another error', error, pattern)
  }
}

const t = new Test('')
export default t
// Once for the tests that the file registers, and again for what their teardowns begin.
process.once('beforeExit', async () => {
  await t.finish()
  console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`)
  if (total.failed > 0) process.exitCode = 1
})
