import type { LlamaConfig } from '../model/config.js'
import { type LoraSettings, readLora } from '../model/lora.js'
import { type Candidate, Finder, type OnProgress } from './finder.js'
import type { MemoryOptions } from './memory.js'
import { fits, type MemoryPlan } from './planner.js'
import { type Planning, type PlanRequest, readRequest } from './request.js'

/**
 * Memory options with which a step fits.
 *
 * @category Training
 */
export interface FitSet {
  /** Those that differ from the defaults. */
  memory: MemoryOptions
  /** What it needs. */
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
  /** With which an adapter could be trained (`lora: {}`) on what was asked for; undefined where it could not. */
  adapter: FitSet | undefined
}

/**
 * Searches the memory options for those with which a step fits `device` or `limit`, and estimates what each costs. It
 * records some hundred steps of a few layers, seconds in which nothing else happens on the event loop; `onProgress` is
 * told how many of how many are done. Throws as {@link plan}, and TypeError where no limit is given.
 */
export async function fit(
  request: PlanRequest,
  { onProgress }: { onProgress?: (done: number, total: number) => void } = {},
): Promise<FitResult> {
  const memory = request?.memory
  if (typeof memory !== 'object' || memory === null) return search(await readRequest(request), {}, onProgress)
  // What only goes with checkpoints may be asked for without saying how many: they are what is looked for.
  const fixed = defined(memory)
  return search(await readRequest({ ...request, memory: { checkpointLayers: 1, ...fixed } }), fixed, onProgress)
}

const defined = (options: MemoryOptions): MemoryOptions =>
  Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined))

/** How far bytes may be below what a few layers say: those that nearly fit are looked at. */
const MARGIN = 0.01

/** Sets that are shown: exact ones, and others. */
const SHOWN = 4

/** `fixed` options are as given in every set. */
export function search(planning: Planning, fixed: MemoryOptions = {}, onProgress?: OnProgress): FitResult {
  if (planning.limitBytes === undefined) {
    throw new TypeError('neither device nor limit is given: fit looks for what fits into the memory of one')
  }
  const finder = new Finder(planning, fixed)
  const sets = choose(finder, planning, finder.candidates({ onProgress }))
  if (sets.length > 0) return { sets, problem: undefined }
  return { sets, problem: explain(planning, finder, fixed) }
}

/** The sets that need least of the device: exact and without the host, without the host, and at all. */
export async function leanestSets(request: PlanRequest): Promise<Record<'exact' | 'leanest' | 'offloaded', FitSet>> {
  const planning = await readRequest(request)
  const finder = new Finder(planning, {})
  // Fused updates need least; with several passes in a step there are none.
  const all = finder.candidates({ least: true, onlyFused: planning.settings.accumulate === 1 }).sort(byBytes)
  const first = (holds: (candidate: Candidate) => boolean): FitSet => finder.exactly(all.find(holds)!.memory)
  return {
    exact: first(({ hostBytes, roundings }) => hostBytes === 0 && roundings === 0),
    leanest: first(({ hostBytes }) => hostBytes === 0),
    offloaded: first(() => true),
  }
}

const byBytes = (a: Candidate, b: Candidate): number =>
  a.requiredBytes - b.requiredBytes || a.hostBytes - b.hostBytes || a.costs.length - b.costs.length

/**
 * The sets that fit and are beaten by none in every respect: exclusions, number of roundings, host memory and time; the
 * simplest of equals.
 */
function choose(finder: Finder, planning: Planning, candidates: readonly Candidate[]): FitSet[] {
  const near = candidates.filter(({ requiredBytes, keptBytes, hostBytes }) =>
    fits({ requiredBytes: requiredBytes - MARGIN * keptBytes, hostBytes }, planning),
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

/** Why nothing fits, and what would. */
function explain(planning: Planning, finder: Finder, fixed: MemoryOptions): FitProblem {
  const { limitBytes, hostLimitBytes, device, settings, context, config } = planning
  const all = finder.candidates()
  const within = all.filter(({ hostBytes }) => hostLimitBytes === undefined || hostBytes <= hostLimitBytes)
  // Where the host has too little for any, the one that needs least of it.
  const [least] = within.length > 0 ? within.sort(byBytes) : all.sort((a, b) => a.hostBytes - b.hostBytes)
  const leanest = finder.exactly(least!.memory)
  const missingBytes = Math.max(0, leanest.plan.requiredBytes - limitBytes!)
  const always = finder.fixedBytes
  const hopeless = always > limitBytes!
  const reason = hopeless
    ? `weights, and what of gradients and optimizer states cannot be elsewhere, are ${gb(always)} whatever the context is`
    : `${settings.batchSize} x ${context} tokens leave too little room for activations`
  return {
    reason: `${device?.name ?? 'the device'} has ${gb(limitBytes!)}: ${reason}`,
    ...{ leanest, missingBytes },
    nearest: hopeless ? undefined : nearestFit(planning, fixed),
    adapter: settings.lora
      ? undefined
      : leanFit({ ...planning, settings: { ...settings, lora: smallest(config) } }, fixed),
  }
}

/** The adapter of the defaults, or one of the rank that the model's smallest matrix can have. */
const smallest = ({ kvHeads, headDim }: LlamaConfig): LoraSettings => readLora({ rank: Math.min(8, kvHeads * headDim) })

const gb = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`

/** The fastest of the sets that keep least, if it fits. */
function leanFit(planning: Planning, fixed: MemoryOptions): FitSet | undefined {
  const finder = new Finder(planning, fixed)
  return choose(finder, planning, finder.candidates({ least: true }))[0]
}

/** Fewer windows in a pass, as many as fit; where one is too many, ever shorter ones. */
function nearestFit(planning: Planning, fixed: MemoryOptions): FitProblem['nearest'] {
  const { settings, context } = planning
  const { batchSize, accumulate } = settings
  // What a pass has less of, a step has more of; with fused updates it cannot.
  const passes = fixed.gradients === 'fused' ? 1 : batchSize * accumulate
  const shape = { batchSize: 1, accumulate: passes }
  const at = (length: number): FitSet | undefined =>
    leanFit({ ...planning, context: length, settings: { ...settings, ...shape, context: length } }, fixed)
  const whole = batchSize > 1 ? at(context) : undefined
  if (whole) {
    // With the same windows in a step: the most that divide them.
    const wider = Array.from({ length: batchSize - 2 }, (_, i) => i + 2).filter((size) => passes % size === 0)
    let found = { ...shape, set: whole }
    for (let low = 0, high = wider.length; low < high;) {
      const middle = (low + high) >> 1
      const of = { batchSize: wider[middle]!, accumulate: passes / wider[middle]! }
      const set = leanFit({ ...planning, settings: { ...settings, ...of } }, fixed)
      if (set) {
        found = { ...of, set }
        low = middle + 1
      } else {
        high = middle
      }
    }
    return { context, ...found }
  }
  // Halves until one fits, then the steps between: the longest in steps of a 32nd.
  let low = 0
  let best: FitSet | undefined
  for (let length = Math.floor(context / 2); length >= 16 && !best; length = Math.floor(length / 2)) {
    best = at(length)
    if (best) low = length
  }
  if (!best) return undefined
  const unit = Math.max(1, 2 ** Math.floor(Math.log2(low / 16)))
  let high = Math.min(context, 2 * low + 1)
  while (high - low > unit) {
    const middle = Math.floor((low + high) / 2 / unit) * unit
    if (middle <= low) break
    const set = at(middle)
    if (set) [low, best] = [middle, set]
    else high = middle
  }
  return { context: low, ...shape, set: best }
}
