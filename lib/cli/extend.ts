import { RopewalkError } from '../errors.js'
import { isTaken } from '../files/durable.js'
import { Llama, type RopeExtension, Trainer, type TrainerProgress } from '../index.js'
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

const whole = { kind: 'number', value: 'n', min: 1, whole: true } as const

const options = {
  context: { ...whole, required: true, help: 'the new context window in tokens, and the length of training texts' },
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
  factor: { kind: 'number', value: 'x', min: 1, help: 'by how much', default: "context / the model's window" },
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
  resume: { kind: 'flag', help: 'go on from the last checkpoint of the same command' },
  overwrite: { kind: 'flag', help: 'replace --out, which stays complete until the new model is' },
  ...modelOptions,
  ...commonOptions,
} as const

const STEPS = 1000

export const extend: Command<typeof options> = {
  name: 'extend',
  summary: 'Stretches the context of a model by position scaling and fine-tuning.',
  details:
    'Checkpoints go to <out>.checkpoints and stay there. Ctrl-C (SIGINT) or SIGTERM ends the run after the current step,\n' +
    'saves, and prints the command that goes on; a second one ends it at once.',
  examples: [
    'ropewalk extend ./llama-2-7b --context 8192 --data pile/*.jsonl --out ./llama-8k --accumulate 64',
    'ropewalk extend ./llama-2-7b --context 4096 --method ntk --steps 0 --out ./llama-ntk-4k',
  ],
  operands: ['model'],
  options,
  async run({ operands: [path], values }, output) {
    const { out, steps = STEPS, data, device, threads, overwrite } = values
    const dtype = values.dtype as 'float32' | 'bfloat16' | undefined
    if (steps > 0 && !data) throw new UsageError('--data is missing: texts to train on, or --steps 0 to train nothing')
    if ((values['prompt-field'] === undefined) !== (values['completion-field'] === undefined)) {
      throw new UsageError('--prompt-field and --completion-field belong together: give both, or neither')
    }
    if (!overwrite && (await isTaken(out))) {
      throw new RopewalkError('ERR_EXISTS', `${out}: exists already: choose another folder, or add --overwrite`)
    }
    const checkpoints = `${out}.checkpoints`
    if (steps > 0 && !values.resume && (await isTaken(checkpoints))) {
      throw new RopewalkError(
        'ERR_EXISTS',
        `${checkpoints}: checkpoints of an earlier run: add --resume to go on from them, or delete the folder`,
      )
    }
    const rope = await extension(path!, values)
    using model = await Llama.load(path!, { rope, ...defined({ device, dtype, threads }) })
    noteModel(model, output)
    output.note(
      `${path}: ${rope.type} by ${rope.factor} to ${model.contextWindow} tokens, on ${model.device.description}`,
    )
    if (steps > 0) {
      const interrupted = await train(model, { ...values, steps, data: data! }, path!, output)
      if (interrupted) return interrupted
    }
    await model.save(out, { overwrite })
    output.line(`saved ${out}: window ${model.contextWindow}. Next: ropewalk eval perplexity ${out} --data <file>`)
    output.value({ event: 'saved', out, contextWindow: model.contextWindow, steps })
  },
}

/** The scaling that brings the model's window to the context; throws where the two do not fit. */
async function extension(
  path: string,
  { context, method = 'linear', factor }: Values<typeof options>,
): Promise<RopeExtension> {
  const type = method as RopeExtension['type']
  using model = await Llama.load(path, { device: 'dry' })
  const window = model.contextWindow
  if (factor !== undefined) {
    if (window * factor < context) {
      throw new UsageError(
        `--factor ${factor} makes the window ${Math.floor(window * factor)}, but --context is ${context}: ` +
          `it must be at least ${context / window}`,
      )
    }
    return { type, factor }
  }
  if (context <= window) {
    throw new UsageError(
      `--context is ${context}, but the window of ${path} has ${window} tokens already: give a larger one`,
    )
  }
  // Where the quotient has no exact binary form, the product may fall a token short.
  const exact = context / window
  return { type, factor: Math.floor(window * exact) < context ? Math.ceil(exact * 1e6) / 1e6 : exact }
}

/** Trains; returns the exit code of an interruption, or undefined when all steps are done. */
async function train(
  model: Llama,
  values: Values<typeof options> & { steps: number; data: string[] },
  path: string,
  output: Output,
): Promise<number | undefined> {
  const { context, steps, data, batch, accumulate, lr, warmup, seed, packing, field, validation, resume } = values
  const { 'prompt-field': prompt, 'completion-field': completion } = values
  const checkpoints = `${values.out}.checkpoints`
  const settings = {
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
  }
  const onProgress = (progress: TrainerProgress): void => {
    if (progress.stage === 'warning') output.note(`warning: ${progress.message}`)
    if (progress.stage === 'resume') output.note(`going on from ${progress.path}`)
  }
  const where = { data, context, steps, output: checkpoints, resume, onProgress }
  using trainer = new Trainer(model, { ...where, ...defined(settings) })
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
