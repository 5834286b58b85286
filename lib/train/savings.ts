import { MEMORY_DEFAULTS, type MemoryOptions, type MemorySettings } from './memory.js'
import { describePlan, record } from './planner.js'
import type { Planning } from './request.js'

/** One more option, and the bytes of the device that the step then needs less. */
export interface Saving {
  memory: MemoryOptions
  bytes: number
}

/** What each memory option alone would free of a step that is kept like `memory`; most first. */
export function savings(planning: Planning, memory: MemorySettings): Saving[] {
  const needed = (own: MemorySettings): number => describePlan(planning, record(planning, own), own).requiredBytes
  const now = needed(memory)
  return leaner(planning, memory)
    .map((more) => ({ memory: more, bytes: now - needed({ ...memory, ...more }) }))
    .filter(({ bytes }) => bytes > 0)
    .sort((a, b) => b.bytes - a.bytes)
}

/** Options that are not chosen yet, each in its leanest form that changes little else. */
function leaner({ config, dtype, context, settings, onGpu }: Planning, memory: MemorySettings): MemoryOptions[] {
  const rows = settings.batchSize * context
  const unset = (name: keyof MemoryOptions): boolean => memory[name] === MEMORY_DEFAULTS[name]
  const found: MemoryOptions[] = []
  const offer = (more: MemoryOptions, possible = true): void => {
    const [name] = Object.keys(more) as [keyof MemoryOptions]
    if (possible && unset(name)) found.push(more)
  }
  offer({ checkpointLayers: 1 })
  offer({ offloadCheckpoints: true }, onGpu && memory.checkpointLayers > 0)
  offer({ mlpRows: 1024 }, rows > 1024)
  offer({ attentionGroups: config.kvHeads })
  offer(settings.accumulate > 1 ? { gradients: 'bfloat16' } : { gradients: 'fused' })
  offer({ masters: 'remainder' }, dtype === 'bf16')
  offer({ moments: '8bit' })
  offer({ offloadOptimizer: true }, onGpu)
  return found
}
