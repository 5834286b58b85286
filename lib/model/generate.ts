import { RopewalkError } from '../errors.js'
import { aligned } from '../runtime/arena.js'
import type { Buffer, Device } from '../runtime/device.js'
import { attentionCached, kvAppend } from '../runtime/ops.gen.js'
import type { Plan } from '../runtime/plan.js'
import { Recorder } from '../runtime/recorder.js'
import { type DType, Tensor, tensorBytes } from '../runtime/tensor.js'
import { rotationRows } from './batch.js'
import type { LlamaConfig } from './config.js'
import { type Attend, logits as recordLogits, trunk } from './forward.js'
import type { Parameters } from './parameters.js'
import type { PromptCache } from './prompt-cache.js'
import { Tape } from './tape.js'

/** Prompt tokens in one pass: enough for full-speed matrix products, little enough for small activations. */
const PREFILL = 256

/** What a pass reads of its tokens. */
type Inputs = Record<'ids' | 'pos' | 'first' | 'last' | 'slot' | 'cos' | 'sin' | 'row', Tensor>

interface Pass {
  plan: Plan
  inputs: Inputs
  logits: Tensor
}

/**
 * A text being continued, one row: the keys (rotated) and values of all layers for up to `capacity` tokens, and the
 * plans that extend them. Feeding costs each token once.
 */
export class Continuation {
  /** Tokens in the cache. */
  length = 0
  /** The prompt whose keys and values it begins with, as `start` computes them. */
  private prompt: readonly number[] = []
  private readonly cache: { k: Tensor; v: Tensor }[] = []
  private readonly passes = new Map<number, Pass>()
  private readonly buffers: Buffer[] = []
  private readonly activations: DType
  /** Of the weights when the passes were recorded. */
  private version: number

  constructor(
    private readonly device: Device,
    private readonly config: LlamaConfig,
    private readonly parameters: Parameters,
    readonly capacity: number,
  ) {
    this.version = parameters.version
    this.activations = device.activationsFor(parameters.dtype)
    const dims = [1, config.kvHeads, capacity, config.headDim]
    for (let layer = 0; layer < config.layers; layer++) {
      const k = this.own(device.tensor(this.activations, dims, `keys of layer ${layer}`))
      const v = this.own(device.tensor(this.activations, dims, `values of layer ${layer}`))
      this.cache.push({ k, v })
    }
  }

  /** Appends tokens; gives the logits (V) that follow the last of them. */
  async feed(tokens: readonly number[], signal?: AbortSignal): Promise<Float32Array> {
    if (tokens.length === 0) throw new RangeError('there are no tokens to feed')
    if (this.length + tokens.length > this.capacity) {
      throw new RangeError(`${this.length + tokens.length} tokens exceed this cache's capacity of ${this.capacity}`)
    }
    // Where frequencies follow from the length (dynamic, longrope), one length serves the whole text that is fed.
    const end = this.length + tokens.length
    let result: Float32Array = new Float32Array()
    for (let at = 0; at < tokens.length; at += PREFILL) {
      signal?.throwIfAborted()
      result = await this.extend(tokens.slice(at, at + PREFILL), end)
    }
    return result
  }

  /**
   * Begins a text; gives the logits (V) that follow the prompt. What the prompt before had in common with it is not
   * computed again, in whole passes, so that every bit is as it would be without.
   */
  async start(prompt: readonly number[], signal?: AbortSignal): Promise<Float32Array> {
    this.length = this.shared(prompt)
    this.prompt = prompt.slice(0, this.length)
    const logits = await this.feed(prompt.slice(this.length), signal)
    this.prompt = [...prompt]
    return logits
  }

  /** Whether it can hold `capacity` tokens of a text by these weights. */
  serves(parameters: Parameters, capacity: number): boolean {
    return this.parameters === parameters && this.version === parameters.version && this.capacity >= capacity
  }

  dispose(): void {
    for (const { plan } of this.passes.values()) plan.dispose()
    for (const buffer of this.buffers) buffer.dispose()
    this.passes.clear()
    this.buffers.length = 0
  }

  private shared(prompt: readonly number[]): number {
    const { type } = this.config.rope
    // Their rotations depend on the length of the whole prompt.
    if ((type === 'dynamic' || type === 'longrope') && this.prompt.length !== prompt.length) return 0
    const most = Math.min(this.prompt.length, prompt.length - 1)
    let same = 0
    while (same < most && this.prompt[same] === prompt[same]) same++
    return same - (same % PREFILL)
  }

  private async extend(tokens: readonly number[], length: number): Promise<Float32Array> {
    const { device } = this
    const time = tokens.length
    const { plan, inputs, logits } = this.pass(time)
    const positions = Int32Array.from(tokens, (_, t) => this.length + t)
    const { index, table } = rotationRows(this.config, positions, length)
    const values = {
      ids: Int32Array.from(tokens),
      pos: index,
      first: new Int32Array(time),
      row: Int32Array.of(time - 1),
    }
    const { block, bytes } = gather(inputs, { ...values, ...table(), last: positions, slot: positions })
    await Promise.all([device.upload(block, bytes), plan.run()])
    this.length += time
    return device.downloadFloats(plan.located(logits))
  }

  private own(tensor: Tensor): Tensor {
    this.buffers.push(tensor.storage as Buffer)
    return tensor
  }

  /** They share a block, so that one copy brings them all. */
  private inputs(time: number): Inputs {
    const table = ['f32', [time, this.config.headDim / 2]] as const
    const shapes: Record<keyof Inputs, readonly [dtype: DType, dims: readonly number[]]> = {
      ...{ ids: ['i32', [time]], pos: ['i32', [1, time]], first: ['i32', [1, time]], last: ['i32', [1, time]] },
      ...{ slot: ['i32', [1, time]], row: ['i32', [1]], cos: table, sin: table },
    }
    const places: [name: string, offset: number, dtype: DType, dims: readonly number[]][] = []
    let end = 0
    for (const [name, [dtype, dims]] of Object.entries(shapes)) {
      places.push([name, end, dtype, dims])
      const size = dims.reduce((product, dim) => product * dim, 1)
      end += aligned(tensorBytes(dtype, size))
    }
    const { storage } = this.own(this.device.tensor('i32', [end / 4], 'token ids, positions, slots and rotations'))
    return Object.fromEntries(
      places.map(([name, offset, dtype, dims]) => [name, new Tensor(storage, offset, dtype, dims)]),
    ) as Inputs
  }

  private pass(time: number): Pass {
    if (this.version !== this.parameters.version) {
      // The weights have moved since, and may have been changed there.
      for (const { plan } of this.passes.values()) plan.dispose()
      this.passes.clear()
      this.version = this.parameters.version
    }
    let pass = this.passes.get(time)
    if (!pass) this.passes.set(time, (pass = this.record(time)))
    return pass
  }

  private record(time: number): Pass {
    const { device, config, parameters } = this
    const recorder = new Recorder(device, `continue by ${time}`, this.activations)
    const tape = Tape.forward(recorder)
    const inputs = this.inputs(time)
    const scale = 1 / Math.sqrt(config.headDim)
    const attend: Attend = (_, layer, q, k, v) => {
      const { k: k_cache, v: v_cache } = this.cache[layer]!
      kvAppend(recorder, { k, v, ...pick(inputs, 'cos', 'sin', 'pos', 'slot'), k_cache, v_cache })
      const where = pick(inputs, 'cos', 'sin', 'pos', 'first', 'last')
      return attentionCached(recorder, { q, k_cache, v_cache, scale, ...where }).o
    }
    const x = trunk(tape, config, parameters, inputs.ids, 1, attend)
    const logits = recordLogits(tape, config, parameters, x, inputs.row)
    return { plan: recorder.plan({ keep: [logits] }), inputs, logits }
  }
}

/** The block of the inputs, and what goes there. Of a table the first rows may be all there are. */
function gather(inputs: Inputs, values: Record<keyof Inputs, ArrayBufferView>): { block: Tensor; bytes: Uint8Array } {
  const { storage } = inputs.ids
  const bytes = new Uint8Array(storage.bytes)
  for (const [name, { offset }] of Object.entries(inputs)) {
    const { buffer, byteOffset, byteLength } = values[name as keyof Inputs]
    bytes.set(new Uint8Array(buffer, byteOffset, byteLength), offset)
  }
  return { block: new Tensor(storage, 0, 'i32', [storage.bytes / 4]), bytes }
}

function pick<T, K extends keyof T>(from: T, ...keys: K[]): Pick<T, K> {
  return Object.fromEntries(keys.map((key) => [key, from[key]])) as Pick<T, K>
}

/**
 * How the next token is chosen. Applied in this order: temperature, topK, topP.
 *
 * @category Models
 */
export interface SamplingOptions {
  /** Logits are divided by it, at least 0. 0 (default): always the most likely token, the lowest id among equals. */
  temperature?: number
  /** Sample among the k most likely tokens; default 0: among all. */
  topK?: number
  /** Sample among the most likely tokens that together have this probability, in (0, 1]; default 1. */
  topP?: number
  /** Of the random choice; the same seed gives the same text. Default 0. */
  seed?: number
}

/**
 * Options of {@link Llama.generate}.
 *
 * @category Models
 */
export interface GenerateOptions extends SamplingOptions {
  /** Text (needs the folder's tokenizer) or token ids. */
  prompt: string | readonly number[]
  /** Tokens to generate at most; default 64. */
  maxTokens?: number
  /** Ids that end the text; default: the checkpoint's end-of-sequence ids. */
  stopIds?: readonly number[]
  /** Keeps what prompts have in common; default: nothing outlives the call. */
  cache?: PromptCache
  /** Ends the generation between two tokens; the generator throws the signal's reason. */
  signal?: AbortSignal
}

/**
 * One step of {@link Llama.generate}.
 *
 * @category Models
 */
export interface GeneratedToken {
  /** The token chosen. */
  id: number
  /** What this token adds to the text; '' while a character is incomplete, and without a tokenizer. */
  text: string
}

/** Checks sampling options; throws RangeError. Gives a function from logits (V) to a token id. */
export function sampler(options: SamplingOptions): (logits: Float32Array) => number {
  const { temperature = 0, topK = 0, topP = 1, seed = 0 } = options
  if (!(temperature >= 0 && temperature < Infinity)) throw new RangeError(`temperature is ${temperature}, must be >= 0`)
  if (!Number.isInteger(topK) || topK < 0) throw new RangeError(`topK is ${topK}, must be a whole number >= 0 (0: all)`)
  if (!(topP > 0 && topP <= 1)) throw new RangeError(`topP is ${topP}, must lie in (0, 1]`)
  if (!Number.isInteger(seed) || seed < 0) throw new RangeError(`seed is ${seed}, must be a whole number >= 0`)
  const random = uniform(seed)
  return (logits) => {
    let best = 0
    for (let id = 0; id < logits.length; id++) {
      if (Number.isNaN(logits[id])) {
        throw new RopewalkError(
          'ERR_NOT_FINITE',
          `the logit of token ${id} is NaN: the weights or the input are damaged`,
        )
      }
      if (logits[id]! > logits[best]!) best = id
    }
    if (temperature === 0) return best
    // Sorted only where the order decides: a vocabulary of 128k takes 50 ms.
    let order = Array.from(logits.keys())
    if (topK > 0 || topP < 1) order.sort((a, b) => logits[b]! - logits[a]! || a - b)
    if (topK > 0) order = order.slice(0, topK)
    const weights = order.map((id) => Math.exp((logits[id]! - logits[best]!) / temperature))
    const total = weights.reduce((sum, weight) => sum + weight, 0)
    let kept = 0
    let mass = 0
    while (kept < order.length && (kept === 0 || mass < topP * total)) mass += weights[kept++]!
    let remaining = random() * mass
    for (let i = 0; i < kept; i++) {
      remaining -= weights[i]!
      if (remaining < 0) return order[i]!
    }
    return order[kept - 1]!
  }
}

/** Uniform numbers in [0, 1): splitmix32, a counter through a mixing function. */
export function uniform(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x9e3779b9) >>> 0
    let z = state
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad)
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97)
    return ((z ^ (z >>> 15)) >>> 0) / 0x100000000
  }
}
