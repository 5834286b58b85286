import { join } from 'node:path'
import { availableParallelism } from 'node:os'
import { BASE } from '../../demo/demo.js'
import { Llama } from '../../index.js'
import { reproduce, type ReproduceOptions, type ReproduceResult } from '../run.js'
import type { Settings } from '../settings.js'
import { miniatureData } from './data.js'
import { miniatureSettings, quickSettings } from './settings.js'

export interface MiniatureOptions extends Pick<ReproduceOptions, 'out' | 'only' | 'force' | 'signal' | 'onProgress'> {
  seed: number
  /** A look at everything, no measurement. */
  quick?: boolean
  /** For tests: in place of the settings that go with `quick`. */
  settings?: Settings
}

/** The whole report on the model that ships with the package, and on generated data. */
export async function reproduceMiniature(options: MiniatureOptions): Promise<ReproduceResult> {
  const { seed, quick = false, out, onProgress } = options
  const dry = await Llama.load(BASE, { device: 'dry' })
  const window = dry.contextWindow
  dry.dispose()
  const settings = options.settings ?? (quick ? quickSettings : miniatureSettings)(window, seed)
  const cores = availableParallelism()
  return reproduce({
    ...options,
    kind: 'miniature',
    base: BASE,
    settings,
    generate: () => miniatureData(join(out, 'data'), BASE, window, settings, (task) => onProgress?.(0, task)),
    device: 'cpu',
    // Two lanes, on half of the cores each, take less time than one after the other on all of them.
    lanes: Math.min(2, cores),
    threads: Math.max(1, Math.floor(cores / 2)),
  })
}
