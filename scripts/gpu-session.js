// Commands of the parts of gpu.js: a limited number at a time, each with a limit of seconds, everything into one log.
import { spawn } from 'node:child_process'
import { appendFileSync, writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'

const KEPT = 1 << 20

export class Session {
  #start = performance.now()
  #running = 0
  #waiting = []

  /** `seconds`: for all commands together. */
  constructor({ root, device, seconds, log }) {
    Object.assign(this, { root, device, log })
    this.seconds = seconds
    this.end = this.#start + 1000 * seconds
    this.slots = Math.max(1, availableParallelism() - 1)
    writeFileSync(log, '')
  }

  /** Whether sizes are tiny, because a CPU executes the kernels. */
  get rehearsal() {
    return this.device === 'simt'
  }

  /** Seconds that are left. */
  left() {
    return (this.end - performance.now()) / 1000
  }

  /** Seconds that the parts have that run side by side: they must leave the larger half to what is timed. */
  early() {
    return Math.max(0, this.left() - 0.55 * this.seconds)
  }

  /** A line of progress, with the seconds since the start. */
  say(part, text) {
    const seconds = ((performance.now() - this.#start) / 1000).toFixed(0).padStart(4)
    const line = `[${seconds} s] ${part}: ${text}`
    console.log(line)
    appendFileSync(this.log, `${line}\n`)
  }

  /** Node on a file of the bundle. */
  node(part, args, options) {
    return this.run(part, process.execPath, args, options)
  }

  /**
   * Runs a command when there is a slot for it, for `limit` seconds or, where it is one of the `early` ones, as long as
   * those may take. Gives { code, text, seconds, timedOut, missing }; `text` is the end of what it wrote, all of which is
   * in the log. It never throws.
   */
  async run(part, command, args, { limit = 60, early = false, env = {} } = {}) {
    if (this.#running >= this.slots) await new Promise((resolve) => this.#waiting.push(resolve))
    this.#running++
    try {
      return await this.#spawn(part, command, args, early ? this.early() : Math.min(limit, this.left()), env)
    } finally {
      this.#running--
      this.#waiting.shift()?.()
    }
  }

  #spawn(part, command, args, limit, env) {
    const line = [command, ...args].join(' ')
    if (limit < 1) return Promise.resolve({ code: null, text: '', seconds: 0, timedOut: true, line })
    const start = performance.now()
    return new Promise((resolve) => {
      // A group of its own, so that a limit ends its children too.
      const child = spawn(command, args, {
        cwd: this.root,
        detached: true,
        stdio: ['ignore', 'pipe', 'pipe'],
        env: { ...process.env, ...env },
      })
      let all = ''
      let timedOut = false
      const timer = setTimeout(() => {
        timedOut = true
        this.#kill(child)
      }, 1000 * limit)
      const add = (data) => (all += data)
      child.stdout.on('data', add)
      child.stderr.on('data', add)
      let ended = false
      const done = (code, missing) => {
        if (ended) return // a command that is not there gives 'error' and 'close'
        ended = true
        clearTimeout(timer)
        const seconds = (performance.now() - start) / 1000
        const end = timedOut ? `stopped after ${limit.toFixed(0)} s` : `code ${code}, ${seconds.toFixed(1)} s`
        appendFileSync(this.log, `\n==== ${part}: ${line}\n${all}==== ${end}\n\n`)
        resolve({ code, text: all.slice(-KEPT), seconds, timedOut, missing, line })
      }
      child.once('error', (error) => done(null, error.message))
      child.once('close', (code, signal) => done(code ?? signal))
    })
  }

  #kill(child) {
    try {
      process.kill(-child.pid, 'SIGKILL')
    } catch {
      child.kill('SIGKILL') // it was no group any more
    }
  }
}

/** Sums the last lines "N passed, N failed, N skipped" of commands; one without such a line has failed. */
export function tally(results) {
  const total = { passed: 0, failed: 0, skipped: 0 }
  const problems = []
  for (const { name, text, code, timedOut, missing } of results) {
    const [, ...counts] = /(\d+) passed, (\d+) failed, (\d+) skipped\s*$/.exec(text.trimEnd()) ?? []
    const bad = text.split('\n').filter((line) => /^\s*(not ok|FAILED)\b/.test(line))
    if (counts.length > 0) ['passed', 'failed', 'skipped'].forEach((key, i) => (total[key] += Number(counts[i])))
    if (counts.length === 0 || (code !== 0 && Number(counts[1]) === 0)) {
      total.failed++
      const last = text.trim().split('\n').slice(-3).join(' | ').slice(-400)
      problems.push(`${name}: ${missing ?? (timedOut ? 'took too long' : `ended with ${code}`)}: ${last}`)
    } else problems.push(...bad.slice(0, 3).map((line) => `${name}: ${line.slice(0, 400)}`))
  }
  const status = total.failed > 0 ? 'failed' : total.passed === 0 ? 'skipped' : 'passed'
  const summary = `${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`
  return { status, summary, ...total, problems }
}
