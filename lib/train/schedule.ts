/** How the learning rate goes on after the warm-up. */
export const schedules = ['constant', 'linear', 'cosine'] as const
export type Schedule = (typeof schedules)[number]

export interface ScheduleSettings {
  /** The peak. */
  learningRate: number
  /** Steps of linear rise; 0 starts at the peak. */
  warmupSteps: number
  schedule: Schedule
  /** Length of the run in steps, over which `linear` and `cosine` fall. */
  steps: number
  /** What is left of the peak at the end of the fall. */
  finalFraction: number
}

/** Where the warm-up starts, as a fraction of the peak: arXiv 2306.15595, section 3.1. */
const WARMUP_START = 0.1

/**
 * The learning rate of a step, counted from 0. With W warm-up steps, a peak P and N steps in all:
 *
 * - step < W: P (0.1 + 0.9 step / W), so that step 0 has a tenth of the peak and step W is the first to have all of it;
 * - `constant`: P from step W on, without end (the paper's recipe);
 * - `linear`, `cosine`: from P at step W down to P finalFraction at step N, and that from then on. The last step of the
 *   run, N - 1, is one short of it.
 *
 * Steps whose update was skipped count: the schedule follows the data, not the updates.
 */
export function learningRateAt(step: number, settings: ScheduleSettings): number {
  const { learningRate, warmupSteps, schedule, steps, finalFraction } = settings
  if (step < warmupSteps) return learningRate * (WARMUP_START + ((1 - WARMUP_START) * step) / warmupSteps)
  if (schedule === 'constant') return learningRate
  const length = steps - warmupSteps
  const progress = length > 0 ? Math.min(1, (step - warmupSteps) / length) : 1
  const left = schedule === 'linear' ? 1 - progress : (1 + Math.cos(Math.PI * progress)) / 2
  return learningRate * (finalFraction + (1 - finalFraction) * left)
}
