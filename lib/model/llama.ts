import { stat } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { quote, RopewalkError } from '../errors.js'
import { openAdapterFolder } from '../files/adapter.js'
import { type ModelFolder, openModelFolder } from '../files/folder.js'
import { saveAdapterFolder, saveModelFolder } from '../files/save.js'
import { loadTokenizer, type Tokenizer } from '../files/tokenizer.js'
import type { Device } from '../runtime/device.js'
import { type DType, isQuantized } from '../runtime/tensor.js'
import {
  type Batch,
  type BatchOptions,
  type HostTensor,
  mean,
  readBatch,
  requireTargets,
  type Tokens,
} from './batch.js'
import {
  contextWindow,
  extendConfig,
  type LlamaConfig,
  parameterShapes,
  readConfig,
  unscaled,
  writeConfig,
} from './config.js'
import { requireFinite } from './finite.js'
import { initialize } from './initialize.js'
import { Continuation, type GeneratedToken, type GenerateOptions, sampler } from './generate.js'
import { checkLoadOptions, checkpointDtype, checkTensors, type LoadOptions, loadWeights, openFor } from './load.js'
import { Lora, type LoraOptions, type LoraSettings } from './lora.js'
import { Parameters } from './parameters.js'
import { gradientsOf, type Pass, PassCache, type PassKind, recordPass, runPass, runScored } from './passes.js'
import { adapterPositions, checkAdapter, readAdapter, writeAdapter } from './peft.js'
import { chooseScored } from './scored.js'
import { checkValues, readValues, writeValues } from './values.js'

/**
 * Options of {@link Llama.create}; dtype is float32 unless given.
 *
 * @category Models
 */
export interface CreateOptions extends Pick<LoadOptions, 'device' | 'dtype' | 'activations' | 'threads'> {
  /** Of the random weights; the same seed gives the same model. Default 0. */
  seed?: number
  /** A folder whose tokenizer the model uses, and takes along when it is saved. */
  tokenizer?: string
}

/**
 * Options of {@link Llama.save}.
 *
 * @category Models
 */
export interface SaveOptions {
  /** Replaces a saved model or adapter, which stays complete until the new one is; other files in its folder are an error. */
  overwrite?: boolean
  /** Largest weight file in bytes, beyond which there are shards and an index; default 5e9, as in transformers. */
  maxShardBytes?: number
}

const DTYPE_OF = { float32: 'f32', bfloat16: 'bf16' } as const satisfies Record<string, DType>
const FILE_DTYPE_OF = { float32: 'F32', bfloat16: 'BF16' } as const

/**
 * A LLaMA on a device. Every method that computes is asynchronous; calls on one model run one after the other, and
 * reject with RopewalkError ERR_OUT_OF_MEMORY where the device has too little memory. Rows may be longer than
 * `contextWindow`: the model then extrapolates. `dispose()` or `using` frees it.
 *
 * @category Models
 */
export class Llama {
  private readonly passes = new PassCache()
  private queue: Promise<unknown> = Promise.resolve()
  private disposed = false
  /** Calls that are waiting or at work. */
  private open = 0
  private cachedTokenizer: Tokenizer | undefined
  /** @internal What `adapter` describes. */
  lora: Lora | undefined

  private constructor(
    /** Dimensions and positions; an extension of the context is already in it. */
    readonly config: LlamaConfig,
    /** Where it runs. It belongs to the model. */
    readonly device: Device,
    /** @internal */
    readonly weights: Parameters,
    /** The folder it came from; of a new model, that of its tokenizer. */
    readonly path: string,
    /** What was unusual about the folder. */
    readonly warnings: string[],
    private readonly folder: Partial<Pick<ModelFolder, 'dir' | 'generationConfig' | 'tokenizerPath'>>,
  ) {}

  /**
   * Loads a Hugging Face folder (config.json, safetensors, tokenizer.json).
   *
   * Throws RopewalkError for a folder, config or file that does not serve (ERR_NOT_FOUND, ERR_CONFIG, ERR_TENSORS,
   * ERR_SAFETENSORS, ERR_PICKLE, ERR_NOT_FINITE ...) and for the device (ERR_DEVICE_UNAVAILABLE, ERR_OUT_OF_MEMORY),
   * TypeError or RangeError for options, also for a `rope` that cannot be put on top of the checkpoint's.
   */
  static async load(path: string, options: LoadOptions = {}): Promise<Llama> {
    checkLoadOptions(path, options)
    const folder = await openModelFolder(path)
    let device: Device | undefined
    try {
      let config = readConfig(folder.config, `${path}/config.json`)
      if (options.rope) config = options.rope === 'none' ? unscaled(config) : extendConfig(config, options.rope)
      const warnings = [...folder.warnings]
      const adapter = options.adapter === undefined ? undefined : await openAdapterFolder(options.adapter)
      if (adapter) config = adapterPositions(config, adapter, options.rope !== undefined, warnings)
      const changesBase = adapter && checkAdapter(adapter, config).settings.alsoTrain.length > 0
      checkTensors(folder, config, path, warnings)
      const dtype = options.dtype ?? checkpointDtype(folder)
      device = openFor(dtype, options)
      const weights = await loadWeights(folder, config, device, DTYPE_OF[dtype], options)
      const { generationConfig, tokenizerPath } = folder
      const kept = {
        dir: resolve(folder.dir),
        generationConfig,
        tokenizerPath: tokenizerPath && resolve(tokenizerPath),
      }
      const model = new Llama(config, device, weights, path, warnings, kept)
      if (changesBase) await weights.own()
      if (adapter) model.lora = await readAdapter(adapter, weights, config)
      return model
    } catch (error) {
      device?.dispose()
      throw error
    } finally {
      await folder.close()
    }
  }

  /**
   * A new model with random weights, for training from scratch: matrices normal with deviation initializer_range (0.02),
   * norms 1, as transformers initialises them. `config` is the content of a config.json; RopewalkError ERR_CONFIG where
   * it describes no LLaMA.
   */
  static async create(config: Record<string, unknown>, options: CreateOptions = {}): Promise<Llama> {
    const { seed = 0, tokenizer: dir, dtype = 'float32', ...rest } = options
    checkLoadOptions('new model', { dtype, ...rest })
    const read = readConfig(config, 'config')
    const device = openFor(dtype, rest)
    try {
      const weights = new Parameters(device, DTYPE_OF[dtype], parameterShapes(read))
      if (!device.dry) await initialize(weights, (config.initializer_range as number | undefined) ?? 0.02, seed)
      const folder = dir === undefined ? {} : { dir, tokenizerPath: join(dir, 'tokenizer.json') }
      return new Llama(read, device, weights, dir ?? 'new model', [], folder)
    } catch (error) {
      device.dispose()
      throw error
    }
  }

  /** How the weights are kept. */
  get dtype(): 'float32' | 'bfloat16' {
    return this.weights.dtype === 'bf16' ? 'bfloat16' : 'float32'
  }

  /** How the matrices of the blocks are kept, where {@link LoadOptions} `quantize` has rounded them. */
  get quantization(): 'nf4' | 'int8' | undefined {
    return this.weights.quantization
  }

  /** The longest context, in tokens, that the config promises. */
  get contextWindow(): number {
    return contextWindow(this.config)
  }

  /** The adapter that is part of what the model computes: from {@link LoadOptions} or a {@link Trainer}. */
  get adapter(): Required<LoraOptions> | undefined {
    return this.lora && { ...this.lora.settings }
  }

  /** Number of weights, those of an adapter not counted. */
  get parameterCount(): number {
    return this.weights.count
  }

  /** Names (Hugging Face's), dims and dtypes of all parameters, in the order of the model. */
  parameters(): { name: string; dims: number[]; type: 'float32' | 'bfloat16' | 'nf4' | 'int8' }[] {
    const { dtype } = this
    return Array.from(this.weights, ({ name, value }) => {
      return { name, dims: [...value.dims], type: isQuantized(value.dtype) ? value.dtype : dtype }
    })
  }

  /**
   * The folder's tokenizer. Throws RopewalkError ERR_NOT_FOUND where there is none, ERR_TOKENIZER where it cannot be
   * used or knows ids that the embedding has no row for.
   */
  async tokenizer(): Promise<Tokenizer> {
    if (!this.cachedTokenizer) {
      const tokenizer = await loadTokenizer(this.folder.tokenizerPath ?? this.path)
      if (tokenizer.maxId >= this.config.vocabSize) {
        throw new RopewalkError(
          'ERR_TOKENIZER',
          `${this.path}: the tokenizer has ids up to ${tokenizer.maxId}, but the embedding has ${this.config.vocabSize} ` +
            'rows (vocab_size): this tokenizer belongs to another model',
        )
      }
      this.cachedTokenizer = tokenizer
    }
    return this.cachedTokenizer
  }

  /** tokens (B,T) -> logits (B,T,V): entry t scores what comes after token t. */
  async logits(tokens: Tokens, options: Omit<BatchOptions, 'labels'> = {}): Promise<HostTensor<Float32Array>> {
    const batch = readBatch(tokens, this.config, options)
    const data = await this.exclusive(() => this.runPass('logits', batch))
    return { type: 'float32', dims: [batch.rows, batch.time, this.config.vocabSize], data }
  }

  /** Mean negative log-likelihood, in nats, of the labels that count (transformers' loss). RangeError if none does. */
  async loss(tokens: Tokens, options: BatchOptions = {}): Promise<number> {
    const batch = readBatch(tokens, this.config, options)
    requireTargets(batch)
    const nll = await this.exclusive(() => this.losses(batch))
    return mean(nll, batch)
  }

  /**
   * Negative log-likelihood (B,T) of each label; entry t is about token t + 1, 0 where nothing is predicted. Of tokens
   * whose label is -100 only what the others see of them is computed.
   */
  async tokenLosses(tokens: Tokens, options: BatchOptions = {}): Promise<HostTensor<Float32Array>> {
    const batch = readBatch(tokens, this.config, options)
    const data = await this.exclusive(() => this.losses(batch))
    return { type: 'float32', dims: [batch.rows, batch.time], data }
  }

  /**
   * Gradients of `loss` by Hugging Face parameter name, with the parameter's dims, in float32 (4 bytes a weight, on the
   * device and here); a tied embedding is one parameter. With an adapter, its own come with them, under names such as
   * model.layers.0.self_attn.q_proj.lora_A.weight. RangeError where no label counts.
   */
  async gradients(tokens: Tokens, options: BatchOptions = {}): Promise<Map<string, HostTensor<Float32Array>>> {
    const batch = readBatch(tokens, this.config, options)
    requireTargets(batch)
    const { device, config, weights } = this
    return this.exclusive(() => {
      const groups = this.lora ? [weights, this.lora.parameters] : [weights]
      return gradientsOf(device, config, groups, batch)
    })
  }

  /**
   * A parameter's values, in the model's dtype; of an adapter's in float32, and of a quantised one those that it stands
   * for, in float32. RangeError for an unknown name.
   */
  async read(name: string): Promise<HostTensor<Float32Array | Uint16Array>> {
    const parameter = this.find(name)
    return this.exclusive(() => readValues(this.device, parameter.value))
  }

  /**
   * Replaces a parameter's values. The tensor must have its dims (else RangeError) and be float32 or bfloat16 (else
   * TypeError); it becomes the model's dtype, float32 rounded to the nearest bfloat16, ties to even. For a quantised
   * parameter it is quantised, and must be finite (else RangeError).
   */
  async write(name: string, tensor: HostTensor): Promise<void> {
    const parameter = this.find(name)
    const data = checkValues(name, tensor, parameter.value)
    await this.exclusive(async () => {
      if (this.weights.has(name) && !isQuantized(parameter.value.dtype)) await this.own()
      await writeValues(this.device, data, parameter.value)
    })
  }

  /**
   * Continues a text token by token, each at the cost of one token: keys and values are kept. Ends after maxTokens, at
   * a stop id (which is not given), or where the window is full (a prompt beyond the window is continued all the same).
   *
   * Throws RangeError for options out of range, RopewalkError ERR_NOT_FINITE for a logit that is NaN, and what
   * `tokenizer` throws where the prompt is a text.
   */
  async *generate(options: GenerateOptions): AsyncGenerator<GeneratedToken> {
    const { maxTokens = 64, stopIds = this.stopIds(), cache, signal } = options
    if (!Number.isInteger(maxTokens) || maxTokens < 1) throw new RangeError(`maxTokens is ${maxTokens}, must be >= 1`)
    const choose = sampler(options)
    const tokenizer = this.folder.tokenizerPath ? await this.tokenizer() : undefined
    if (typeof options.prompt === 'string' && !tokenizer) await this.tokenizer() // throws, and says what is missing
    const prompt = typeof options.prompt === 'string' ? tokenizer!.encode(options.prompt) : [...options.prompt]
    const { ids } = readBatch([prompt], this.config)
    // A text inside the window ends with it; one that is already beyond (a baseline that extrapolates) goes on.
    const whole = ids.length + maxTokens
    const capacity = ids.length < this.contextWindow ? Math.min(whole, this.contextWindow) : whole
    const { device, config, weights } = this
    const text = await this.exclusive(async () =>
      cache ? cache.take(device, config, weights, capacity) : new Continuation(device, config, weights, capacity),
    )
    // Decoders of the SentencePiece kind drop the first space of a text: the prompt's end keeps that from ours.
    const written = prompt.slice(-8)
    const decode = (): string => completeText(tokenizer!.decode(written, { skipSpecialTokens: true }))
    let shown = tokenizer ? decode() : ''
    try {
      let logits = await this.exclusive(() => text.start(prompt, signal))
      for (let i = 0; i < capacity - ids.length; i++) {
        signal?.throwIfAborted()
        const id = choose(logits)
        if (stopIds.includes(id)) return
        written.push(id)
        const said = tokenizer ? decode() : ''
        yield { id, text: said.slice(shown.length) }
        shown = said
        if (text.length < capacity - 1 && i + 1 < capacity - ids.length) {
          logits = await this.exclusive(() => text.feed([id], signal))
        }
      }
    } finally {
      // The caller may stop in the middle, and the model may be gone by then.
      if (cache) cache.release()
      else if (!this.disposed) await this.exclusive(async () => text.dispose())
    }
  }

  /**
   * Writes a Hugging Face folder, whole or not at all: config.json with the new positions, weights, tokenizer. Throws
   * RopewalkError ERR_EXISTS, ERR_NO_SPACE, ERR_WRITE, and ERR_NOT_FINITE where a weight is NaN or infinite. A model
   * with an adapter has to be merged first; one that is quantised is not saved (Error).
   */
  async save(path: string, options: SaveOptions = {}): Promise<void> {
    if (this.lora) throw new Error('this model has an adapter: merge() it first, or saveAdapter() to save it alone')
    if (this.quantization) {
      throw new Error(
        `this model is quantised (${this.quantization}), and less exact than ${this.path}: load it without quantize to save it`,
      )
    }
    await this.exclusive(async () => {
      await this.requireFinite()
      const fileDtype = FILE_DTYPE_OF[this.dtype]
      await saveModelFolder(path, {
        config: writeConfig(this.config, this.dtype) as never,
        tensors: Array.from(this.weights, ({ name, value }) => ({
          name,
          dtype: fileDtype,
          dims: [...value.dims],
          bytes: value.bytes,
          data: () => this.device.downloadChunks(value),
        })),
        generationConfig: this.folder.generationConfig,
        ...(await this.companions()),
        ...options,
      })
    })
  }

  /**
   * Makes the adapter a part of the weights: W + (alpha / rank) B A, computed in float32 and rounded once. The adapter is
   * gone then. Throws an Error where there is none.
   *
   * Of a quantised model, W are the dequantised weights, rounded to the model's dtype; they stay so, and take as much
   * memory as if they had never been quantised. What the checkpoint has lost by quantising is not in the sum: to merge
   * into the checkpoint's own weights, load it without `quantize` and with the adapter.
   */
  async merge(): Promise<void> {
    await this.exclusive(async () => {
      const lora = this.requireLora()
      await this.own()
      await this.weights.dequantize()
      await lora.merge()
      this.dropAdapter()
    })
  }

  /**
   * Writes the adapter as PEFT reads it, whole or not at all: adapter_config.json, adapter_model.safetensors, and in
   * config.json the positions that it was trained with, which {@link LoadOptions} `adapter` takes up. Throws what `save`
   * throws, and an Error where there is no adapter.
   */
  async saveAdapter(path: string, { overwrite = false }: Pick<SaveOptions, 'overwrite'> = {}): Promise<void> {
    await this.exclusive(async () => {
      const lora = this.requireLora()
      await this.requireFinite()
      await saveAdapterFolder(path, { ...writeAdapter(lora, this.config, this.dtype, this.path), overwrite })
    })
  }

  /** Frees the device. Throws, and changes nothing, while a call is still at work. */
  dispose(): void {
    if (this.disposed) return
    if (this.open > 0) throw new Error('this model is still at work: await its calls before it is disposed')
    this.device.dispose()
    this.disposed = true
    this.passes.clear()
  }

  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /** The folder whose tokenizer goes with the model. That it is gone must not keep trained weights from being saved. */
  private async companions(): Promise<{ copyFrom?: string }> {
    const { dir } = this.folder
    if (dir === undefined) return {}
    const there = await stat(dir).then(
      (info) => info.isDirectory(),
      () => false,
    )
    if (there) return { copyFrom: dir }
    this.warnings.push(`${dir} is gone: the model is saved without its tokenizer`)
    return {}
  }

  /** End-of-sequence ids of config.json and of generation_config.json, which may name more. */
  private stopIds(): number[] {
    const more = this.folder.generationConfig?.eos_token_id
    const ids = Array.isArray(more) ? more : [more]
    return [...this.config.eosIds, ...ids.filter((id) => typeof id === 'number')]
  }

  /** @internal Runs `body` when all earlier calls are done; nothing else uses the model meanwhile. */
  async exclusive<T>(body: () => Promise<T>): Promise<T> {
    if (this.disposed) throw new Error('this model was disposed')
    this.open++
    const result = this.queue.then(body)
    this.queue = result.catch(() => undefined)
    try {
      return await result
    } finally {
      this.open--
    }
  }

  /** @internal Frees the passes kept for repeated calls. */
  releasePasses(): void {
    this.passes.clear()
  }

  /** @internal Before weights are changed, inside `exclusive`: copies them out of their files, if they are still there. */
  async own(): Promise<void> {
    if (!this.weights.mapped) return
    await this.weights.own()
    this.passes.clear()
  }

  /** @internal Throws, naming the first, where a weight is NaN or infinite. */
  async requireFinite(): Promise<void> {
    await requireFinite(this.weights, this.path)
    if (this.lora) await requireFinite(this.lora.parameters, 'adapter')
  }

  /** @internal Inside `exclusive`: a new adapter, which changes nothing yet. */
  async addAdapter(settings: LoraSettings, seed: number): Promise<void> {
    this.passes.clear()
    this.lora = new Lora(this.weights, this.config, settings)
    await this.lora.initialize(seed).catch((error: unknown) => {
      this.dropAdapter()
      throw error
    })
  }

  /** @internal Inside `exclusive`. */
  dropAdapter(): void {
    this.passes.clear()
    this.lora?.dispose()
    this.lora = undefined
  }

  private requireLora(): Lora {
    if (!this.lora) throw new Error('this model has no adapter: load one with it, or train one (Trainer, option lora)')
    return this.lora
  }

  private async losses(batch: Batch): Promise<Float32Array> {
    const scored = chooseScored(batch)
    if (!scored) return this.runPass('loss', batch)
    return runScored(this.device, this.config, this.pass('loss', batch, scored.count), batch, scored)
  }

  private async runPass(kind: PassKind, batch: Batch): Promise<Float32Array> {
    return runPass(this.device, this.config, this.pass(kind, batch), batch)
  }

  private pass(kind: PassKind, { rows, time }: Batch, scored?: number): Pass {
    const { device, config, weights } = this
    if (device.dry) throw new Error('the dry device plans, it does not compute: load the model on another device')
    return this.passes.get(kind, rows, time, scored, () =>
      recordPass(device, config, weights, kind, rows, time, scored === undefined ? {} : { scored }),
    )
  }

  private find(name: string) {
    if (this.lora?.parameters.has(name)) return this.lora.parameters.get(name)
    if (!this.weights.has(name)) {
      throw new RangeError(
        `no parameter is called ${quote(name)}; parameters() lists them` +
          (name === 'lm_head.weight' ? ' (this model is tied: it is model.embed_tokens.weight)' : ''),
      )
    }
    return this.weights.get(name)
  }
}

/** Without the replacement characters at the end, which stand for the beginning of a character yet to come. */
const completeText = (text: string): string => text.replace(/\uFFFD+$/, '')
