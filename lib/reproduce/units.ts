import type { Llama } from '../index.js'
import type { ReportFolder } from './folder.js'

/** What a unit works with. */
export interface Bench {
  folder: ReportFolder
  signal: AbortSignal | undefined
  /** The model of that id; it stays the lane's, and is loaded once for units that follow each other. */
  model(id: string): Promise<Llama>
  /** A model of one's own, to be changed and disposed of; the lane's is let go first. */
  load(id: string): Promise<Llama>
  /** `done` of the unit, from 0 to 1. */
  progress(done: number, detail?: string): void
}

/** A piece of work that is done once: its result is a file, and what it needs are others. */
export interface Unit {
  /** Its file below units/. */
  key: string
  /** For the progress bar. */
  label: string
  /** Roughly in tokens of a forward pass. */
  work: number
  /** Keys of units that must be done before. */
  after?: readonly string[]
  /** The result, as JSON, without anything that differs from run to run; that goes into `time`. */
  run(bench: Bench): Promise<{ value: unknown; time?: Record<string, unknown> }>
}

/** What a unit keeps where there is no result: why there is none. */
export interface LeftOut {
  leftOut: string
}

export const isLeftOut = (unit: unknown): unit is LeftOut =>
  typeof unit === 'object' && unit !== null && 'leftOut' in unit

/** The result, or, where the task does not fit the window, which evaluations say with a RangeError, that message. */
export async function unlessTooShort<T>(measure: () => Promise<T>): Promise<T | LeftOut> {
  try {
    return await measure()
  } catch (error) {
    if (!(error instanceof RangeError)) throw error
    return { leftOut: error.message }
  }
}

/** Why units whose key begins with `prefix` have no result, each reason once. */
export function leftOutOf(folder: ReportFolder, prefix: string): string[] {
  const units = folder.keys().filter((key) => key.startsWith(prefix))
  return [...new Set(units.map((key) => folder.get(key)).flatMap((unit) => (isLeftOut(unit) ? [unit.leftOut] : [])))]
}

export interface LaneOptions {
  folder: ReportFolder
  lanes: number
  /** Loads the model of an id. */
  load: (id: string) => Promise<Llama>
  signal?: AbortSignal | undefined
  /** `done` goes from 0 to 1 in proportion to the work. */
  onProgress?: ((done: number, task: string) => void) | undefined
}

/**
 * Does what is not done yet, in `lanes` side by side, in the order of the list as far as `after` allows. A unit computes
 * the same whatever runs beside it. Rejects with the first failure when all lanes have ended: a model at work cannot be
 * disposed of.
 */
export async function runUnits(units: readonly Unit[], options: LaneOptions): Promise<void> {
  const { folder, lanes, load, onProgress } = options
  const stop = new AbortController()
  const signal = options.signal ? AbortSignal.any([options.signal, stop.signal]) : stop.signal
  const pending = [...new Map(units.filter(({ key }) => !folder.has(key)).map((unit) => [unit.key, unit])).values()]
  const known = new Set(pending.map(({ key }) => key))
  const total = pending.reduce((sum, { work }) => sum + work, 0)
  const partial = new Map<string, number>()
  let finished = 0
  const report = (task: string): void => {
    const open = [...partial.values()].reduce((sum, work) => sum + work, 0)
    onProgress?.(total === 0 ? 1 : Math.min(1, (finished + open) / total), task)
  }
  /** Wakes lanes that wait for a unit of another one. */
  let wake = (): void => undefined
  let changed = new Promise<void>((resolve) => (wake = resolve))
  const announce = (): void => {
    wake()
    changed = new Promise((resolve) => (wake = resolve))
  }
  const ready = ({ after = [] }: Unit): boolean => after.every((key) => folder.has(key) || !known.has(key))

  const lane = async (): Promise<void> => {
    let loaded: { id: string; model: Llama } | undefined
    const model = async (id: string): Promise<Llama> => {
      if (loaded?.id === id) return loaded.model
      letGo()
      loaded = { id, model: await load(id) }
      return loaded.model
    }
    const letGo = (): void => {
      loaded?.model.dispose()
      loaded = undefined
    }
    const own = (id: string): Promise<Llama> => {
      letGo()
      return load(id)
    }
    try {
      while (pending.length > 0) {
        signal.throwIfAborted()
        const at = pending.findIndex(ready)
        if (at < 0) {
          await changed
          continue
        }
        const [unit] = pending.splice(at, 1) as [Unit]
        const { key, label, work } = unit
        partial.set(key, 0)
        report(label)
        const began = performance.now()
        const { value, time } = await unit.run({
          ...{ folder, signal, model, load: own },
          progress: (done, detail) => {
            partial.set(key, Math.min(1, done) * work)
            report(detail ? `${label}, ${detail}` : label)
          },
        })
        const seconds = (performance.now() - began) / 1000
        await folder.finish(key, value, { seconds, ...time })
        partial.delete(key)
        finished += work
        report(label)
        announce()
      }
    } catch (error) {
      stop.abort(error)
      throw error
    } finally {
      letGo()
      announce()
    }
  }
  const ended = Array.from({ length: lanes }, lane)
  await Promise.allSettled(ended)
  options.signal?.throwIfAborted()
  if (stop.signal.aborted) throw stop.signal.reason
}
