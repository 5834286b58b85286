// Memory of a training step and of loading. Each is measured in a process of its own, in which nothing else took any:
// this file is also what that process runs.
import { fork } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Llama } from '../model/llama.js'
import type { MemoryOptions } from '../train/memory.js'
import { Trainer } from '../train/trainer.js'
import { writeModel } from './load.js'
import { randomTokens } from './data.js'
import { LLAMA_25M } from './models.js'
import { type Fact, startTraining } from './step.js'

interface Task {
  kind: 'step' | 'load'
  memory?: MemoryOptions
  time: number
  threads: number
  dir: string
}

/** Bytes. */
interface Measured {
  /** All weights. */
  weights: number
  /** What the device allocated, at most. */
  allocated: number
  /** Of the process before and after, and its largest. */
  before: number
  after: number
  most: number
  /** By how much its own memory grew, pages of files not counted; 0 where the system does not say. */
  own: number
  /** Of the last step. */
  seconds?: number
}

/** What Linux says of this process in /proc/self/status, in bytes; undefined elsewhere. */
function statusBytes(name: string): number | undefined {
  const status = '/proc/self/status'
  const kilobytes = existsSync(status)
    ? new RegExp(`${name}:\\s*(\\d+)`).exec(readFileSync(status, 'utf8'))?.[1]
    : undefined
  return kilobytes === undefined ? undefined : 1024 * Number(kilobytes)
}

/** The largest this process has been. On Linux getrusage would count the parent from which it was forked. */
const mostResident = (): number => statusBytes('VmHWM') ?? 1024 * process.resourceUsage().maxRSS

async function measure({ kind, time, threads, dir, memory }: Task): Promise<Measured> {
  const rss = (): number => process.memoryUsage().rss
  const before = rss()
  const anonymous = (): number => statusBytes('RssAnon') ?? 0
  const anonymousBefore = anonymous()
  if (kind === 'load') {
    using model = await Llama.load(dir, { device: 'cpu', threads })
    const allocated = model.device.peakAllocatedBytes
    return {
      weights: 4 * model.parameterCount,
      allocated,
      before,
      after: rss(),
      most: mostResident(),
      own: anonymous() - anonymousBefore,
    }
  }
  const { model, trainer, dispose } = await startTraining(LLAMA_25M, time, threads, memory)
  // What is long takes minutes, and shows all it needs the first time.
  let seconds = 0
  for (let i = 0; i < (time > LONG ? 1 : 2); i++) {
    const start = performance.now()
    await trainer.step(randomTokens(1, time, LLAMA_25M.vocab_size))
    seconds = (performance.now() - start) / 1000
  }
  const result = {
    weights: 4 * model.parameterCount,
    allocated: model.device.allocatedBytes,
    before,
    after: rss(),
    most: mostResident(),
    own: anonymous() - anonymousBefore,
    seconds,
  }
  dispose()
  return result
}

async function inOwnProcess(task: Task): Promise<Measured> {
  const child = fork(fileURLToPath(import.meta.url), { env: { ...process.env, [TASK]: JSON.stringify(task) } })
  const [answer] = (await Promise.race([once(child, 'message'), once(child, 'close')])) as [unknown]
  if (typeof answer !== 'object' || answer === null)
    throw new Error(`the process that measures memory ended: ${answer}`)
  return answer as Measured
}

/** Memory of a step of `time` tokens: planned, allocated, resident. */
export async function stepMemory(time: number, threads: number): Promise<Fact[]> {
  const { planned, arena } = await planStep(time)
  const { allocated, before, after, most } = await inOwnProcess({ kind: 'step', time, threads, dir: '' })
  const name = `memory of a step, T ${time}`
  return [
    { name: `${name}: activations and temporaries planned`, value: arena, unit: 'bytes' },
    { name: `${name}: planned, with weights, gradients, moments`, value: planned, unit: 'bytes' },
    { name: `${name}: allocated by the device`, value: allocated, unit: 'bytes' },
    { name: `${name}: allocated / planned`, value: allocated / planned, unit: 'ratio', least: 1, most: 1 },
    { name: `${name}: resident before`, value: before, unit: 'bytes' },
    { name: `${name}: resident after`, value: after, unit: 'bytes' },
    { name: `${name}: largest resident / planned`, value: most / planned, unit: 'ratio', most: 1.1 },
  ]
}

/** Kept: every second layer's input; computed in parts: the MLP, logits, the rotation of heads. */
const LEAN: MemoryOptions = { checkpointLayers: 2, mlpRows: 1024, attentionGroups: LLAMA_25M.num_key_value_heads }
const LONG = 16_384

/** A step of `long` tokens with as little memory as there are ways to save it; and what that costs, at `short` tokens. */
export async function leanMemory(long: number, short: number, threads: number): Promise<Fact[]> {
  const step = (time: number, memory: MemoryOptions): Promise<Measured> =>
    inOwnProcess({ kind: 'step', time, threads, dir: '', memory })
  const { planned, arena } = await planStep(long, LEAN)
  const { allocated, before, most, seconds } = await step(long, LEAN)
  const { arena: all } = await planStep(long)
  const ratios: number[] = []
  for (let round = 0; round < 3; round++) {
    const [plain, lean] = [await step(short, {}), await step(short, LEAN)]
    ratios.push(lean.seconds! / plain.seconds!)
  }
  const name = `lean step, 25M, T ${long}`
  return [
    { name: `${name}: planned, with weights, gradients, moments`, value: planned, unit: 'bytes' },
    { name: `${name}: allocated / planned`, value: allocated / planned, unit: 'ratio', least: 1, most: 1 },
    { name: `${name}: growth of the process / planned`, value: (most - before) / planned, unit: 'ratio', most: 1.05 },
    { name: `${name}: activations and temporaries planned`, value: arena, unit: 'bytes' },
    { name: `${name}: the same, with everything kept`, value: all, unit: 'bytes' },
    { name: `${name}: everything kept / lean`, value: all / arena, unit: 'ratio', least: 10 },
    { name: `${name}: time`, value: 1000 * seconds!, unit: 'ms' },
    {
      ...{ name: `time of a lean step / with everything kept, T ${short}, median of 3`, unit: 'ratio', most: 1.45 },
      value: ratios.sort((a, b) => a - b)[1]!,
    },
  ]
}

/** Bytes of a step, planned; `arena` of activations and temporaries. Not in the process that is measured. */
async function planStep(time: number, memory: MemoryOptions = {}): Promise<{ planned: number; arena: number }> {
  using model = await Llama.create({ ...LLAMA_25M, max_position_embeddings: time }, { device: 'dry' })
  using trainer = new Trainer(model, { context: time, memory })
  const { totalBytes, activationBytes } = trainer.plan()
  return { planned: totalBytes, arena: activationBytes }
}

/**
 * Memory of loading a file of about `bytes`, against the weights: what the process grew by, at most, in all, with the
 * pages of the file that it uses in place; and its own memory, which those are no part of.
 */
export async function loadMemory(bytes: number, threads: number): Promise<Fact[]> {
  const dir = await mkdtemp(join(tmpdir(), 'ropewalk-bench-'))
  try {
    await writeModel(dir, bytes)
    const { weights, before, most, own } = await inOwnProcess({ kind: 'load', time: 0, threads, dir })
    const name = 'memory of loading'
    return [
      { name: `${name}: weights`, value: weights, unit: 'bytes' },
      { name: `${name}: growth of the process / weights`, value: (most - before) / weights, unit: 'ratio', most: 1.1 },
      { name: `${name}: growth of its own memory / weights`, value: own / weights, unit: 'ratio', most: 0.1 },
    ]
  } finally {
    await rm(dir, { recursive: true, force: true })
  }
}

const TASK = 'ROPEWALK_BENCH_TASK'
const task = process.env[TASK]
if (task !== undefined && process.send)
  process.send(await measure(JSON.parse(task) as Task), () => process.disconnect())
