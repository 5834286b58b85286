import { mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { writeFileDurable } from '../files/durable.js'
import { loadTokenizer } from '../files/tokenizer.js'
import { Llama, Trainer } from '../index.js'
import { Corpus, Dice, type Mixture, sampleText } from './data.js'
import { losses, mean, meanLosses, retrieves } from './measure.js'
import { BEGIN, END, trainTokenizer } from './tokenizer.js'

/** The base model's window: the L of the paper. */
export const WINDOW = 256
const VOCABULARY = 736

const CONFIG = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_act: 'silu',
  hidden_size: 128,
  intermediate_size: 352,
  num_hidden_layers: 4,
  num_attention_heads: 2,
  num_key_value_heads: 2,
  vocab_size: VOCABULARY,
  max_position_embeddings: WINDOW,
  rope_theta: 10000,
  rms_norm_eps: 1e-6,
  initializer_range: 0.02,
  tie_word_embeddings: true,
  bos_token_id: VOCABULARY - 2,
  eos_token_id: VOCABULARY - 1,
}

interface Stage extends Mixture {
  steps: number
  rows: number
  window: number
  learningRate: number
  schedule: 'constant' | 'cosine'
}

/**
 * Copying is learned first, in short windows half of which are refrains; then to find what was said about whom, and a
 * key with little around it; then both in the whole window. Without the middle stage no key was found within 5.6M
 * tokens, where that run was stopped; with it the first at 3.6M and all from 8.7M on.
 */
const STAGES: readonly Stage[] = [
  {
    ...{ steps: 750, rows: 32, window: 64, learningRate: 2e-3, schedule: 'constant' },
    ...{ people: [1, 2], passkeys: 0, refrains: 0.5 },
  },
  {
    ...{ steps: 1500, rows: 16, window: 128, learningRate: 2e-3, schedule: 'constant' },
    ...{ people: [1, 4], passkeys: 0.35, refrains: 0.25 },
  },
  {
    ...{ steps: 5000, rows: 8, window: WINDOW, learningRate: 2e-3, schedule: 'cosine' },
    ...{ people: [3, 10], passkeys: 0.35, refrains: 0.15 },
  },
]

/** A line of the training curve. */
export interface CurvePoint {
  tokens: number
  learningRate: number
  /** Mean training loss since the last point. */
  loss: number
  /** On texts of this many tokens, perplexity of the second half of unseen prose, and the share of keys found. */
  context: number
  perplexity: number
  passkey: number
}

export interface BaseOptions {
  signal?: AbortSignal
  onPoint?: (point: CurvePoint) => void
  /** A fraction of the steps, for tests and for studies of training length. */
  scale?: number
  /** What differs from the demo's config.json, for studies of size. */
  shape?: Readonly<Record<string, number>>
  threads?: number
}

/**
 * Trains the demo's base model from nothing, with fixed seeds, and writes it to `folder` as a Hugging Face folder in
 * bfloat16, with its tokenizer and its training curve (training.json). The folder is replaced at the end.
 */
export async function trainBase(folder: string, options: BaseOptions = {}): Promise<void> {
  const { signal, onPoint, scale = 1, shape, threads } = options
  const config = { ...CONFIG, ...shape }
  const work = `${folder}.tmp-${process.pid}`
  try {
    await mkdir(work, { recursive: true })
    const json = (value: unknown): string => `${JSON.stringify(value, null, 2)}\n`
    await writeFileDurable(join(work, 'tokenizer.json'), json(trainTokenizer(sampleText(1, 300), VOCABULARY)))
    const settings = { tokenizer_class: 'PreTrainedTokenizerFast', bos_token: BEGIN, eos_token: END }
    await writeFileDurable(join(work, 'tokenizer_config.json'), json({ ...settings, model_max_length: WINDOW }))
    using model = await Llama.create(config, {
      seed: 1,
      tokenizer: work,
      ...(threads === undefined ? {} : { threads }),
    })
    const corpus = new Corpus(await loadTokenizer(work))
    const curve: CurvePoint[] = []
    const started = performance.now()
    let tokens = 0
    for (const [number, stage] of STAGES.entries()) {
      const steps = Math.ceil(stage.steps * scale)
      const { learningRate, schedule, rows, window } = stage
      const common = { learningRate, schedule, steps, finalFraction: 0.05, warmupSteps: Math.min(100, steps) }
      using trainer = new Trainer(model, { ...common, maxGradNorm: 1, weightDecay: 0.01 })
      const dice = new Dice(100 + number)
      let since: number[] = []
      for (let step = 1; step <= steps; step++) {
        signal?.throwIfAborted()
        const batch = Array.from({ length: rows }, () => corpus.window(dice, window, stage))
        const result = await trainer.step(batch)
        tokens += result.tokens
        since.push(result.loss)
        if (step % 250 !== 0 && step !== steps) continue
        const point = {
          tokens,
          learningRate: result.learningRate,
          loss: mean(since),
          ...(await test(model, corpus, Math.max(128, window))),
        }
        since = []
        curve.push(point)
        onPoint?.(point)
      }
    }
    await saveAsBfloat16(model, config, work, folder)
    const seconds = Math.round((performance.now() - started) / 1000)
    const description = { parameters: model.parameterCount, tokens, seconds, device: model.device.description }
    await writeFileDurable(join(folder, 'training.json'), json({ ...description, curve }))
  } finally {
    await rm(work, { recursive: true, force: true })
  }
}

/** What the curve shows of a model, always on the same texts. */
async function test(model: Llama, corpus: Corpus, context: number) {
  const dice = new Dice(7)
  const texts = Array.from({ length: 64 }, () => corpus.prose(dice, 4, context))
  const prompts = Array.from({ length: 64 }, () => corpus.prompt(dice, context))
  const nll = mean(meanLosses(await losses(model, texts), context / 2, context - 1))
  const found = await retrieves(model, prompts)
  return { context, perplexity: Math.exp(nll), passkey: mean(found.map(Number)) }
}

/** Half the bytes; the demo reads them back as float32. */
async function saveAsBfloat16(
  model: Llama,
  config: Record<string, unknown>,
  tokenizer: string,
  folder: string,
): Promise<void> {
  using half = await Llama.create(config, { dtype: 'bfloat16', tokenizer })
  for (const { name } of model.parameters()) await half.write(name, await model.read(name))
  await rm(join(folder, 'training.json'), { force: true }) // of the model that is replaced
  await half.save(folder, { overwrite: true })
}
