import { rmdir, stat } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { RopewalkError } from '../errors.js'
import { requireSpace } from '../files/durable.js'
import { type Batch, type BatchOptions, readBatch, type Tokens } from '../model/batch.js'
import type { Llama } from '../model/llama.js'
import { checkLora, type Lora } from '../model/lora.js'
import {
  checkpointBytes,
  checkpointName,
  listCheckpoints,
  makeFolder,
  pruneCheckpoints,
  readCheckpoint,
  type TrainerRecord,
  writeCheckpoint,
} from './checkpoint.js'
import { type DataCursor, DataLoader } from './data.js'
import { MetricsLog, type StepResult } from './metrics.js'
import { explainOutOfMemory, fittingMemory, requireFit, type StepShape } from './admit.js'
import { checkMemoryOf, requireLayers, requireMasters } from './memory.js'
import { AdamW } from './optimizer.js'
import { readOptions, requireExact, requirePlain, type Settings, type TrainerOptions } from './options.js'
import { TrainingPasses } from './passes.js'
import { planTraining, type TrainingPlan } from './plan.js'
import {
  checkpointToResume,
  decisiveModel,
  decisiveOptions,
  frozenWeights,
  requireSame,
  savedMemory,
} from './resume.js'
import { measurePeak } from './peak.js'
import { learningRateAt } from './schedule.js'

export type { StepResult } from './metrics.js'
export type { TrainerOptions, TrainerProgress } from './options.js'
export type { TrainingPlan } from './plan.js'

/**
 * Where a run is.
 *
 * @category Training
 */
export interface TrainerState {
  /** Steps done. */
  step: number
  /** Updates applied. */
  applied: number
  /** Updates skipped because loss or gradients were not finite, in all. */
  skipped: number
  /** Those skipped in a row up to now. */
  skippedInARow: number
  /** Tokens trained on. */
  tokens: number
  /** Whether a signal ended the last `run`. */
  interrupted: boolean
}

/**
 * Fine-tunes all weights of a model, or an adapter (option `lora`), by AdamW. What is computed depends on model, data and options alone: two runs, a
 * run that was stopped and resumed, and runs with other numbers of threads end with the same bits.
 *
 * Gradients and optimizer states are allocated at the first step and freed by `dispose`. While a trainer is in use, a
 * bfloat16 model's weights belong to it: what Llama.write changes is replaced at the next update.
 *
 * @category Training
 */
export class Trainer {
  /** Where the run is, up to date whenever `step` or `run` has given a result. */
  readonly state: TrainerState = { step: 0, applied: 0, skipped: 0, skippedInARow: 0, tokens: 0, interrupted: false }
  /** What was unusual: damaged checkpoints that were passed over, caches made again. */
  readonly warnings: string[] = []

  private readonly settings: Settings
  private started: Promise<void> | undefined
  private optimizer: AdamW | undefined
  private passes: TrainingPasses | undefined
  private loader: DataLoader | undefined
  private metrics: MetricsLog | undefined
  /** As read or written last; `data` says where in which data the run is. */
  private data: TrainerRecord['data'] = null
  private savedStep: number | undefined
  /** The folder whose tokenizer goes with checkpoints: the newest one, before the first the model's, if it has any. */
  private companions: string | undefined
  /** Hash of the weights that an adapter's checkpoints do not have. */
  private frozen: string | undefined
  /** The adapter that is trained. */
  private lora: Lora | undefined
  private readonly healthy = new Set<string>()
  private running = false
  /** The shape of steps that are known to fit. */
  private admitted: string | undefined
  private peakFlops: number | undefined
  private disposed = false
  /** Whether the folder of checkpoints was made for this run. */
  private madeOutput = false

  /** Throws TypeError or RangeError for options that are unknown or do not fit each other or the model. */
  constructor(
    /** The model that is trained; it outlives the trainer. */
    readonly model: Llama,
    options: TrainerOptions = {},
  ) {
    this.settings = readOptions(options)
    checkMemoryOf(model.config, this.settings.memory)
    this.peakFlops = this.settings.peakFlops
    const { context, pose, lora, memory } = this.settings
    requireLayers(memory, model.config.layers)
    requireMasters(memory, model.weights.dtype)
    if (context !== undefined) this.requireWindow(context, 'context')
    if (pose) this.requireWindow(pose.length, 'pose.length')
    if (lora) checkLora(model.config, lora)
    requirePlain(model.quantization, this.settings)
    requireExact(model.device)
    this.requireAdapter()
  }

  /**
   * Memory and operations of the steps that `run` takes, for any model, also one on the device `dry`. TypeError where
   * the option `context` is missing.
   */
  plan(): TrainingPlan {
    const time = this.requireContext()
    const { model, settings } = this
    const { batchSize: rows, accumulate, autoMemory } = settings
    const memory = autoMemory ? fittingMemory(model, settings, { rows, time, accumulate }, {}) : settings.memory
    return planTraining(model, { ...settings, memory }, time)
  }

  /**
   * One optimizer step on the given tokens (B,T), as one micro-batch; `data`, `context`, `batchSize` and `accumulate`
   * do not count here. Throws RangeError where T exceeds the context window or no label counts, RopewalkError
   * ERR_NOT_FINITE when `maxSkipped` updates in a row were skipped.
   */
  async step(tokens: Tokens, options: BatchOptions = {}): Promise<StepResult> {
    const batch = readBatch(tokens, this.model.config, options)
    this.requireWindow(batch.time, 'tokens: the row length')
    await this.start({ rows: batch.rows, time: batch.time, accumulate: 1 })
    const result = await this.model.exclusive(() => this.advance([batch], performance.now()))
    this.requireProgress('the tokens given to step()')
    return result
  }

  /**
   * Trains to `steps`, one result a step. Checkpoints and metrics are written before their step's result comes. When
   * `signal` aborts, the step in progress is finished, a checkpoint is saved (with an `output`), and the generator ends
   * without an error; `state.interrupted` is then true. A consumer that leaves the loop gets no last checkpoint; `save`
   * writes one.
   *
   * Throws TypeError where `data` or `context` is missing, RopewalkError ERR_DATA where the data make no window, the
   * codes of document files, ERR_CACHE, ERR_EXISTS, ERR_RESUME, ERR_CHECKPOINT, ERR_NO_SPACE, ERR_WRITE,
   * ERR_OUT_OF_MEMORY, and ERR_NOT_FINITE when `maxSkipped` updates in a row were skipped.
   *
   * @param options Its `signal` ends the run after the step in progress.
   */
  async *run({ signal }: { signal?: AbortSignal } = {}): AsyncGenerator<StepResult> {
    if (this.running) throw new Error('this trainer is already running')
    const { settings, state } = this
    const { output, evaluate } = settings
    this.running = true
    state.interrupted = false
    try {
      const { batchSize: rows, accumulate } = settings
      await this.start({ rows, time: this.requireContext(), accumulate })
      await this.requireRoom()
      const loader = await this.open(signal)
      if (!loader) return
      this.peakFlops ??= await measurePeak(this.model.device, this.model.weights.dtype)
      if (output !== undefined) this.metrics = await MetricsLog.open(join(output, 'metrics.jsonl'), state.step)
      while (state.step < settings.steps && !signal?.aborted) {
        const { result, origin } = await this.advanceOn(loader)
        const { step } = result
        const due = (every: number): boolean => step % every === 0 || step === settings.steps
        if ((this.validates || evaluate) && due(settings.evalEvery)) result.validation = await this.evaluate(loader)
        await this.metrics?.append(result)
        this.requireProgress(origin)
        if (output !== undefined && due(settings.saveEvery)) await this.save()
        yield result
      }
      state.interrupted = state.step < settings.steps
      if (state.interrupted && output !== undefined) await this.save()
    } finally {
      this.running = false
      await this.metrics?.close()
      this.metrics = undefined
      // A run that failed before its first step leaves nothing; a folder with anything in it stays.
      if (this.madeOutput) await rmdir(output!).catch(() => undefined)
      this.madeOutput = false
    }
  }

  /**
   * Writes a checkpoint of the last step into `output`, deletes those beyond `keep`, and gives its path. Throws
   * RopewalkError ERR_NOT_FINITE, ERR_NO_SPACE, ERR_WRITE, ERR_CHECKPOINT; earlier checkpoints and the run's state are
   * then as they were.
   */
  async save(): Promise<string> {
    const { model, settings, state } = this
    const { output, keep, onProgress } = settings
    if (output === undefined) throw new TypeError('save() needs the option output')
    await this.start()
    return model.exclusive(async () => {
      const { step, skipped, skippedInARow, tokens } = state
      if (this.savedStep === step) return join(output, checkpointName(step))
      const optimizer = this.optimizer!
      const record: TrainerRecord = {
        version: 1,
        ...{ step, applied: optimizer.applied, skipped, skippedInARow, tokens },
        options: decisiveOptions(settings),
        model: decisiveModel(model, settings, this.frozen),
        data: this.data,
      }
      await this.metrics?.sync()
      const path = await writeCheckpoint(output, model, optimizer, record, this.companions)
      this.healthy.add(path)
      this.companions = path
      this.savedStep = step
      await pruneCheckpoints(output, keep, this.healthy, (message) => this.warn(message))
      onProgress({ stage: 'checkpoint', path, step })
      return path
    })
  }

  /** Frees gradients, optimizer states and activations; the model stays. Not while a step is at work. */
  dispose(): void {
    this.disposed = true
    this.passes?.dispose()
    this.optimizer?.dispose()
    this.passes = this.optimizer = this.loader = undefined
  }

  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  private get validates(): boolean {
    return this.settings.validation !== undefined
  }

  /** Allocates the optimizer and takes up the checkpoint to resume, once, if steps of this shape can fit. */
  private start(shape?: StepShape): Promise<void> {
    if (this.disposed) return Promise.reject(new Error('this trainer was disposed'))
    this.started ??= this.model
      .exclusive(() => this.prepare(shape))
      .catch((error: unknown) => {
        this.started = undefined
        throw error
      })
    return this.started
  }

  private async prepare(shape: StepShape | undefined): Promise<void> {
    const { model, settings } = this
    if (model.device.dry) throw new Error('the dry device plans, it does not train: load the model on another device')
    const checkpoint = await checkpointToResume(settings, (message) => this.warn(message))
    this.requireAdapter()
    model.releasePasses()
    if (settings.autoMemory && shape) {
      settings.memory = fittingMemory(model, settings, shape, checkpoint ? savedMemory(checkpoint.record) : {})
      settings.autoMemory = false
    }
    this.frozen = settings.lora && (await frozenWeights(model, settings.lora))
    if (checkpoint) requireSame(checkpoint.path, checkpoint.record, settings, model, this.frozen)
    // A model that was made, not loaded, may have no folder; one that has is not to lose its tokenizer in silence.
    const folder = await stat(model.path).catch(() => undefined)
    this.companions = folder?.isDirectory() ? model.path : undefined
    if (shape) this.admit(shape)
    const added = settings.lora !== undefined && !model.lora
    let optimizer: AdamW | undefined
    try {
      if (settings.lora && added) await model.addAdapter(settings.lora, settings.seed)
      if (!settings.lora || settings.lora.alsoTrain.length > 0) await model.own()
      const segments = (model.lora ?? model.weights).segments()
      optimizer = new AdamW(segments, settings, (message) => this.warn(message))
      await optimizer.reset()
      if (checkpoint) {
        await readCheckpoint(checkpoint.path, model, optimizer)
        await model.requireFinite()
        const { step, applied, skipped, skippedInARow, tokens, data } = checkpoint.record
        Object.assign(this.state, { step, applied, skipped, skippedInARow, tokens })
        optimizer.applied = applied
        this.data = data
        this.companions = checkpoint.path
        this.healthy.add(checkpoint.path)
        const own = settings.output !== undefined && resolve(settings.output, checkpointName(step))
        if (resolve(checkpoint.path) === own) this.savedStep = step
        settings.onProgress({ stage: 'resume', path: checkpoint.path, step })
      }
      this.optimizer = optimizer
      this.lora = model.lora
    } catch (error) {
      optimizer?.dispose()
      if (added) model.dropAdapter()
      throw explainOutOfMemory(error, model, settings, shape)
    }
  }

  /** Refuses before the first step what the disk could not hold after hours. */
  private async requireRoom(): Promise<void> {
    const { output, keep, saveEvery, steps } = this.settings
    const left = steps - this.state.step
    if (output === undefined || left <= 0) return
    const present = (await listCheckpoints(output)).length
    // While one is written, `keep` older ones may stand beside it.
    const more = Math.max(1, Math.min(keep + 1 - present, Math.ceil(left / saveEvery)))
    const needed = more * checkpointBytes(this.model.weights, this.lora, this.optimizer!)
    this.madeOutput = await makeFolder(output, needed)
    await requireSpace(output, needed)
  }

  /** The loader, with the data checked against those of a resumed run; undefined where the signal ended its work. */
  private async open(signal: AbortSignal | undefined): Promise<DataLoader | undefined> {
    if (this.loader) return this.loader
    const { model, settings } = this
    const { data } = settings
    if (!data) throw new TypeError('run() needs the option data: files or folders of documents')
    const tokenizer = await model.tokenizer()
    const eosId = settings.appendEos === false ? undefined : (tokenizer.eosId ?? model.config.eosIds[0])
    if (settings.appendEos && eosId === undefined) {
      throw new RopewalkError('ERR_TOKENIZER', `appendEos: ${model.path} names no end-of-sequence token`)
    }
    let loader: DataLoader
    try {
      const onWarning = (message: string): void => this.warn(message)
      loader = await DataLoader.open(
        { ...settings, data, context: settings.context!, eosId, signal, onWarning },
        tokenizer,
      )
    } catch (error) {
      if (!signal?.aborted || error instanceof RopewalkError) throw error
      this.state.interrupted = true
      return undefined
    }
    const saved = this.data
    if (saved && (saved.hash !== loader.hash || saved.tokenizer !== tokenizer.hash)) {
      throw new RopewalkError(
        'ERR_RESUME',
        saved.tokenizer === tokenizer.hash
          ? `${this.companions}: the data are not those of the run that wrote this checkpoint (their files, field or fields, ` +
              'appendEos or validation differ): give the same data, or start anew from the checkpoint with Llama.load'
          : `${this.companions}: the tokenizer is not the one of the run that wrote this checkpoint`,
      )
    }
    this.data = { hash: loader.hash, tokenizer: tokenizer.hash, cursor: saved?.cursor ?? { epoch: 0, index: 0 } }
    return (this.loader = loader)
  }

  /** The next step on the data; the place in the data moves with the weights or not at all. */
  private advanceOn(loader: DataLoader): Promise<{ result: StepResult; origin: string }> {
    const { model, settings } = this
    return model.exclusive(async () => {
      const began = performance.now()
      let cursor: DataCursor = this.data!.cursor
      const batches: Batch[] = []
      const origin: string[] = []
      for (let i = 0; i < settings.accumulate; i++) {
        const { sample, cursor: after } = await loader.next(cursor, settings.batchSize)
        batches.push(readBatch(sample.tokens, model.config, sample.options))
        origin.push(...sample.origin)
        cursor = after
      }
      const result = await this.advance(batches, began)
      this.data = { ...this.data!, cursor }
      return { result, origin: origin.join(', ') }
    })
  }

  private async advance(batches: readonly Batch[], began: number): Promise<StepResult> {
    const { settings, state, model } = this
    const { rows, time } = batches[0]!
    if (model.lora !== this.lora) {
      throw new Error("the model's adapter was merged or added since this trainer began: make a new Trainer")
    }
    if (!batches.some(({ targets }) => targets > 0)) {
      throw new RangeError(
        'no label counts: every row needs at least two tokens, and a label that is not -100 after the first',
      )
    }
    const learningRate = learningRateAt(state.step, settings)
    const passes = this.passesFor(rows, time, batches.length)
    const { loss, gradNorm, applied } = await passes.step(batches, learningRate)
    const seconds = (performance.now() - began) / 1000
    const tokens = rows * time * batches.length
    state.step++
    state.tokens += tokens
    state.applied = this.optimizer!.applied
    state.skipped += applied ? 0 : 1
    state.skippedInARow = applied ? 0 : state.skippedInARow + 1
    const flopsPerSecond = passes.flops / seconds
    const result: StepResult = {
      ...{ step: state.step, loss, gradNorm, learningRate, tokens, seconds },
      ...{ tokensPerSecond: tokens / seconds, flopsPerSecond, skipped: !applied },
    }
    if (this.peakFlops !== undefined) result.mfu = flopsPerSecond / this.peakFlops
    return result
  }

  /** Refuses what cannot fit, before it is allocated; once for steps of one shape. */
  private admit({ rows, time, accumulate }: StepShape): void {
    const shape = [rows, time, accumulate].join()
    if (this.admitted === shape) return
    requireFit(this.model, this.settings, { rows, time, accumulate })
    this.admitted = shape
  }

  /** The passes for micro-batches of a shape; those of one shape are held at a time. */
  private passesFor(rows: number, time: number, accumulate: number): TrainingPasses {
    const { passes, model, validates } = this
    const same = passes?.rows === rows && passes.time === time && passes.accumulate === accumulate
    if (same && passes.version === model.weights.version) return passes
    passes?.dispose()
    this.passes = undefined
    model.releasePasses()
    this.admit({ rows, time, accumulate })
    const optimizer = this.optimizer!
    const { memory } = this.settings
    const warn = (message: string): void => this.warn(message)
    const shape = [rows, time, accumulate] as const
    try {
      this.passes = new TrainingPasses(model.config, model.weights, optimizer, ...shape, validates, memory, warn)
    } catch (error) {
      throw explainOutOfMemory(error, model, this.settings, { rows, time, accumulate })
    }
    return this.passes
  }

  private async evaluate(loader: DataLoader): Promise<Record<string, number>> {
    const { model, settings } = this
    const figures: Record<string, number> = {}
    if (this.validates) figures.loss = await model.exclusive(() => this.validationLoss(loader))
    if (settings.evaluate) {
      Object.assign(figures, await settings.evaluate(this))
      model.releasePasses()
    }
    return figures
  }

  private async validationLoss(loader: DataLoader): Promise<number> {
    const { batchSize, accumulate, context } = this.settings
    const passes = this.passesFor(batchSize, context!, accumulate)
    let sum = 0
    let targets = 0
    for await (const { sample, count } of loader.validation(batchSize)) {
      const batch = readBatch(sample.tokens, this.model.config, sample.options)
      const nll = await passes.losses(batch)
      for (let n = 0; n < count * batch.time; n++) {
        sum += nll[n]!
        if (batch.labels[n]! >= 0) targets++
      }
    }
    return sum / targets
  }

  /** Ends a run that no longer moves. */
  private requireProgress(origin: string): void {
    const { step, skippedInARow } = this.state
    if (skippedInARow === 0 || skippedInARow < this.settings.maxSkipped) return
    throw new RopewalkError(
      'ERR_NOT_FINITE',
      `step ${step}: the loss or the gradients were not finite in ${skippedInARow} steps in a row; the last batch was ${origin}. ` +
        'Weights and optimizer are as they were before: look at these tokens, or use a lower learning rate',
    )
  }

  private requireContext(): number {
    const { context } = this.settings
    if (context === undefined) throw new TypeError('the option context is missing: the tokens in a training window')
    return context
  }

  /** An adapter that is there is what is trained, or in the way. */
  private requireAdapter(): void {
    const { adapter } = this.model
    const { lora } = this.settings
    if (!adapter || JSON.stringify(adapter) === JSON.stringify(lora)) return
    throw new RangeError(
      `the model has an adapter (${JSON.stringify(adapter)}), ` +
        (lora ? `but the option lora is ${JSON.stringify(lora)}` : 'but the option lora is not given') +
        ': give lora: model.adapter to go on training it, or merge() it first',
    )
  }

  private requireWindow(length: number, name: string): void {
    const { contextWindow } = this.model
    if (length <= contextWindow) return
    const factor = Math.ceil(length / contextWindow)
    throw new RangeError(
      `${name} is ${length}, but the model's context window is ${contextWindow}: ` +
        `load it with rope: { type: 'linear', factor: ${factor} } to stretch it`,
    )
  }

  private warn(message: string): void {
    this.warnings.push(message)
    this.settings.onProgress({ stage: 'warning', message })
  }
}
