import { copyStart, copyWait } from '../runtime/ops.gen.js'
import type { Recorder } from '../runtime/recorder.js'
import { setPurpose, type Tensor } from '../runtime/tensor.js'
import type { Parameter } from './parameters.js'

/** Where gradients of parameters go. */
export interface Gradients {
  /** Where a parameter's gradient is to be written; undefined where none is wanted. */
  of(parameter: Parameter): Tensor | undefined
  /** Before anything else is recorded. */
  begin?(recorder: Recorder): void
  /** All of these parameters' gradients are there: what is recorded now may use them up. */
  complete?(parameters: readonly Parameter[], recorder: Recorder): void
  /** The backward pass is over. */
  end?(recorder: Recorder): void
}

/** How much of what a forward pass computes is kept for the backward pass, and where. Results do not depend on it. */
export interface ActivationOptions {
  /** Only the inputs of every so many layers are kept; the rest is computed again, layer by layer. 0: all is kept. */
  checkpointLayers: number
  /** Attention's result and its softmax's denominators are kept too, so that attention is not computed again. */
  keepAttention: boolean
  /** The MLP goes over so many rows at a time, forward and backward; 0: over all. */
  mlpRows: number
  /** The backward pass of attention rotates the queries and keys of that many groups of heads one after the other. */
  attentionGroups: number
  /** Rows of logits that exist at a time; 0: as the device likes. */
  logitsRows: number
  /** Kept inputs of layers are in the host's memory, but for the last one. */
  offload: boolean
}

export const KEEP_ALL: ActivationOptions = {
  checkpointLayers: 0,
  keepAttention: false,
  mlpRows: 0,
  attentionGroups: 1,
  logitsRows: 0,
  offload: false,
}

/** What the tapes of one pass share. */
interface Pass {
  recorder: Recorder
  gradients: Gradients | undefined
  /** Whether it adds to the parameters' gradients (all but the first micro-batch of a step) or overwrites them. */
  accumulate: boolean
  started: Set<Parameter>
  options: ActivationOptions
}

interface Mode {
  kind: 'forward' | 'training'
  /** What an earlier forward pass of the same layers has left, in the order of its recording. */
  kept?: object[]
  /** Where this forward pass leaves such things for a later one. */
  keep?: object[]
}

/**
 * Collects the backward operations while the forward ones are recorded, then records them in reverse order. Gradients
 * are kept by tensor; a second contribution to the same one is added by the operation that computes it (`add`).
 */
export class Tape {
  private readonly steps: (() => void)[] = []
  private readonly gradients = new Map<Tensor, Tensor>()
  /** Where the last contribution to a tensor's gradient has to be written. */
  private readonly places = new Map<Tensor, Tensor>()

  private constructor(
    private readonly pass: Pass,
    private readonly mode: Mode,
  ) {}

  /** A tape for a pass without a backward one. */
  static forward(recorder: Recorder, options = KEEP_ALL): Tape {
    const pass = { recorder, gradients: undefined, accumulate: false, started: new Set<Parameter>(), options }
    return new Tape(pass, { kind: 'forward' })
  }

  static training(recorder: Recorder, gradients: Gradients, accumulate: boolean, options = KEEP_ALL): Tape {
    return new Tape({ recorder, gradients, accumulate, started: new Set(), options }, { kind: 'training' })
  }

  get recorder(): Recorder {
    return this.pass.recorder
  }

  get options(): ActivationOptions {
    return this.pass.options
  }

  /** Whether a backward pass follows. */
  get training(): boolean {
    return this.mode.kind === 'training'
  }

  /** Registers how to get from the gradient of `output` to those of the inputs. */
  backward(output: Tensor, step: (gradient: Tensor) => void): void {
    if (!this.training) return
    this.later(() => {
      const gradient = this.gradients.get(output)
      if (!gradient) return
      step(gradient)
      this.gradients.delete(output)
    })
  }

  /** What has been found of a tensor's gradient so far, to be passed as `add`. */
  gradient(of: Tensor): Tensor | undefined {
    return this.gradients.get(of)
  }

  setGradient(of: Tensor, gradient: Tensor): void {
    this.gradients.set(of, gradient)
  }

  /** Where the gradient of a tensor has to end up, if that is not left to the operation. */
  place(of: Tensor): Tensor | undefined {
    return this.places.get(of)
  }

  /** Where a parameter's gradient goes, and what it is to be added to: nothing for the first use, itself for others. */
  parameterGradient(parameter: Parameter): { add: Tensor | undefined; out: Tensor } | undefined {
    const { gradients, started, accumulate } = this.pass
    const out = gradients?.of(parameter)
    if (!out) return undefined
    const first = !started.has(parameter) && !accumulate
    started.add(parameter)
    return { add: first ? undefined : out, out }
  }

  /** The parameters have got all of their gradients once the backward pass is back at this point of the forward pass. */
  completes(parameters: readonly Parameter[]): void {
    if (!this.training) return
    const { gradients, recorder } = this.pass
    this.later(() => gradients?.complete?.(parameters, recorder))
  }

  /** What the operations recorded from now on belong to; their backward ones too. */
  part(name: string): void {
    const { recorder } = this
    recorder.place = { ...recorder.place, part: name }
  }

  /** A step of the backward pass, which belongs to the same part of the model. */
  private later(step: () => void): void {
    const { recorder } = this
    const { part } = recorder.place
    this.steps.push(() => {
      recorder.place = { part, phase: 'backward', again: false }
      step()
    })
  }

  /** In the backward pass, the tape of operations that compute what the forward pass computed already. */
  private again(kept?: object[]): Tape {
    const { recorder } = this
    recorder.place = { ...recorder.place, again: true }
    return new Tape(this.pass, kept ? { kind: 'training', kept } : { kind: 'training' })
  }

  /** Records the backward pass. */
  rewind(): void {
    while (this.steps.length > 0) this.steps.pop()!()
  }

  /**
   * What `compute` records. In the forward pass of a checkpoint its results are set aside, and are there again in the
   * backward pass, which then does not compute them a second time.
   */
  keep<T extends object>(compute: () => T): T {
    const result = (this.mode.kept?.shift() as T | undefined) ?? compute()
    this.mode.keep?.push(result)
    if (this.mode.keep) for (const tensor of Object.values(result) as Tensor[]) setPurpose(tensor, 'checkpoint')
    return result
  }

  /**
   * body(x), of which only x is kept for the backward pass: that computes everything else again. `body` is called twice,
   * and must record the same both times.
   */
  checkpoint<T extends readonly Tensor[]>(x: Tensor, body: (tape: Tape, x: Tensor) => T, store?: InputStore): T {
    if (!this.training) return body(this, x)
    const keep: object[] = []
    const outputs = body(new Tape(this.pass, { kind: 'forward', kept: this.mode.kept, keep }), x)
    const kept = store?.put(x)
    if (!store && !this.recorder.place.again) setPurpose(x, 'checkpoint')
    this.later(() => {
      const gradients = outputs.map((output) => this.gradients.get(output))
      for (const output of outputs) this.gradients.delete(output)
      if (gradients.every((gradient) => gradient === undefined)) return
      const input = kept ? store!.take(kept) : x
      const tape = this.again(keep)
      body(tape, input).forEach((output, i) => {
        if (gradients[i]) tape.setGradient(output, gradients[i])
      })
      const before = this.gradient(x)
      if (before) tape.setGradient(input, before)
      const place = this.place(x)
      if (place) tape.places.set(input, place)
      tape.rewind()
      this.setGradient(x, tape.gradient(input)!)
    })
    return outputs
  }

  /**
   * y (N,C) from x (N,C), `rows` at a time: `body` records what leads from a part of x to the same part of y. Row by row
   * the results are those of the whole; only sums over rows, the gradients of parameters, are added up in other parts.
   */
  tiled(x: Tensor, rows: number, body: (tape: Tape, x: Tensor, y: Tensor) => void): Tensor {
    const { recorder } = this
    const [count] = x.dims as [number]
    const y = recorder.scratch(x.dtype, x.dims, 'tiles')
    const starts = Array.from({ length: Math.ceil(count / rows) }, (_, i) => i * rows)
    const part = (of: Tensor, start: number): Tensor => of.rows(start, Math.min(rows, count - start))
    const forward = new Tape(this.pass, { kind: 'forward' })
    for (const start of starts) body(forward, part(x, start), part(y, start))
    this.backward(y, (dy) => {
      const dx = recorder.scratch(x.dtype, x.dims, 'tiles.dx')
      for (const start of starts) {
        const tape = this.again()
        const [from, to] = [part(x, start), recorder.scratch(x.dtype, part(y, start).dims, 'tile')]
        body(tape, from, to)
        tape.places.set(from, part(dx, start))
        tape.setGradient(to, part(dy, start))
        tape.rewind()
      }
      this.setGradient(x, dx)
    })
    return y
  }
}

/**
 * Keeps the inputs of layers in the host's memory. Each is copied while the next layers compute, and copied back while
 * the layers after it, whose turn comes first on the way back, are computed again.
 */
export class InputStore {
  private readonly kept: { input: Tensor; host: Tensor; back?: Tensor }[] = []
  /** Copies that have not been waited for. */
  private underWay: { x: Tensor; y: Tensor } | undefined

  constructor(private readonly recorder: Recorder) {}

  /** From now on, x is needed no more; the number is for `take`. */
  put(x: Tensor): { index: number } {
    this.wait()
    const host = this.recorder.scratch(x.dtype, x.dims, 'checkpoint on the host', true)
    this.start(x, host)
    this.kept.push({ input: x, host })
    return { index: this.kept.length - 1 }
  }

  /** The input again. They are asked for in reverse order. */
  take({ index }: { index: number }): Tensor {
    const entry = this.kept[index]!
    this.fetch(index)
    this.wait()
    if (index > 0) this.fetch(index - 1)
    return entry.back!
  }

  /** The forward pass is over. */
  settle(): void {
    this.wait()
  }

  private fetch(index: number): void {
    const entry = this.kept[index]!
    if (entry.back) return
    this.wait()
    entry.back = this.recorder.scratch(entry.host.dtype, entry.host.dims, 'checkpoint from the host')
    this.start(entry.host, entry.back)
  }

  private start(x: Tensor, y: Tensor): void {
    copyStart(this.recorder, { x, y })
    this.underWay = { x, y }
  }

  private wait(): void {
    if (this.underWay) copyWait(this.recorder, this.underWay)
    this.underWay = undefined
  }
}
