import { writeFile } from 'node:fs/promises'
import { fit, type FitResult, type FitSet, type MemoryOptions, type MemoryPlan, type PlanRequest } from '../index.js'
import { gpus } from '../train/gpus.js'
import { modelPresets } from '../model/presets.js'
import { describePlan, readRequest, record } from '../train/planner.js'
import { memoryTimeline } from '../train/timeline.js'
import { memoryPicture } from './memory-picture.js'
import { type Command, commonOptions, defined, UsageError, type Values } from './options.js'
import { formatDuration, formatNumber, type Output } from './output.js'
import { paperTable } from './paper.js'

const whole = { kind: 'number', value: 'n', min: 1, whole: true } as const

const options = {
  model: { kind: 'text', value: 'name | path', help: `${modelPresets.join(', ')}, a model folder or a config.json` },
  context: { ...whole, help: 'tokens in a training window' },
  device: {
    kind: 'text',
    value: 'name',
    help: `${gpus.map(({ name }) => name).join(', ')}, or cuda, cpu for what is here`,
  },
  memory: { kind: 'text', value: 'size', help: 'memory of the device instead: 24g (gibibytes), 24GB, bytes' },
  host: { kind: 'text', value: 'size', help: "the host's memory that may be used", default: 'no limit' },
  fit: { kind: 'flag', help: 'look for the options that fit; those given below are kept' },
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
  'checkpoint-layers': { ...whole, min: 0, help: 'layers between two kept inputs; 0 keeps everything', default: '0' },
  'keep-attention': { kind: 'flag', help: "with checkpoints: attention's results are kept too" },
  'mlp-rows': { ...whole, min: 0, help: 'rows of the MLP at a time; 0: all', default: '0' },
  'logits-rows': { ...whole, min: 0, help: 'rows of logits at a time; 0: as the device likes', default: '0' },
  gradients: { kind: 'text', value: 'form', choices: ['float32', 'bfloat16', 'fused'], help: 'how gradients are held' },
  masters: {
    kind: 'text',
    value: 'form',
    choices: ['float32', 'remainder', 'stochastic'],
    help: 'what bfloat16 weights are updated in',
  },
  moments: { kind: 'text', value: 'form', choices: ['float32', 'bfloat16', '8bit'], help: "AdamW's moments" },
  offload: { kind: 'text', value: 'what', help: "to the host's memory: checkpoints, optimizer, or both with a comma" },
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
    "The options of memory are those of the trainer's `memory`, which takes what --fit prints.",
  examples: [
    'ropewalk plan --model 7b --context 32768 --device a100-80g --fit',
    'ropewalk plan --model ./llama --context 16384 --memory 24g --checkpoint-layers 1 --gradients fused --moments 8bit',
    'ropewalk plan --model llama3-8b --context 32768 --device h200-141g --checkpoint-layers 1 --svg memory.svg',
    'ropewalk plan --paper',
  ],
  operands: [],
  options,
  async run({ values }, output) {
    if (values.paper) {
      const rows = await paperTable((done, total, what) => output.note(`${done}/${total} ${what}`))
      output.value(rows)
      showPaper(rows, output)
      return
    }
    const request = readValues(values)
    if (values.fit) {
      const result = await fit(request)
      const first = result.sets[0] ?? result.problem!.leanest
      if (values.svg !== undefined) await writePicture({ ...request, memory: first.memory }, values.svg)
      output.value(result)
      showFit(request, result, output)
      return result.sets.length > 0 ? 0 : 1
    }
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

async function writePicture(request: PlanRequest, path: string): Promise<void> {
  const planning = await readRequest(request)
  const step = record(planning, planning.settings.memory)
  await writeFile(path, memoryPicture(describePlan(planning, step), memoryTimeline(step, COLUMNS)))
}

function readValues(values: Values<typeof options>): PlanRequest {
  const { model, context, device, memory: limit, host: hostLimit, batch: batchSize, accumulate, dtype, clip } = values
  if (model === undefined) throw new UsageError(`--model is missing: ${options.model.help}`)
  if (context === undefined) throw new UsageError('--context is missing: the tokens in a training window')
  if (values.fit && device === undefined && limit === undefined) {
    throw new UsageError('--fit needs --device or --memory: what it is to fit into')
  }
  const offload = values.offload?.split(',') ?? []
  for (const what of offload) {
    if (what !== 'checkpoints' && what !== 'optimizer') {
      throw new UsageError(`--offload is "${what}", but must be checkpoints, optimizer, or checkpoints,optimizer`)
    }
  }
  const memory = defined({
    checkpointLayers: values['checkpoint-layers'],
    keepAttention: values['keep-attention'] || undefined,
    offloadCheckpoints: offload.includes('checkpoints') || undefined,
    mlpRows: values['mlp-rows'],
    logitsRows: values['logits-rows'],
    gradients: values.gradients,
    masters: values.masters,
    moments: values.moments,
    offloadOptimizer: offload.includes('optimizer') || undefined,
  }) as MemoryOptions
  const given = { device, limit, hostLimit, batchSize, accumulate, dtype: dtype as PlanRequest['dtype'] }
  return { model, context, memory, steps: values.steps ?? 1000, ...defined({ ...given, maxGradNorm: clip }) }
}

const gb = (bytes: number): string => `${(bytes / 1e9).toFixed(2)} GB`

function showPlan(plan: MemoryPlan, output: Output): void {
  const { model, context, batchSize, accumulate, dtype, device, bytes, requiredBytes, limitBytes, peak, hostBytes } =
    plan
  const row = (label: string, text: string): void => output.line(`${label.padEnd(14)}${text}`)
  row('model', `${model.name}: ${model.parameterCount} weights, ${model.layers} layers, ${dtype}`)
  row('step', `${batchSize} x ${context} tokens${accumulate > 1 ? `, ${accumulate} times` : ''}`)
  if (device) row('device', `${device.name}, ${device.description}`)
  output.line()
  for (const [name, value] of Object.entries(bytes)) {
    if (value > 0) row(NAMES[name as keyof typeof bytes], gb(value).padStart(11))
  }
  const room = limitBytes === undefined ? '' : limitBytes - requiredBytes
  const verdict =
    room === ''
      ? `fits ${plan.fitsOn.join(', ') || 'none of the GPUs that are known'}`
      : room >= 0
        ? `of ${gb(limitBytes!)}: ${plan.fits ? 'fits' : 'fits, but the host has too little'}, ${gb(room)} are left`
        : `of ${gb(limitBytes!)}: does NOT fit, ${gb(-room)} are missing (--fit looks for what does)`
  row('in all', `${gb(requiredBytes).padStart(11)}  ${verdict}`)
  if (hostBytes > 0) row('on the host', gb(hostBytes).padStart(11))
  row('peak', `${peak.operation} of ${peak.part}, ${peak.phase}`)
  const largest = peak.tensors.slice(0, 5).map(({ name, count, bytes }) => `${count} x ${name} ${gb(bytes)}`)
  row('', largest.join(', '))
  output.line()
  const repeated = plan.flopsPerStep / plan.modelFlopsPerStep - 1
  row(
    'operations',
    `${formatNumber(plan.flopsPerStep / 1e12)} TFLOP, ${Math.round(100 * repeated)} % of them computed again`,
  )
  row('bytes moved', `${formatNumber(plan.trafficPerStep / 1e9)} GB`)
  row('checkpoint', `${gb(plan.checkpointBytes)} on the disk`)
  showEstimate(plan, output)
}

function showEstimate({ estimate, device }: MemoryPlan, output: Output): void {
  if (!estimate) return
  const { seconds, parts, tokensPerSecond, mfu, mfuFormula, run } = estimate
  const shares = Object.entries(parts).filter(([, part]) => part > 0.005 * seconds)
  const split = shares.map(([name, part]) => `${name} ${Math.round((100 * part) / seconds)} %`).join(', ')
  output.line()
  output.line(`Estimated, not measured, from published rates of ${device!.name}:`)
  output.line(`a step         ${formatNumber(seconds)} s (${split})`)
  output.line(
    `speed          ${formatNumber(tokensPerSecond)} tokens/s, MFU ${Math.round(100 * mfu)} % = ${mfuFormula}`,
  )
  if (run) {
    const energy = `${formatNumber(run.joules / 3.6e6)} kWh at the power limit`
    output.line(`the run        ${run.steps} steps: ${formatDuration(run.seconds)}, ${energy}`)
  }
}

const NAMES: Record<keyof MemoryPlan['bytes'], string> = {
  weights: 'weights',
  gradients: 'gradients',
  optimizer: 'optimizer',
  checkpoints: 'checkpoints',
  activations: 'activations',
  logits: 'logits',
  gaps: 'gaps',
  batch: 'batch',
  workspace: 'workspace',
  driver: 'driver (est.)',
}

function showFit(request: PlanRequest, { sets, problem }: FitResult, output: Output): void {
  const { plan } = sets[0] ?? problem!.leanest
  const { model, context, batchSize, device, limitBytes } = plan
  output.line(`${model.name}, ${batchSize} x ${context} tokens, on ${device!.name}: ${gb(limitBytes!)}`)
  if (sets.length > 0) {
    output.line()
    showSets(sets, output)
    output.line('\nMemory is exact; times are estimates from published rates, 1 being a step that keeps everything.')
    return
  }
  const { reason, missingBytes, leanest, nearest } = problem!
  output.line(`Nothing fits: ${reason}.`)
  output.line(`The leanest set is ${gb(missingBytes)} too large:`)
  showSets([leanest], output)
  if (nearest) {
    const passes = nearest.accumulate > 1 ? `, --accumulate ${nearest.accumulate}` : ''
    output.line(`\nThe nearest that fits: --context ${nearest.context} --batch ${nearest.batchSize}${passes}`)
    showSets([nearest.set], output)
  } else output.line('More than one device would be needed; training on more than one is not supported today.')
  if (request.hostLimit !== undefined) output.line('With more of --host, more might fit.')
}

function showSets(sets: readonly FitSet[], output: Output): void {
  const head = ['device', 'host', 'time', 's/step', 'tokens/s', 'results', 'options']
  output.table(
    head,
    sets.map(({ memory, plan, slowdown, exact, costs }) => [
      gb(plan.requiredBytes),
      gb(plan.hostBytes),
      slowdown.toFixed(2),
      plan.estimate ? formatNumber(plan.estimate.seconds) : '-',
      plan.estimate ? Math.round(plan.estimate.tokensPerSecond) : '-',
      [exact ? 'exact' : 'rounded', ...costs].join('; '),
      commandOptions(memory),
    ]),
  )
}

/** The options of this command that give the same plan. */
function commandOptions(memory: MemoryOptions): string {
  const { offloadCheckpoints, offloadOptimizer, keepAttention, ...rest } = memory
  const words = Object.entries(rest).flatMap(([name, value]) => [
    `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`,
    String(value),
  ])
  if (keepAttention) words.push('--keep-attention')
  const offload = [...(offloadCheckpoints ? ['checkpoints'] : []), ...(offloadOptimizer ? ['optimizer'] : [])]
  if (offload.length > 0) words.push('--offload', offload.join(','))
  return words.join(' ')
}

function showPaper(rows: Awaited<ReturnType<typeof paperTable>>, output: Output): void {
  const cell = (set: FitSet | undefined): string =>
    set ? `${gb(set.plan.requiredBytes)}${set.plan.hostBytes > 0 ? ` + ${gb(set.plan.hostBytes)} host` : ''}` : '-'
  output.table(
    [
      'model',
      'context',
      'the paper',
      'exact, device only',
      'leanest, device only',
      'leanest, with host',
      'one 80 GB card',
    ],
    rows.map(({ model, context, paper, exact, leanest, offloaded, card }) => [
      model,
      context,
      paper,
      cell(exact),
      cell(leanest),
      cell(offloaded),
      card,
    ]),
  )
  output.line(
    '\nOne window of that length at a time; all weights trained, in bfloat16 with AdamW. Bytes are exact and include',
  )
  output.line(
    '0.63 GB for the driver. "exact" computes what float32 masters and moments do. Training on more than one GPU is',
  )
  output.line('not supported today: where a row says so, no option makes it fit one 80 GB card.')
}
