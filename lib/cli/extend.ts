import { RopewalkError } from '../errors.js'
import { isTaken } from '../files/durable.js'
import { requireReplaceable } from '../files/save.js'
import {
  Llama,
  type LoadOptions,
  type RopeExtension,
  Trainer,
  type TrainerOptions,
  type TrainerProgress,
} from '../index.js'
import { TooLarge } from '../train/admit.js'
import { listen } from './interrupt.js'
import {
  type Command,
  commandLine,
  commonOptions,
  defined,
  modelOptions,
  noteModel,
  UsageError,
  type Values,
} from './options.js'
import { formatDuration, formatNumber, type Output } from './output.js'
import { showTooLarge } from './plan-text.js'
import { adapterOptions, memoryOptions, memoryWords, readAdapter, readMemory } from './training-options.js'

const whole = { kind: 'number', value: 'n', min: 1, whole: true } as const

const options = {
  context: {
    ...whole,
    required: true,
    help: 'the new context window, and the length of training texts; only this with --pose',
  },
  out: { kind: 'text', value: 'folder', required: true, help: 'where the extended model goes' },
  data: { kind: 'texts', value: 'file', help: 'texts to train on: .txt, .jsonl, .parquet, or a folder of them' },
  steps: { ...whole, min: 0, help: 'optimizer steps; 0 only rewrites the positions', default: '1000' },
  method: {
    kind: 'text',
    value: 'name',
    choices: ['linear', 'ntk', 'dynamic', 'yarn', 'llama3'],
    help: 'linear is Position Interpolation',
    default: 'linear',
  },
  factor: {
    kind: 'number',
    value: 'x',
    min: 1,
    help: 'by how much',
    default: "context, or --pose, / the model's window",
  },
  lr: { kind: 'number', value: 'x', min: 0, help: 'learning rate', default: '2e-5' },
  batch: { ...whole, help: 'texts in one pass', default: '1' },
  accumulate: { ...whole, help: 'passes in one step', default: '1' },
  warmup: { ...whole, min: 0, help: 'steps until the full learning rate', default: '20' },
  'weight-decay': { kind: 'number', value: 'x', min: 0, help: 'decoupled weight decay', default: '0' },
  clip: { kind: 'number', value: 'x', min: 0, help: 'largest gradient norm; 0 for no clipping', default: '0' },
  seed: { ...whole, min: 0, help: 'of the order of the texts', default: '0' },
  packing: {
    kind: 'text',
    value: 'mode',
    choices: ['concat', 'documents'],
    help: 'documents: none sees another one in its window',
    default: 'concat',
  },
  field: { kind: 'text', value: 'name', help: 'field of .jsonl and .parquet that holds the text', default: 'text' },
  'prompt-field': { kind: 'text', value: 'name', help: 'field of a prompt, which is given and not learned' },
  'completion-field': { kind: 'text', value: 'name', help: 'field of what follows the prompt and is learned' },
  validation: {
    kind: 'texts',
    value: 'file | x',
    help: 'texts to measure the loss on, or a share (0.01) or number of windows of --data',
  },
  'eval-every': { ...whole, help: 'steps between two measurements' },
  'save-every': { ...whole, help: 'steps between two checkpoints' },
  fit: {
    kind: 'flag',
    help: 'take the first options of memory that fit and compute the same, in place of those below',
  },
  ...memoryOptions,
  ...adapterOptions,
  resume: { kind: 'flag', help: 'go on from the last checkpoint of the same command' },
  overwrite: { kind: 'flag', help: 'replace the model in --out, which stays complete until the new one is' },
  ...modelOptions,
  ...commonOptions,
} as const

const STEPS = 1000

export const extend: Command<typeof options> = {
  name: 'extend',
  summary: 'Stretches the context of a model by position scaling and fine-tuning.',
  details:
    'Checkpoints go to <out>.checkpoints and stay there. Ctrl-C (SIGINT) or SIGTERM ends the run after the current step,\n' +
    'saves, and prints the command that goes on; a second one ends it at once. What cannot fit into memory is refused before\n' +
    'the first step, with what would: the options of memory, --lora and --pose are those of `ropewalk plan`. With --lora,\n' +
    '<out> becomes an adapter in the format of PEFT, for --adapter of the other commands.',
  examples: [
    'ropewalk extend ./llama-2-7b --context 32768 --data pile.jsonl --out ./llama-32k --checkpoint-layers 1 --moments 8bit',
    'ropewalk extend ./llama-2-7b --context 32768 --data pile/*.jsonl --out ./adapter --lora 16 --also-train embed,norm',
    'ropewalk extend ./llama-2-7b --context 8192 --data pile/*.jsonl --out ./llama-8k --accumulate 64',
    'ropewalk extend ./llama-2-7b --context 4096 --method ntk --steps 0 --out ./llama-ntk-4k',
  ],
  operands: ['model'],
  options,
  async run({ operands: [path], values }, output) {
    const { out, steps = STEPS, data, overwrite } = values
    if (steps > 0 && !data) throw new UsageError('--data is missing: texts to train on, or --steps 0 to train nothing')
    if (steps === 0 && values.lora !== undefined) {
      throw new UsageError('--lora trains an adapter, but --steps is 0: leave it away to rewrite the positions alone')
    }
    if ((values['prompt-field'] === undefined) !== (values['completion-field'] === undefined)) {
      throw new UsageError('--prompt-field and --completion-field belong together: give both, or neither')
    }
    const settings = readSettings({ ...values, steps, data: data ?? [] })
    const { quantize } = readAdapter(values)
    if (!overwrite && (await isTaken(out))) {
      throw new RopewalkError('ERR_EXISTS', `${out}: exists already: choose another folder, or add --overwrite`)
    }
    if (overwrite) await requireReplaceable(out, true)
    const checkpoints = checkpointsOf(values)
    if (steps > 0 && !values.resume && (await isTaken(checkpoints))) {
      throw new RopewalkError(
        'ERR_EXISTS',
        `${checkpoints}: checkpoints of an earlier run: add --resume to go on from them, or delete the folder`,
      )
    }
    const rope = await extension(path!, values)
    const { device, threads } = values
    const dtype = values.dtype as LoadOptions['dtype']
    const loading = { rope, ...defined({ device, dtype, threads, quantize }) }
    if (steps > 0) await check(path!, loading, settings)
    using model = await Llama.load(path!, loading)
    noteModel(model, output)
    output.note(
      `${path}: ${rope.type} by ${rope.factor} to ${model.contextWindow} tokens, on ${model.device.description}`,
    )
    if (steps > 0) {
      const interrupted = await train(model, settings, { values, path: path!, output })
      if (interrupted) return interrupted
    }
    const { contextWindow, adapter } = model
    if (adapter) {
      await model.saveAdapter(out, { overwrite })
      output.line(
        `saved ${out}: an adapter of rank ${adapter.rank}, in the format of PEFT; window ${contextWindow}. ` +
          `Next: ropewalk eval perplexity ${path} --adapter ${out} --data <file>`,
      )
      output.line(
        `To merge it: const model = await Llama.load('${path}', { adapter: '${out}' }); await model.merge(); ` +
          "await model.save('<folder>')",
      )
    } else {
      await model.save(out, { overwrite })
      output.line(`saved ${out}: window ${contextWindow}. Next: ropewalk eval perplexity ${out} --data <file>`)
    }
    output.value({ event: 'saved', out, contextWindow, steps, adapter })
  },
}

const checkpointsOf = ({ out }: { out: string }): string => `${out}.checkpoints`

/** Refuses what the model cannot do before its weights are read. */
async function check(path: string, loading: LoadOptions, settings: TrainerOptions): Promise<void> {
  using model = await Llama.load(path, { ...loading, device: 'dry' })
  using _ = new Trainer(model, settings)
}

/** The scaling that brings the model's window to what is trained; throws where the two do not fit. */
async function extension(
  path: string,
  { context, pose, method = 'linear', factor }: Values<typeof options>,
): Promise<RopeExtension> {
  const length = pose ?? context
  const name = pose === undefined ? 'context' : 'pose'
  const type = method as RopeExtension['type']
  using model = await Llama.load(path, { device: 'dry' })
  const window = model.contextWindow
  if (factor !== undefined) {
    if (window * factor < length) {
      throw new UsageError(
        `--factor ${factor} makes the window ${Math.floor(window * factor)}, but --${name} is ${length}: ` +
          `it must be at least ${length / window}`,
      )
    }
    return { type, factor }
  }
  if (length <= window) {
    throw new UsageError(
      `--${name} is ${length}, but the window of ${path} has ${window} tokens already: give a larger one`,
    )
  }
  // Where the quotient has no exact binary form, the product may fall a token short.
  const exact = length / window
  return { type, factor: Math.floor(window * exact) < length ? Math.ceil(exact * 1e6) / 1e6 : exact }
}

function readSettings(values: Values<typeof options> & { steps: number; data: string[] }): TrainerOptions {
  const { context, steps, data, batch, accumulate, lr, warmup, seed, packing, field, validation, resume } = values
  const { 'prompt-field': prompt, 'completion-field': completion, fit } = values
  const memory = readMemory(values)
  const [chosen] = Object.keys(memory).length > 0 ? memoryWords(memory).split(' ') : []
  if (fit && chosen !== undefined) throw new UsageError(`--fit chooses the options of memory: leave ${chosen} out`)
  const { lora, pose } = readAdapter(values)
  return {
    ...{ data, context, steps, output: checkpointsOf(values), resume, memory: fit ? 'auto' : memory },
    ...defined({
      batchSize: batch,
      accumulate,
      learningRate: lr,
      warmupSteps: warmup,
      weightDecay: values['weight-decay'],
      maxGradNorm: values.clip,
      seed,
      packing: packing as 'concat' | 'documents' | undefined,
      field,
      fields: prompt !== undefined && completion !== undefined ? { prompt, completion } : undefined,
      validation: validation?.length === 1 && /^[\d.]+$/.test(validation[0]!) ? Number(validation[0]) : validation,
      evalEvery: values['eval-every'],
      saveEvery: values['save-every'],
      lora,
      pose,
    }),
  }
}

/** Trains; returns the exit code of an interruption, or undefined when all steps are done. */
async function train(
  model: Llama,
  settings: TrainerOptions,
  { values, path, output }: { values: Values<typeof options>; path: string; output: Output },
): Promise<number | undefined> {
  const checkpoints = checkpointsOf(values)
  const steps = settings.steps!
  const onProgress = (progress: TrainerProgress): void => {
    if (progress.stage === 'warning') output.note(`warning: ${progress.message}`)
    if (progress.stage === 'resume') output.note(`going on from ${progress.path}`)
  }
  using trainer = new Trainer(model, { ...settings, onProgress })
  const interrupt = listen(output)
  const progress = output.progress('step', steps, 'each')
  let seconds = 0
  try {
    for await (const result of trainer.run({ signal: interrupt.signal })) {
      seconds += result.seconds
      const validation = result.validation ? `, validation ${formatNumber(result.validation.loss!)}` : ''
      const skipped = result.skipped ? ', skipped: not finite' : ''
      const mfu = result.mfu === undefined ? '' : `, MFU ${Math.round(100 * result.mfu)} %`
      const speed = `${formatNumber(result.tokensPerSecond)} tokens/s${mfu}`
      progress.update(result.step, `loss ${formatNumber(result.loss)}${validation}${skipped}, ${speed}`)
      output.value({ event: 'step', ...result })
    }
  } catch (error) {
    if (!(error instanceof TooLarge)) throw error
    throw new RopewalkError(error.code, `training does not fit; ${showTooLarge(error, output)}`, { cause: error })
  } finally {
    progress.end()
    interrupt.stop()
  }
  const { interrupted, step } = trainer.state
  if (interrupted) {
    const next = commandLine('extend', [path], { ...values, resume: true })
    const saved = step > 0 ? `, saved in ${checkpoints}` : ''
    output.note(`stopped after step ${step} of ${steps}${saved}. To go on:\n${next}`)
    output.value({ event: 'interrupted', step, checkpoints, resume: next })
    return interrupt.code()
  }
  output.note(`trained ${step} steps (${formatDuration(seconds)} now); checkpoints are in ${checkpoints}`)
  return undefined
}
