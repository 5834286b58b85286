// What `ropewalk plan` prints for people.
import type { FitResult, FitSet, MemoryPlan, PlannedBytes, PlanRequest } from '../index.js'
import type { TooLarge } from '../train/admit.js'
import { formatDuration, formatNumber, Output } from './output.js'
import type { PaperRow } from './paper.js'
import { memoryWords } from './training-options.js'

/** 12.34 GB; megabytes where that says little. */
const size = (bytes: number): string =>
  bytes < 1e8 && bytes > 0 ? `${(bytes / 1e6).toPrecision(3)} MB` : `${(bytes / 1e9).toFixed(2)} GB`

const NAMES: Record<keyof PlannedBytes, string> = {
  weights: 'weights',
  adapter: 'adapter',
  gradients: 'gradients',
  optimizer: 'optimizer',
  checkpoints: 'checkpoints',
  activations: 'activations',
  logits: 'logits',
  gaps: 'gaps',
  batch: 'batch',
  workspace: 'workspace',
  driver: 'driver (est)',
}

export function showPlan(plan: MemoryPlan, output: Output): void {
  const { model, dtype, quantization, device, bytes, requiredBytes, peak, hostBytes, lora, checkpointBytes } = plan
  const row = (label: string, text: string): void => output.line(`${label.padEnd(13)}${text}`)
  row(
    'model',
    `${model.name}: ${model.parameterCount} weights, ${model.layers} layers, ${dtype}${quantization ? `, matrices ${quantization}` : ''}`,
  )
  if (lora) {
    const beside = lora.alsoTrain.length > 0 ? `, and ${lora.alsoTrain.join(', ')}` : ''
    row('trained', `${model.trainedCount} weights: rank ${lora.rank} of ${lora.targets.join(', ')}${beside}`)
  }
  row('step', describeStep(plan))
  if (device) row('device', `${device.name}, ${device.description}`)
  output.line()
  for (const [name, value] of Object.entries(bytes)) {
    if (value > 0) row(NAMES[name as keyof typeof bytes], size(value).padStart(12))
  }
  row('in all', `${size(requiredBytes).padStart(12)}  ${verdict(plan)}`)
  if (hostBytes > 0) row('on the host', size(hostBytes).padStart(12))
  row('peak', `${peak.operation} of ${peak.part}, ${peak.phase}`)
  const largest = peak.tensors.slice(0, 5).map(({ name, count, bytes }) => `${count} x ${name} ${size(bytes)}`)
  row('', largest.join(', '))
  output.line()
  const repeated = plan.flopsPerStep / plan.modelFlopsPerStep - 1
  const again = `${Math.round(100 * repeated)} % of them computed again`
  row('operations', `${formatNumber(plan.flopsPerStep / 1e12)} TFLOP, ${again}`)
  row('bytes moved', size(plan.trafficPerStep))
  row('checkpoint', `${size(checkpointBytes)} on the disk`)
  showEstimate(plan, output)
}

function describeStep({ batchSize, context, accumulate, pose }: MemoryPlan): string {
  const passes = accumulate > 1 ? `, ${accumulate} times` : ''
  return `${batchSize} x ${context} tokens${passes}${pose ? `, with the positions of ${pose.length} (PoSE)` : ''}`
}

function verdict({ limitBytes, requiredBytes, hostBytes, hostLimitBytes, fits, fitsOn }: MemoryPlan): string {
  const host = `the host has ${size(hostLimitBytes ?? 0)} of ${size(hostBytes)}`
  if (limitBytes === undefined && fits === false) return `does NOT fit, ${host}`
  if (limitBytes === undefined) return `fits ${fitsOn.join(', ') || 'none of the GPUs that are known'}`
  const room = limitBytes - requiredBytes
  if (fits) return `of ${size(limitBytes)}: fits, ${size(room)} are left`
  // On a CPU, what would be on the host takes of the same memory.
  const missing =
    room < 0 || hostLimitBytes === undefined ? `${size(room < 0 ? -room : hostBytes - room)} are missing` : host
  return `of ${size(limitBytes)}: does NOT fit, ${missing} (--fit looks for what does)`
}

function showEstimate({ estimate, device }: MemoryPlan, output: Output): void {
  if (!estimate) return
  const { seconds, parts, tokensPerSecond, mfu, mfuFormula, run } = estimate
  const shares = Object.entries(parts).filter(([, part]) => part > 0.005 * seconds)
  const split = shares.map(([name, part]) => `${name} ${Math.round((100 * part) / seconds)} %`).join(', ')
  output.line()
  output.line(`Estimated, not measured, from published rates of ${device!.name}:`)
  output.line(`a step       ${formatNumber(seconds)} s (${split})`)
  output.line(`speed        ${formatNumber(tokensPerSecond)} tokens/s, MFU ${Math.round(100 * mfu)} % = ${mfuFormula}`)
  if (run) {
    const energy = `${formatNumber(run.joules / 3.6e6)} kWh at the power limit`
    output.line(`the run      ${run.steps} steps: ${formatDuration(run.seconds)}, ${energy}`)
  }
}

type Asked = Pick<PlanRequest, 'pose' | 'hostLimit'>

export function showFit(request: Asked, { sets, problem }: FitResult, output: Output): void {
  const { plan } = sets[0] ?? problem!.leanest
  const { model, device, limitBytes, lora } = plan
  const adapter = lora ? `, LoRA of rank ${lora.rank}` : ''
  output.line(`${model.name}${adapter}, ${describeStep(plan)}, on ${device!.name}: ${size(limitBytes!)}`)
  if (problem) showProblem(request, problem, output)
  else {
    output.line()
    showSets(sets, output)
  }
  output.line('\nMemory is exact; times are estimates from published rates, 1 being a step that keeps everything.')
}

/** What training that cannot fit would need, and what would fit: tables on stderr, and the change for the last line. */
export function showTooLarge({ plan, fit }: TooLarge, output: Output): string {
  const tables = new Output(output.stderr, output.stderr, false)
  showPlan(plan, tables)
  tables.line()
  showFit(plan, fit, tables)
  const [first] = fit.sets
  if (first) return `with the smallest change it fits: ${memoryWords(first.memory)}`
  const { nearest, adapter } = fit.problem!
  return nearest || adapter ? 'what comes nearest is above' : 'only training on one device is supported'
}

function showProblem(request: Asked, problem: NonNullable<FitResult['problem']>, output: Output): void {
  const { reason, missingBytes, leanest, nearest, adapter } = problem
  const { hostBytes, context } = leanest.plan
  output.line(`Nothing fits: ${reason}.`)
  output.line(
    missingBytes > 0
      ? `The leanest set is ${size(missingBytes)} too large:`
      : `This takes ${size(hostBytes)} of the host:`,
  )
  showSets([leanest], output)
  if (nearest) {
    const passes = nearest.accumulate > 1 ? ` --accumulate ${nearest.accumulate}` : ''
    // Shorter windows can still train the positions of long ones.
    const pose = nearest.context < context && !request.pose ? ` (with --pose ${context} it trains those positions)` : ''
    output.line(`\nThe nearest that fits: --context ${nearest.context} --batch ${nearest.batchSize}${passes}${pose}`)
    showSets([nearest.set], output)
  }
  if (adapter) {
    output.line(`\nAn adapter fits: --lora ${adapter.plan.lora!.rank}`)
    showSets([adapter], output)
  }
  if (!nearest && !adapter) output.line('More than one device would be needed, which is not supported today.')
  if (request.hostLimit !== undefined) output.line('With more of --host, more might fit.')
}

function showSets(sets: readonly FitSet[], output: Output): void {
  const head = ['device', 'host', 'time', 's/step', 'tokens/s', 'results', 'options']
  output.table(
    head,
    sets.map(({ memory, plan, slowdown, exact, costs }) => [
      size(plan.requiredBytes),
      size(plan.hostBytes),
      slowdown.toFixed(2),
      plan.estimate ? formatNumber(plan.estimate.seconds) : '-',
      plan.estimate ? Math.round(plan.estimate.tokensPerSecond) : '-',
      [exact ? 'exact' : 'rounded', ...costs].join('; '),
      memoryWords(memory),
    ]),
  )
}

export function showPaper(rows: readonly PaperRow[], output: Output): void {
  const cell = ({ plan }: FitSet): string =>
    `${size(plan.requiredBytes)}${plan.hostBytes > 0 ? ` + ${size(plan.hostBytes)} host` : ''}`
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
      ...[model, context, paper, cell(exact), cell(leanest), cell(offloaded)],
      card,
    ]),
  )
  output.line(
    '\nOne window of that length at a time; all weights trained, in bfloat16 with AdamW. Bytes are exact and include\n' +
      '0.63 GB for the driver. "exact" computes what float32 masters and moments do. Training on more than one GPU is\n' +
      'not supported today: where a row says so, no option makes it fit one 80 GB card.',
  )
}
