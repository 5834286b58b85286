import { type FileHandle, open, readFile, rename } from 'node:fs/promises'
import { writeAll, writeFailure, writeFileDurable } from '../files/durable.js'

/**
 * What one training step gives, and metrics.jsonl keeps.
 *
 * @category Training
 */
export interface StepResult {
  /** Steps done, this one included. */
  step: number
  /** Mean negative log-likelihood, in nats, of all predictions of the step, before its update. */
  loss: number
  /** 2-norm of the gradients before clipping. */
  gradNorm: number
  /** Of this step, as the schedule says. */
  learningRate: number
  /** Tokens that went in: those of all windows of the step. */
  tokens: number
  /** Of the whole step on the clock, data included; evaluations and checkpoints are not. */
  seconds: number
  /** tokens / seconds. */
  tokensPerSecond: number
  /** flopsPerStep / seconds; see {@link TrainingPlan}. */
  flopsPerSecond: number
  /** Model FLOPs utilisation, flopsPerSecond / peakFlops; `step` gives none unless that option is given. */
  mfu?: number
  /** True where loss or gradients were not finite: weights, moments and t of the bias corrections stayed as they were. */
  skipped: boolean
  /** At evaluations: `loss` over the validation windows, and what `evaluate` gave. */
  validation?: Record<string, number>
}

/**
 * metrics.jsonl: the result of each step as a line of JSON, written when the step is done, one write a line. Numbers
 * that are not finite are null. It is made durable by `sync`, at every checkpoint.
 */
export class MetricsLog {
  private constructor(
    private readonly path: string,
    private readonly handle: FileHandle,
  ) {}

  /** Opens the log of a run that stands at `step`: later lines, and one cut off by a crash, are taken out first;
   * where none would be left, the file is put aside. */
  static async open(path: string, step: number): Promise<MetricsLog> {
    const text = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return ''
      throw error
    })
    const kept = text
      .split('\n')
      .filter((line) => stepOf(line) <= step)
      .map((line) => `${line}\n`)
      .join('')
    // A run that starts anew does not erase the history of another one in the same folder.
    if (kept === '' && text !== '') await rename(path, `${path}.${new Date().toISOString().replaceAll(':', '')}`)
    else if (kept !== text) await writeFileDurable(path, kept)
    return new MetricsLog(path, await open(path, 'a'))
  }

  async append(metrics: StepResult): Promise<void> {
    const line = Buffer.from(`${JSON.stringify(metrics)}\n`)
    try {
      await writeAll(this.handle, line)
    } catch (error) {
      throw await writeFailure(error, this.path, line.length)
    }
  }

  async sync(): Promise<void> {
    try {
      await this.handle.sync()
    } catch (error) {
      throw await writeFailure(error, this.path, 0)
    }
  }

  async close(): Promise<void> {
    await this.handle.close()
  }
}

/** Infinity for what is no line of ours. */
function stepOf(line: string): number {
  try {
    const { step } = JSON.parse(line) as { step?: unknown }
    return typeof step === 'number' ? step : Infinity
  } catch {
    return Infinity
  }
}
