// Before anything is allocated for training: whether it can fit, and what would.
import { RopewalkError } from '../errors.js'
import type { Llama } from '../model/llama.js'
import { type FitResult, type FitSet, search } from './fit.js'
import type { MemoryOptions, MemorySettings } from './memory.js'
import type { Settings } from './options.js'
import { describePlan, type MemoryPlan, record } from './planner.js'
import { type Planning, presentDevice } from './request.js'
import { savings } from './savings.js'

/** Rows, tokens in a row, and micro-batches of a step. */
export interface StepShape {
  rows: number
  time: number
  accumulate: number
}

/** A step that cannot fit: what it needs, and what would fit. */
export class TooLarge extends RopewalkError {
  constructor(
    message: string,
    readonly plan: MemoryPlan,
    readonly fit: FitResult,
  ) {
    super('ERR_OUT_OF_MEMORY', message)
  }
}

/** The step as a question to the planner, with what is free on the model's device now. */
function planningOf(model: Llama, settings: Settings, { rows, time, accumulate }: StepShape): Planning {
  return {
    name: model.path,
    config: model.config,
    dtype: model.weights.dtype,
    quantization: model.quantization,
    context: time,
    settings: { ...settings, batchSize: rows, accumulate, context: time },
    steps: undefined,
    ...presentDevice(model.device),
  }
}

/** Throws TooLarge, with all categories and what would fit, where the step cannot. */
export function requireFit(model: Llama, settings: Settings, shape: StepShape): void {
  const planning = planningOf(model, settings, shape)
  const plan = describePlan(planning, record(planning, settings.memory))
  if (plan.fits === false) refuse(planning, plan)
}

/** The first exact set of options that fits; `fixed` ones are as given. Throws TooLarge where there is none. */
export function fittingMemory(
  model: Llama,
  settings: Settings,
  shape: StepShape,
  fixed: Partial<MemorySettings>,
): MemorySettings {
  const planning = planningOf(model, settings, shape)
  if (planning.limitBytes === undefined || model.device.dry) return settings.memory
  const { sets } = search(planning, fixed)
  const set = sets.find(({ exact }) => exact || Object.keys(fixed).length > 0)
  return set ? set.plan.memory : refuse(planning, describePlan(planning, record(planning, settings.memory)))
}

function refuse(planning: Planning, plan: MemoryPlan): never {
  const { rows, time } = { rows: plan.batchSize, time: plan.context }
  const { bytes, requiredBytes, hostBytes, limitBytes, hostLimitBytes, device } = plan
  const parts = Object.entries(bytes).filter(([, one]) => one > 0)
  const table = parts.map(([name, one]) => `${name} ${formatSize(one)}`).join(', ')
  const host = hostBytes > 0 ? ` and ${formatSize(hostBytes)} of the host` : ''
  const free = hostLimitBytes === undefined ? '' : `, and the host ${formatSize(hostLimitBytes)}`
  const found = search(planning)
  throw new TooLarge(
    `training on ${rows} x ${time} tokens needs ${formatSize(requiredBytes)}${host} (${table}), but ` +
      `${device?.name ?? 'the device'} has ${formatSize(limitBytes!)} for it${free}. ${remedy(found)}` +
      describeSavings(planning, plan.memory),
    plan,
    found,
  )
}

/**
 * An allocation that failed although the step was admitted, because others use the device too or its memory is in pieces,
 * with what each memory option would free; any other error as it is.
 */
export function explainOutOfMemory(
  error: unknown,
  model: Llama,
  settings: Settings,
  shape: StepShape | undefined,
): unknown {
  if (!shape || !(error instanceof RopewalkError) || error.code !== 'ERR_OUT_OF_MEMORY') return error
  const planning = planningOf(model, settings, shape)
  const message = `${error.message}${describeSavings(planning, settings.memory)}`
  return new RopewalkError(error.code, message, { cause: error })
}

function describeSavings(planning: Planning, memory: MemorySettings): string {
  const found = savings(planning, memory)
  if (found.length === 0) return ''
  const list = found.map(({ memory, bytes }) => `${formatMemory(memory).slice(2, -2)} frees ${formatSize(bytes)}`)
  return `. Of memory's options, each alone: ${list.join(', ')}`
}

/** What would fit: the fastest exact set, and one that rounds where it takes less time or memory of the host. */
function remedy({ sets, problem }: FitResult): string {
  if (problem) {
    const { nearest, missingBytes, leanest } = problem
    const least = `The leanest set, ${describeSet(leanest)}, is still ${formatSize(missingBytes)} too large`
    if (!nearest) return `${least}, whatever the context is: only training on one device is supported`
    const { batchSize, accumulate, context, set } = nearest
    return (
      `${least}. The nearest that fits: context ${context}, batchSize ${batchSize}, accumulate ${accumulate} with ` +
      describeSet(set)
    )
  }
  const [first, ...others] = sets
  const rounded = others.find((set) => set.exact !== first!.exact)
  const or = rounded ? `, or ${describeSet(rounded)}` : ''
  return `What fits: ${describeSet(first!)}${or}; \`ropewalk plan --fit\` lists more`
}

function describeSet({ memory, plan, slowdown, exact, costs }: FitSet): string {
  const host = plan.hostBytes > 0 ? ` and ${formatSize(plan.hostBytes)} of the host` : ''
  const notes = [exact ? 'exact' : '', ...costs].filter((note) => note !== '').join(', ')
  const time = `about ${slowdown.toFixed(2)} x the time of keeping everything`
  return `memory: ${formatMemory(memory)} (${formatSize(plan.requiredBytes)}${host}, ${time}; ${notes})`
}

/** As it is written in a program: { checkpointLayers: 1, moments: '8bit' } */
export function formatMemory(memory: MemoryOptions): string {
  const entries = Object.entries(memory).map(([name, value]) => {
    return `${name}: ${typeof value === 'string' ? `'${value}'` : String(value)}`
  })
  return entries.length === 0 ? '{}' : `{ ${entries.join(', ')} }`
}

/** 12.3 GB; megabytes where that says nothing. */
export function formatSize(bytes: number): string {
  return bytes < 1e9 ? `${(bytes / 1e6).toPrecision(3)} MB` : `${(bytes / 1e9).toFixed(1)} GB`
}
