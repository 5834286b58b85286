// Looks for the memory options with which a step fits. Bytes of activations do not depend on how weights are updated, and
// grow by the same for every layer: a few layers are recorded for each way to keep activations, and only what is shown
// is recorded whole.
import { parameterShapes } from '../model/config.js'
import { Parameters } from '../model/parameters.js'
import { Device } from '../runtime/device.js'
import { sumOf, type Seconds, estimateStep, updateSeconds } from './estimate.js'
import { MEMORY_DEFAULTS, type MemoryOptions, type MemorySettings } from './memory.js'
import { AdamW } from './optimizer.js'
import { describePlan, fits, type MemoryPlan, type Planning, type PlanRequest, readRequest, record } from './planner.js'
import { recordStep, type StepRecord } from './plan.js'

/**
 * Memory options with which a step fits.
 *
 * @category Training
 */
export interface FitSet {
  /** Those that differ from the defaults. */
  memory: MemoryOptions
  plan: MemoryPlan
  /** Estimated time of the step, as a multiple of that of a step that keeps everything, whether or not that fits. */
  slowdown: number
  /** Whether it computes what a step with everything in float32 does, but for the order of sums. */
  exact: boolean
  /** What it costs beside time: roundings, and what is excluded. */
  costs: string[]
}

/**
 * What {@link fit} finds.
 *
 * @category Training
 */
export interface FitResult {
  /** The sets that fit and are not beaten by another one in every respect: exact ones first, then by time. */
  sets: FitSet[]
  /** Where nothing fits: why, how much is missing, and what is nearest. */
  problem: FitProblem | undefined
}

/**
 * Why nothing fits.
 *
 * @category Training
 */
export interface FitProblem {
  /** For people. */
  reason: string
  /** The set that needs least. */
  leanest: FitSet
  /** By how much it exceeds the device. */
  missingBytes: number
  /** The nearest request that fits: fewer windows in a pass, or a shorter context. undefined where none does. */
  nearest: { context: number; batchSize: number; accumulate: number; set: FitSet } | undefined
}

/**
 * Searches the memory options for those with which a step fits `device` or `limit`, and estimates what each costs. Throws
 * as {@link plan}, and TypeError where no limit is given.
 */
export async function fit(request: PlanRequest): Promise<FitResult> {
  return search(await readRequest(request))
}

/** How activations are kept. */
type Keeping = Pick<
  MemorySettings,
  'checkpointLayers' | 'keepAttention' | 'offloadCheckpoints' | 'mlpRows' | 'attentionGroups' | 'logitsRows'
>
/** How weights are updated. */
type Updating = Pick<MemorySettings, 'gradients' | 'masters' | 'moments' | 'offloadOptimizer'>

interface Candidate {
  memory: MemorySettings
  requiredBytes: number
  hostBytes: number
  seconds: number
  costs: string[]
  roundings: number
  fused: boolean
  /** Options that differ from the defaults. */
  changes: number
}

/** How far the bytes of a whole record may be from what a few layers say: those that nearly fit are looked at. */
const MARGIN = 0.01

/** Sets that are shown: exact ones, and others. */
const SHOWN = 4

/** `fixed` options are as given in every set. */
export function search(planning: Planning, fixed: Partial<MemorySettings> = {}): FitResult {
  if (planning.limitBytes === undefined) {
    throw new TypeError('neither device nor limit is given: fit looks for what fits into the memory of one')
  }
  const finder = new Finder(planning)
  const options = Object.entries(fixed) as [keyof MemorySettings, unknown][]
  const allowed = finder.candidates().filter(({ memory }) => options.every(([name, value]) => memory[name] === value))
  const sets = choose(finder, planning, allowed)
  if (sets.length > 0) return { sets, problem: undefined }
  return { sets, problem: explain(planning, finder) }
}

/**
 * The sets that fit and are beaten by none in every respect: exclusions, number of roundings, host memory and time; the
 * simplest of equals.
 */
function choose(finder: Finder, planning: Planning, candidates: readonly Candidate[]): FitSet[] {
  const near = candidates.filter(({ requiredBytes, hostBytes }) =>
    fits({ requiredBytes: requiredBytes * (1 - MARGIN), hostBytes }, planning),
  )
  near.sort(
    (a, b) =>
      a.costs.length - b.costs.length ||
      a.seconds - b.seconds ||
      a.changes - b.changes ||
      a.requiredBytes - b.requiredBytes,
  )
  const chosen: { candidate: Candidate; set: FitSet }[] = []
  for (const candidate of near) {
    const beaten = chosen.some(
      ({ candidate: other }) =>
        other.roundings <= candidate.roundings &&
        other.fused <= candidate.fused &&
        other.hostBytes <= candidate.hostBytes &&
        other.seconds <= candidate.seconds * 1.01,
    )
    if (beaten) continue
    const set = finder.exactly(candidate.memory)
    if (set.plan.fits) chosen.push({ candidate, set })
  }
  const sets = chosen.map(({ set }) => set).sort((a, b) => a.slowdown - b.slowdown)
  const exact = sets.filter((set) => set.exact).slice(0, SHOWN)
  return [...exact, ...sets.filter((set) => !set.exact).slice(0, SHOWN)]
}

/** Estimates for all sets of options, from records of a few layers. */
class Finder {
  private readonly kept = new Map<string, { arena: number; host: number; seconds: number }>()
  private readonly plainSeconds: number

  constructor(private readonly planning: Planning) {
    this.plainSeconds = this.keep(MEMORY_DEFAULTS).seconds + this.update(MEMORY_DEFAULTS).seconds
  }

  candidates(only: (keeping: Keeping) => boolean = () => true): Candidate[] {
    const { planning } = this
    const found: Candidate[] = []
    for (const updating of updates(planning)) {
      const { bytes, host, seconds } = this.update(updating)
      for (const keeping of keepings(planning)) {
        if (!only(keeping)) continue
        const memory = { ...MEMORY_DEFAULTS, ...keeping, ...updating }
        const kept = this.keep(memory)
        const costs = costsOf(memory, planning)
        found.push({
          memory,
          requiredBytes: bytes + kept.arena + planning.driverBytes,
          hostBytes: host + kept.host,
          seconds: seconds + kept.seconds,
          costs,
          roundings: costs.length - Number(memory.gradients === 'fused'),
          fused: memory.gradients === 'fused',
          changes: Object.keys(changed(memory)).length,
        })
      }
    }
    return found
  }

  /** What the leanest update needs on the device, without any activations. */
  get fixedBytes(): number {
    return Math.min(...updates(this.planning).map((one) => this.update(one).bytes)) + this.planning.driverBytes
  }

  /** The set, recorded whole. */
  exactly(memory: MemorySettings): FitSet {
    const { planning } = this
    const step = record(planning, memory)
    const plan = describePlan(planning, step, memory)
    const costs = costsOf(memory, planning)
    const seconds = sumOf(estimateStep(step.passes, step.optimizer, planning.rates))
    return {
      memory: changed(memory),
      plan,
      slowdown: seconds / this.plainSeconds,
      exact: isExact(memory, planning),
      costs,
    }
  }

  /** All but activations and the batch, for the whole model: exact. */
  private update(memory: Updating): { bytes: number; host: number; seconds: number } {
    const { config, dtype, settings, onGpu, rates } = this.planning
    const device = Device.open(onGpu ? 'dry:cuda' : 'dry')
    const weights = new Parameters(device, dtype, parameterShapes(config))
    const optimizer = new AdamW(weights.segments(), { ...settings, memory: { ...MEMORY_DEFAULTS, ...memory } })
    return { bytes: device.allocatedBytes, host: optimizer.hostBytes, seconds: updateSeconds(optimizer, rates) }
  }

  /** Activations and batch; of deep models from two numbers of layers, which end in the same way as the whole. */
  private keep(memory: MemorySettings): { arena: number; host: number; seconds: number } {
    const { layers } = this.planning.config
    const fused = memory.gradients === 'fused'
    const { checkpointLayers: k, keepAttention, offloadCheckpoints, mlpRows, attentionGroups, logitsRows } = memory
    const key = [k, keepAttention, offloadCheckpoints, mlpRows, attentionGroups, logitsRows, fused].join()
    let found = this.kept.get(key)
    if (!found) {
      const one = Math.max(1, k)
      const few = 4 * one + (layers % one)
      const more = few + 2 * one
      if (layers <= more) found = this.measure(layers, memory)
      else {
        const [a, b] = [this.measure(few, memory), this.measure(more, memory)]
        const scale = (low: number, high: number): number => low + ((high - low) * (layers - few)) / (more - few)
        found = { arena: scale(a.arena, b.arena), host: scale(a.host, b.host), seconds: scale(a.seconds, b.seconds) }
      }
      this.kept.set(key, found)
    }
    return found
  }

  private measure(layers: number, memory: MemorySettings): { arena: number; host: number; seconds: number } {
    const { context, settings } = this.planning
    const updating = memory.gradients === 'fused' ? LEAN_UPDATE : MEMORY_DEFAULTS
    const { gradients, masters, moments, offloadOptimizer } = updating
    const own = { ...memory, gradients, masters, moments, offloadOptimizer }
    const { passes, optimizer } = this.recordLayers(layers, own, context, settings.batchSize)
    const seconds = estimateStep(passes, optimizer, this.planning.rates)
    return {
      arena: passes.arenaBytes + passes.batchBytes,
      host: passes.hostBytes,
      seconds: sumOf(withoutUpdate(seconds)),
    }
  }

  private recordLayers(layers: number, memory: MemorySettings, context: number, batchSize: number): StepRecord {
    const { config, dtype, settings, onGpu } = this.planning
    const device = Device.open(onGpu ? 'dry:cuda' : 'dry')
    return recordStep(device, { ...config, layers }, dtype, { ...settings, batchSize, memory }, context)
  }
}

const withoutUpdate = (seconds: Seconds): Seconds => ({ ...seconds, update: 0 })

/** Any fused update: how states are kept changes no activation. */
const LEAN_UPDATE: Updating = { gradients: 'fused', masters: 'stochastic', moments: '8bit', offloadOptimizer: false }

function updates({ dtype, settings, onGpu }: Planning): Updating[] {
  const found: Updating[] = []
  // Remainders hold the same masters in half the bytes.
  const masters = dtype === 'bf16' ? (['remainder', 'stochastic'] as const) : (['float32'] as const)
  for (const gradients of ['float32', 'bfloat16', 'fused'] as const) {
    if (gradients === 'fused' && settings.accumulate > 1) continue
    for (const master of masters) {
      for (const moments of ['float32', 'bfloat16', '8bit'] as const) {
        for (const offloadOptimizer of onGpu ? [false, true] : [false]) {
          found.push({ gradients, masters: master, moments, offloadOptimizer })
        }
      }
    }
  }
  return found
}

/** Ways to keep activations. On a CPU the host's memory is no other. */
function keepings({ config, context, settings, onGpu }: Planning): Keeping[] {
  const rows = settings.batchSize * context
  const tile = Math.max(1024, 2 ** Math.ceil(Math.log2(rows / 16)))
  const tiles = tile < rows ? [0, tile] : [0]
  const found: Keeping[] = []
  const rest = { attentionGroups: 1, logitsRows: 0 }
  for (const mlpRows of tiles) {
    found.push({ checkpointLayers: 0, keepAttention: false, offloadCheckpoints: false, mlpRows, ...rest })
    for (const checkpointLayers of [1, 2, 3, 4].filter((k) => k <= config.layers)) {
      for (const keepAttention of [true, false]) {
        for (const offloadCheckpoints of onGpu ? [false, true] : [false]) {
          found.push({ checkpointLayers, keepAttention, offloadCheckpoints, mlpRows, ...rest })
        }
      }
    }
  }
  return found
}

/** Clipping by layers is another one. */
const isExact = ({ gradients, masters, moments }: MemorySettings, { settings }: Planning): boolean =>
  (gradients === 'float32' || (gradients === 'fused' && settings.maxGradNorm === 0)) &&
  masters !== 'stochastic' &&
  moments === 'float32'

function costsOf({ gradients, masters, moments }: MemorySettings, { settings }: Planning): string[] {
  const costs: string[] = []
  if (gradients === 'fused') {
    const clip = settings.maxGradNorm > 0 ? ', and maxGradNorm limits each layer, not all together' : ''
    costs.push(`fused updates: no accumulate${clip}`)
  }
  if (gradients === 'bfloat16') costs.push('gradients are rounded to bfloat16')
  if (moments === 'bfloat16') costs.push('moments are rounded to bfloat16')
  if (moments === '8bit') costs.push('moments are rounded to 8 bits')
  if (masters === 'stochastic') costs.push('weights are rounded to bfloat16 by chance')
  return costs
}

/** Options that are not the defaults. */
function changed(memory: MemorySettings): MemoryOptions {
  return Object.fromEntries(
    Object.entries(memory).filter(([name, value]) => value !== MEMORY_DEFAULTS[name as keyof MemorySettings]),
  )
}

/** Why nothing fits, and what would. */
function explain(planning: Planning, finder: Finder): FitProblem {
  const { limitBytes, hostLimitBytes, device, settings, context } = planning
  const all = finder.candidates()
  const within = all.filter(({ hostBytes }) => hostLimitBytes === undefined || hostBytes <= hostLimitBytes)
  const least = within.reduce((best, one) => (one.requiredBytes < best.requiredBytes ? one : best))
  const leanest = finder.exactly(least.memory)
  const missingBytes = leanest.plan.requiredBytes - limitBytes!
  const fixed = finder.fixedBytes
  const hopeless = fixed > limitBytes!
  const reason = hopeless
    ? `weights, and what of gradients and optimizer states cannot be on the host, are ${gb(fixed)} whatever the context is`
    : `${settings.batchSize} x ${context} tokens leave too little room for activations`
  const nearest = hopeless ? undefined : nearestFit(planning)
  return { reason: `${device?.name ?? 'the device'} has ${gb(limitBytes!)}: ${reason}`, leanest, missingBytes, nearest }
}

const gb = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`

/** One window in a pass, then ever shorter ones. */
function nearestFit(planning: Planning): FitProblem['nearest'] {
  const { settings, context } = planning
  const shapes: { context: number; batchSize: number; accumulate: number }[] = []
  const { batchSize, accumulate } = settings
  if (batchSize > 1) shapes.push({ context, batchSize: 1, accumulate: batchSize * accumulate })
  const at = (shape: { context: number; batchSize: number; accumulate: number }): FitSet | undefined => {
    const { context, ...rest } = shape
    const smaller = { ...planning, context, settings: { ...settings, ...rest, context } }
    const finder = new Finder(smaller)
    const lean = finder.candidates(({ keepAttention, mlpRows }) => !keepAttention && (mlpRows > 0 || context <= 1024))
    return choose(finder, smaller, lean)[0]
  }
  for (const shape of shapes) {
    const set = at(shape)
    if (set) return { ...shape, set }
  }
  // Halves until one fits, then the steps between: the longest in steps of a 32nd.
  const shape = { context, batchSize: 1, accumulate: batchSize * accumulate }
  let low = 0
  let best: FitSet | undefined
  for (let length = Math.floor(context / 2); length >= 16 && !best; length = Math.floor(length / 2)) {
    best = at({ ...shape, context: length })
    if (best) low = length
  }
  if (!best) return undefined
  const unit = Math.max(1, 2 ** Math.floor(Math.log2(low / 16)))
  let high = Math.min(context, 2 * low + 1)
  while (high - low > unit) {
    const middle = Math.floor((low + high) / 2 / unit) * unit
    if (middle <= low) break
    const set = at({ ...shape, context: middle })
    if (set) [low, best] = [middle, set]
    else high = middle
  }
  return { ...shape, context: low, set: best }
}
