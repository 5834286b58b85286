// The space that fit searches. Bytes of activations do not depend on how weights are updated, and grow by the same for
// every layer: a few layers are recorded for each way to keep activations, and only what is shown is recorded whole.
import { parameterShapes } from '../model/config.js'
import { Lora } from '../model/lora.js'
import { Parameters } from '../model/parameters.js'
import { Device } from '../runtime/device.js'
import { estimateStep, type Seconds, sumOf, updateSeconds } from './estimate.js'
import type { FitSet } from './fit.js'
import { MEMORY_DEFAULTS, type MemoryOptions, type MemorySettings } from './memory.js'
import { AdamW } from './optimizer.js'
import { recordStep, type StepRecord } from './plan.js'
import { describePlan, record } from './planner.js'
import type { Planning } from './request.js'

/** How activations are kept. */
type Keeping = Pick<
  MemorySettings,
  'checkpointLayers' | 'keepAttention' | 'offloadCheckpoints' | 'mlpRows' | 'attentionGroups' | 'logitsRows'
>
/** How weights are updated. */
type Updating = Pick<MemorySettings, 'gradients' | 'masters' | 'moments' | 'offloadOptimizer'>

export interface Candidate {
  memory: MemorySettings
  requiredBytes: number
  /** The part of them that is estimated. */
  keptBytes: number
  hostBytes: number
  seconds: number
  costs: string[]
  roundings: number
  fused: boolean
  /** Options that differ from the defaults. */
  changes: number
}

export type OnProgress = (done: number, total: number) => void

interface Narrowing {
  least?: boolean
  onlyFused?: boolean
  onProgress?: OnProgress | undefined
}

/** What one half of the options leads to. */
interface Part {
  bytes: number
  host: number
  seconds: number
}

/** Estimates for all sets of options, from records of a few layers. */
export class Finder {
  private readonly kept = new Map<string, Part>()
  private readonly updated = new Map<string, Part>()
  /** Of a step that keeps everything. */
  readonly plainSeconds: number

  constructor(
    private readonly planning: Planning,
    /** Options that are not to be chosen. */
    private readonly fixed: MemoryOptions,
  ) {
    this.plainSeconds = this.keep(MEMORY_DEFAULTS).seconds + this.update(MEMORY_DEFAULTS).seconds
  }

  /** All sets of options, or those of them that keep `least`, or only those with fused updates. */
  candidates({ least = false, onlyFused = false, onProgress }: Narrowing = {}): Candidate[] {
    const { planning } = this
    const found = new Map<string, Candidate>()
    const ways = keepings(planning, least)
    const updating = updates(planning).filter(({ gradients }) => !onlyFused || gradients === 'fused')
    for (const [done, keeping] of ways.entries()) {
      onProgress?.(done, ways.length)
      for (const one of updating) {
        const memory = { ...MEMORY_DEFAULTS, ...keeping, ...one, ...this.fixed }
        const key = JSON.stringify(memory)
        if (found.has(key) || !isPossible(memory, planning)) continue
        const rest = this.update(memory)
        const kept = this.keep(memory)
        const costs = costsOf(memory, planning)
        found.set(key, {
          memory,
          requiredBytes: rest.bytes + kept.bytes + planning.driverBytes,
          keptBytes: kept.bytes,
          hostBytes: rest.host + kept.host,
          seconds: rest.seconds + kept.seconds,
          costs,
          roundings: costs.length - Number(memory.gradients === 'fused'),
          fused: memory.gradients === 'fused',
          changes: Object.keys(changed(memory)).length,
        })
      }
    }
    return [...found.values()]
  }

  /** What the leanest update that the host has room for needs on the device, without any activations. */
  get fixedBytes(): number {
    const { planning, fixed } = this
    const { hostLimitBytes = Infinity, driverBytes } = planning
    const parts = updates(planning).map((one) => this.update({ ...one, ...fixed }))
    const possible = parts.filter(({ host }) => host <= hostLimitBytes)
    return Math.min(...(possible.length > 0 ? possible : parts).map(({ bytes }) => bytes)) + driverBytes
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
  private update({ gradients, masters, moments, offloadOptimizer }: Updating): Part {
    const key = [gradients, masters, moments, offloadOptimizer].join()
    let found = this.updated.get(key)
    if (!found) {
      const { config, dtype, quantization, settings, onGpu, rates } = this.planning
      const device = Device.open(onGpu ? 'dry:cuda' : 'dry')
      const weights = new Parameters(device, dtype, parameterShapes(config), { quantization })
      const lora = settings.lora && new Lora(weights, config, settings.lora)
      const memory = { ...MEMORY_DEFAULTS, gradients, masters, moments, offloadOptimizer }
      const optimizer = new AdamW((lora ?? weights).segments(), { ...settings, memory })
      found = { bytes: device.allocatedBytes, host: optimizer.hostBytes, seconds: updateSeconds(optimizer, rates) }
      this.updated.set(key, found)
    }
    return found
  }

  /** Activations and batch; of deep models from two numbers of layers, which end in the same way as the whole. */
  private keep(memory: MemorySettings): Part {
    const { layers } = this.planning.config
    const fused = memory.gradients === 'fused'
    const { checkpointLayers: k, keepAttention, offloadCheckpoints, mlpRows, attentionGroups, logitsRows } = memory
    const key = [k, keepAttention, offloadCheckpoints, mlpRows, attentionGroups, logitsRows, fused].join()
    let found = this.kept.get(key)
    if (!found) {
      const one = Math.max(1, k)
      const few = 3 * one + (layers % one)
      const more = few + one
      if (layers <= more) found = this.measure(layers, memory)
      else {
        const [a, b] = [this.measure(few, memory), this.measure(more, memory)]
        const scale = (low: number, high: number): number => low + ((high - low) * (layers - few)) / (more - few)
        found = { bytes: scale(a.bytes, b.bytes), host: scale(a.host, b.host), seconds: scale(a.seconds, b.seconds) }
      }
      this.kept.set(key, found)
    }
    return found
  }

  private measure(layers: number, memory: MemorySettings): Part {
    const { context, settings } = this.planning
    const updating = memory.gradients === 'fused' ? LEAN_UPDATE : MEMORY_DEFAULTS
    const { gradients, masters, moments, offloadOptimizer } = updating
    const own = { ...memory, gradients, masters, moments, offloadOptimizer }
    const { passes, optimizer } = this.recordLayers(layers, own, context, settings.batchSize)
    const seconds = estimateStep(passes, optimizer, this.planning.rates)
    return {
      bytes: passes.arenaBytes + passes.batchBytes,
      host: passes.hostBytes,
      seconds: sumOf(withoutUpdate(seconds)),
    }
  }

  private recordLayers(layers: number, memory: MemorySettings, context: number, batchSize: number): StepRecord {
    const { config, dtype, quantization, settings, onGpu } = this.planning
    const device = Device.open(onGpu ? 'dry:cuda' : 'dry')
    return recordStep(device, { ...config, layers }, dtype, { ...settings, batchSize, memory }, context, quantization)
  }
}

const withoutUpdate = (seconds: Seconds): Seconds => ({ ...seconds, update: 0 })

/** Any fused update: how states are kept changes no activation. */
const LEAN_UPDATE: Updating = { gradients: 'fused', masters: 'stochastic', moments: '8bit', offloadOptimizer: false }

function updates({ dtype, onGpu, settings }: Planning): Updating[] {
  const found: Updating[] = []
  const narrow = dtype === 'bf16' && settings.lora?.alsoTrain.length !== 0
  // Remainders hold the same masters in half the bytes.
  const masters = narrow ? (['remainder', 'stochastic'] as const) : (['float32'] as const)
  for (const gradients of ['float32', 'bfloat16', 'fused'] as const) {
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

/** Ways to keep activations, or the `least` of them. On a CPU the host's memory is no other. */
function keepings({ config, context, settings, onGpu }: Planning, least: boolean): Keeping[] {
  const rows = settings.batchSize * context
  const tile = Math.min(65536, Math.max(2048, 2 ** Math.ceil(Math.log2(rows / 8))))
  const parts: Pick<Keeping, 'mlpRows' | 'attentionGroups'>[] = [{ mlpRows: 0, attentionGroups: 1 }]
  // As long as the MLP is whole, it needs more than attention.
  if (tile < rows)
    for (const attentionGroups of new Set([1, config.kvHeads])) parts.push({ mlpRows: tile, attentionGroups })
  // L / k + k is least near the root of L.
  const distances = new Set([1, 2, Math.round(Math.sqrt(config.layers))].filter((k) => k <= config.layers))
  const found: Keeping[] = []
  for (const part of least ? parts.slice(-1) : parts) {
    const rest = { ...part, logitsRows: 0 }
    if (!least) found.push({ checkpointLayers: 0, keepAttention: false, offloadCheckpoints: false, ...rest })
    for (const checkpointLayers of distances) {
      for (const keepAttention of least ? [false] : [true, false]) {
        for (const offloadCheckpoints of onGpu ? [false, true] : [false]) {
          found.push({ checkpointLayers, keepAttention, offloadCheckpoints, ...rest })
        }
      }
    }
  }
  return found
}

/** Whether the options can go together. */
function isPossible(memory: MemorySettings, { settings, config }: Planning): boolean {
  const { checkpointLayers, keepAttention, offloadCheckpoints, gradients } = memory
  if (checkpointLayers > config.layers || (gradients === 'fused' && settings.accumulate > 1)) return false
  return checkpointLayers > 0 || !(keepAttention || offloadCheckpoints)
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
