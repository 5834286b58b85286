import type { Purpose } from '../runtime/tensor.js'
import { largestPass, type StepRecord } from './plan.js'

/** What is alive in the arena at one operation of a step. */
export interface Moment {
  operation: number
  part: string
  phase: 'forward' | 'backward'
  bytes: Record<Purpose, number>
}

/** Memory over the operations of a step: of each of at most `columns` stretches, the moment of most. */
export function memoryTimeline({ passes }: StepRecord, columns: number): Moment[] {
  const { commands, placements } = largestPass(passes)
  const count = commands.length
  const changes = new Map<Purpose, Float64Array>()
  for (const purpose of ['checkpoint', 'gradient', 'logits', 'activation'] as const) {
    changes.set(purpose, new Float64Array(count + 1))
  }
  for (const { host, purpose, bytes, first, last } of placements) {
    if (host) continue
    const change = changes.get(purpose)!
    change[first]! += bytes
    change[Math.min(last + 1, count)]! -= bytes
  }
  const moments: Moment[] = []
  const alive: Record<Purpose, number> = { checkpoint: 0, gradient: 0, logits: 0, activation: 0 }
  const perColumn = Math.ceil(count / columns)
  let most = -1
  commands.forEach(({ place }, operation) => {
    let total = 0
    for (const [purpose, change] of changes) total += alive[purpose] += change[operation]!
    const starts = operation % perColumn === 0
    if (starts || total > most) {
      const moment = { operation, part: place.part, phase: place.phase, bytes: { ...alive } }
      if (starts) moments.push(moment)
      else moments[moments.length - 1] = moment
      most = total
    }
  })
  return moments
}
