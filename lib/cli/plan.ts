import { writeFile } from 'node:fs/promises'
import { fit, type MemoryOptions, type PlanRequest } from '../index.js'
import { modelPresets } from '../model/presets.js'
import { gpus, readBytes } from '../train/gpus.js'
import { describePlan, record } from '../train/planner.js'
import { readRequest } from '../train/request.js'
import { memoryTimeline } from '../train/timeline.js'
import { memoryPicture } from './memory-picture.js'
import { type Command, commonOptions, defined, UsageError, type Values } from './options.js'
import type { Output } from './output.js'
import { paperTable } from './paper.js'
import { showFit, showPaper, showPlan } from './plan-text.js'
import { adapterOptions, memoryOptions, readAdapter, readMemory } from './training-options.js'

const whole = { kind: 'number', value: 'n', min: 1, whole: true } as const

/** 'Models: a, b,' in lines that a terminal can hold. */
function named(title: string, names: readonly string[]): string[] {
  const lines: string[] = [`${title}:`]
  names.forEach((name, i) => {
    const word = ` ${name}${i < names.length - 1 ? ',' : ''}`
    if (lines.at(-1)!.length + word.length > 110) lines.push(' '.repeat(title.length + 1))
    lines[lines.length - 1] += word
  })
  return lines
}

const options = {
  model: { kind: 'text', value: 'name | path', help: 'a model named above, a model folder or a config.json' },
  context: { ...whole, help: 'tokens in a training window' },
  device: { kind: 'text', value: 'name', help: 'a GPU named above, or cuda, cuda:1, cpu for what is here' },
  memory: { kind: 'text', value: 'size', help: 'memory of the device instead: 24g (gibibytes), 24GB, bytes' },
  host: { kind: 'text', value: 'size', help: "the host's memory that may be used; 0 for none", default: 'no limit' },
  fit: { kind: 'flag', help: 'look for the options of memory that fit; those given below are kept' },
  batch: { ...whole, help: 'windows in one pass', default: '1' },
  accumulate: { ...whole, help: 'passes in one step', default: '1' },
  clip: { kind: 'number', value: 'x', min: 0, help: 'largest gradient norm; 0 for no clipping', default: '0' },
  dtype: {
    kind: 'text',
    value: 'type',
    choices: ['float32', 'bfloat16'],
    help: 'how weights are kept',
    default: 'bfloat16',
  },
  ...memoryOptions,
  ...adapterOptions,
  validation: { kind: 'flag', help: 'the loss of a validation set is measured between steps' },
  steps: { ...whole, help: 'of the run whose time and energy are estimated', default: '1000' },
  svg: { kind: 'text', value: 'file', help: 'write a picture of memory over the step' },
  paper: { kind: 'flag', help: "the paper's table of machines: what it used, and what one card needs today" },
  ...commonOptions,
} as const

export const plan: Command<typeof options> = {
  name: 'plan',
  summary:
    'Says what a training step needs, before anything is allocated: memory to the byte, and an estimate of time.',
  details:
    'The step is recorded as for running it; bytes are exact. Times are estimates from published rates of a device:\n' +
    'each operation takes the longer of its FLOPs and its bytes. Sizes are printed in units of 10^9 bytes (GB).\n' +
    "The options of memory are those of the trainer's `memory`, which takes what --fit prints. The exit code is 1\n" +
    'where what is asked for does not fit.\n\n' +
    `${[
      ...named('Models', modelPresets),
      ...named(
        'GPUs',
        gpus.map(({ name }) => name),
      ),
    ].join('\n')}`,
  examples: [
    'ropewalk plan --model 7b --context 32768 --device a100-80g --fit',
    'ropewalk plan --model ./llama --context 16384 --memory 24g --checkpoint-layers 1 --gradients fused --moments 8bit',
    'ropewalk plan --model llama3-8b --context 131072 --device h200-141g --checkpoint-layers 1 --lora 16 --svg step.svg',
    'ropewalk plan --paper',
  ],
  operands: [],
  options,
  async run({ values }, output) {
    if (values.paper) {
      await runPaper(values, output)
      return
    }
    const request = readValues(values)
    if (values.fit) return runFit(request, values.svg, output)
    const planning = await readRequest(request)
    const step = record(planning, planning.settings.memory)
    const found = describePlan(planning, step)
    if (values.svg !== undefined) await writeFile(values.svg, memoryPicture(found, memoryTimeline(step, COLUMNS)))
    output.value(found)
    showPlan(found, output)
    return found.fits === false ? 1 : 0
  },
}

/** Columns of the picture. */
const COLUMNS = 240

async function runPaper(values: Values<typeof options>, output: Output): Promise<void> {
  const others = Object.entries(values).filter(([name, value]) => value !== false && !['paper', 'json'].includes(name))
  if (others.length > 0) throw new UsageError(`--paper is a table of its own and takes no --${others[0]![0]}`)
  const progress = output.progress('model', 12, 'each')
  const rows = await paperTable((done, what) => progress.update(done, what))
  progress.end()
  output.value(rows)
  showPaper(rows, output)
}

async function runFit(request: PlanRequest, svg: string | undefined, output: Output): Promise<number> {
  let progress: ReturnType<Output['progress']> | undefined
  const result = await fit(request, {
    onProgress: (done, total) => (progress ??= output.progress('ways to keep activations', total)).update(done),
  })
  progress?.end()
  const first = result.sets[0] ?? result.problem!.leanest
  if (svg !== undefined) await writePicture({ ...request, memory: first.memory }, svg)
  output.value(result)
  showFit(request, result, output)
  return result.sets.length > 0 ? 0 : 1
}

async function writePicture(request: PlanRequest, path: string): Promise<void> {
  const planning = await readRequest(request)
  const step = record(planning, planning.settings.memory)
  await writeFile(path, memoryPicture(describePlan(planning, step), memoryTimeline(step, COLUMNS)))
}

function readValues(values: Values<typeof options>): PlanRequest {
  const { model, context, device, batch: batchSize, accumulate, dtype, clip } = values
  const limit = values.memory === undefined ? undefined : readBytes(values.memory, '--memory')
  const hostLimit = values.host === undefined ? undefined : readBytes(values.host, '--host', 0)
  if (model === undefined) throw new UsageError(`--model is missing: ${modelPresets.join(', ')}, or ${MODEL_PATH}`)
  if (context === undefined) throw new UsageError('--context is missing: the tokens in a training window')
  if (values.fit && device === undefined && limit === undefined) {
    throw new UsageError('--fit needs --device or --memory: what it is to fit into')
  }
  const memory: MemoryOptions = readMemory(values)
  const given = { device, limit, hostLimit, batchSize, accumulate, dtype: dtype as PlanRequest['dtype'] }
  return {
    ...{ model, context, memory, steps: values.steps ?? 1000, ...readAdapter(values) },
    // What counts is that there is one.
    ...(values.validation && { validation: 'a file' }),
    ...defined({ ...given, maxGradNorm: clip }),
  }
}

const MODEL_PATH = 'the path of a model folder or a config.json'
